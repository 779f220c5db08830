// Workers that go through the phases of a sequence together, inside one parallel region. Knows neither torch nor STL.
#pragma once

#include <stdint.h>

#include "cpu/simd.h"

#if defined(__unix__) || defined(__APPLE__)
#include <sched.h>
#endif

// Where workers wait for each other. All zeros before the first meeting.
struct Meeting {
  alignas(64) int64_t arrived;
  alignas(64) int64_t number;
};

// What is split among the workers: rows of the batch, so that they meet rarely, or hidden units, where rows are few,
// and then they meet in every step.
enum class Split { ROWS, UNITS };

// A thread of the region and the workers [begin, end) of `size` that it is: one, or more where the region got fewer
// threads than it asked for.
struct Team {
  int64_t begin, end, size;
  Split split;
  Meeting* meeting;
};

namespace {

// Waits until all workers have come.
FASTARCH_INLINE void meet(const Team& team) {
  const int64_t ours = team.end - team.begin;
  if (ours == team.size) return;
  Meeting& at = *team.meeting;
  const int64_t number = __atomic_load_n(&at.number, __ATOMIC_RELAXED);
  if (__atomic_add_fetch(&at.arrived, ours, __ATOMIC_ACQ_REL) == team.size) {
    __atomic_store_n(&at.arrived, 0, __ATOMIC_RELAXED);
    __atomic_store_n(&at.number, number + 1, __ATOMIC_RELEASE);
    return;
  }
  for (int64_t spins = 1; __atomic_load_n(&at.number, __ATOMIC_ACQUIRE) == number; spins++) {
#if defined(__SSE2__)
    __builtin_ia32_pause();
#endif
#if defined(__unix__) || defined(__APPLE__)
    // The others may be waiting for this processor: after some microseconds, for beside a busy process a sequence of
    // 512 steps took 60 ms with 4096 spins before it yields, where it takes 0.4 alone.
    if (spins % 64 == 0) sched_yield();
#endif
  }
}

// Runs phase(worker) for every worker, and waits until all are done.
template <class Phase>
FASTARCH_INLINE void each_worker(const Team& team, const Phase& phase) {
  for (int64_t worker = team.begin; worker < team.end; worker++) phase(worker);
  meet(team);
}

}  // namespace
