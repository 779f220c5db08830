// Threads.
#pragma once

#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>

#include <algorithm>
#include <atomic>
#include <memory>

#include "cpu/memory.h"

#if defined(__SANITIZE_THREAD__)
#include <thread>
#include <vector>
#endif

namespace fastarch {

#if defined(__SANITIZE_THREAD__)
// make races: libgomp is not instrumented, so ThreadSanitizer does not see how OpenMP's threads wait for each other. It
// gets threads that it does see, and several for every problem, however small: races are looked for in small ones.
constexpr double IF_WORTH_IT = 0;
inline int64_t threads() { return 3; }
template <class Body>
void region(int64_t workers, const Body& body) {
  std::vector<std::thread> others;
  for (int64_t i = 1; i < workers; i++) others.emplace_back(body, i, i + 1);
  body(int64_t{0}, int64_t{1});
  for (std::thread& other : others) other.join();
}
#else
constexpr double IF_WORTH_IT = 1;
inline int64_t threads() { return at::in_parallel_region() ? 1 : at::get_num_threads(); }
// Runs body(begin, end) at once for consecutive parts of [0, workers).
template <class Body>
void region(int64_t workers, const Body& body) {
  at::parallel_for(0, workers, 1, body);
}
#endif

// Runs task(i, scratch) for all i, in one parallel region unless the work is too small to pay for one. A thread takes
// the tasks of its own share one by one, for those are what its caches may still hold from the last call, and then what
// is left of others' shares: a core that is slower or busy elsewhere holds up one task. (Tasks that went to any thread:
// notes_conv1 170 us instead of 105.)
template <class Task>
void parallel(int64_t tasks, int64_t scratch_bytes, double operations, const Task& task) {
  constexpr double WORTH_A_REGION = IF_WORTH_IT * 1e6;  // waking a core takes about as long as this many operations
  const int64_t workers = operations < WORTH_A_REGION ? 1 : std::min<int64_t>(tasks, threads());
  const int64_t stride = (scratch_bytes + 63) / 64 * 64;
  const at::Tensor scratch = stride > 0 ? workspace(workers * stride) : at::Tensor();
  uint8_t* const memory = stride > 0 ? scratch.data_ptr<uint8_t>() : nullptr;
  if (workers == 1) {
    for (int64_t i = 0; i < tasks; i++) task(i, memory);
    return;
  }
  struct alignas(64) Share {
    std::atomic<int64_t> next;
    int64_t end;
  };
  const auto shares = std::make_unique<Share[]>(workers);
  for (int64_t i = 0; i < workers; i++) {
    shares[i].next = tasks * i / workers;
    shares[i].end = tasks * (i + 1) / workers;
  }
  region(workers, [&](int64_t begin, int64_t end) {
    for (int64_t worker = begin; worker < end; worker++) {
      for (int64_t k = 0; k < workers; k++) {
        Share& share = shares[(worker + k) % workers];
        for (int64_t i; (i = share.next++) < share.end;) task(i, memory + worker * stride);
      }
    }
  });
}

}  // namespace fastarch
