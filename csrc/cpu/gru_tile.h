// What both passes of gru are made of: products of tiles of rows with panels of weights, memory for one call, and the
// walk over steps.
#pragma once

#include "cpu/gru.h"
#include "cpu/layout.h"
#include "cpu/product.h"
#include "cpu/range.h"

namespace {

// Rows of a tile: with the vectors of three gates they fill the registers (24 + 3 + 1 of 32, or 12 + 3 + 1 of 16).
constexpr int TILE_ROWS = VECTOR_REGISTERS == 32 ? 8 : 4;
constexpr int MOST_VECTORS = 6;
// Rows that share a run of weights while the L1 cache holds it. When each tile streamed all weights from L2, training
// took 1.19 times as long with 512 units, 1.09 with 256 and 128 rows (AVX2, one core).
constexpr int64_t STRIP_ROWS = 32;

// Few rows leave registers for twice as many vectors, whose sums hide the latency of one another.
FASTARCH_INLINE bool are_few(int64_t rows) { return 2 * balanced_rows(rows, TILE_ROWS) <= TILE_ROWS; }

// Calls f(n, rows) for the tiles or strips of a range of rows, and f(v, vectors) for groups of `most` vectors, the last
// ones of 2 and 1.
template <class F>
FASTARCH_INLINE void each_tile(Range range, const F& f) {
  for (int64_t n = range.begin, rows; n < range.end; n += rows) {
    rows = balanced_rows(range.end - n, TILE_ROWS);
    f(n, rows);
  }
}
template <class F>
FASTARCH_INLINE void each_strip(Range range, const F& f) {
  for (int64_t n = range.begin; n < range.end; n += STRIP_ROWS) f(n, least(STRIP_ROWS, range.end - n));
}
template <class F>
FASTARCH_INLINE void each_group(int64_t most, Range range, const F& f) {
  for (int64_t v = range.begin, vectors; v < range.end; v += vectors) {
    const int64_t left = range.end - v;
    vectors = left >= most ? most : left > 1 ? 2 : 1;
    f(v, vectors);
  }
}

// to[i][v] = init[i][v] + sum_k x[at[i] + k] * w[v][k]: rows i of a strip, vectors v of columns, panels w[v] of [K, L]
// w_step apart. K comes in segments of a length, x_step apart in x.
template <class T>
struct Product {
  const T* x;
  int64_t rows, at[STRIP_ROWS];
  const T* w;
  int64_t w_step, segments = 1, x_step = 0, length;
  const T* init;
  int64_t init_step = 0;
  T* to;
  int64_t to_step;
};

// Float sums are kept as short as so many products: one long chain has the rounding errors of all its partial sums.
constexpr int64_t RUN = 128;

// What goes into a sum at once: segments of n rows of weights each.
template <class T>
struct Run {
  const T *x, *w, *init;
  int64_t init_step, segments, n;
};

// One function for each number of rows and vectors, which everything shares.
template <class T, int P, int V>
__attribute__((noinline)) void multiply_tile(const Product<T>& o, const Run<T>& run, int64_t first) {
  constexpr int L = LANES<T>;
  const int64_t* const at = o.at + first;
  Vec<T> acc[P][V] = {};
  for (int64_t i = 0; i < run.segments; i++)
    multiply_add<P, V, T>(
        acc, run.x + i * o.x_step, [&](int64_t p) FASTARCH_INLINED { return at[p]; }, run.w + i * run.n * L, o.w_step,
        run.n);
#pragma GCC unroll 8
  for (int p = 0; p < P; p++) {
#pragma GCC unroll 6
    for (int v = 0; v < V; v++) {
      const Vec<T> before = load(run.init + (first + p) * run.init_step + v * L);
      store(o.to + (first + p) * o.to_step + v * L, before + acc[p][v]);
    }
  }
}

// For `rows` <= TILE_ROWS and 1, 2 or 3 vectors; 4 or 6 where rows are few.
template <class T, int P = TILE_ROWS>
void multiply_tile(int64_t rows, int64_t vectors, const Product<T>& o, const Run<T>& run, int64_t first) {
  if constexpr (P > 1) {
    if (rows < P) return multiply_tile<T, P - 1>(rows, vectors, o, run, first);
  }
  if constexpr (2 * P <= TILE_ROWS) {
    if (vectors == 6) return multiply_tile<T, P, 6>(o, run, first);
    if (vectors == 4) return multiply_tile<T, P, 4>(o, run, first);
  }
  if (vectors == 3) return multiply_tile<T, P, 3>(o, run, first);
  if (vectors == 2) return multiply_tile<T, P, 2>(o, run, first);
  multiply_tile<T, P, 1>(o, run, first);
}

template <class T>
void multiply(int64_t vectors, const Product<T>& o) {
  const int64_t together = most(1, RUN / o.length);  // short segments share a run
  Run<T> run{o.x, o.w, o.init, o.init_step, 0, 0};
  for (int64_t segment = 0; segment < o.segments; segment += together) {
    run.x = o.x + segment * o.x_step, run.segments = least(together, o.segments - segment);
    for (int64_t begin = 0; begin < o.length; begin += RUN) {
      run.n = least(RUN, o.length - begin);
      each_tile({0, o.rows}, [&](int64_t row, int64_t rows) { multiply_tile<T>(rows, vectors, o, run, row); });
      run.x += run.n, run.w += run.segments * run.n * LANES<T>;
      run.init = o.to, run.init_step = o.to_step;
    }
  }
}

// panel[k][l] = w[l][k], k < K, of rows w a step apart, of which `live` exist.
template <class T, class Storage>
void pack_panel(const Storage* w, int64_t step, int64_t K, int64_t live, T* panel) {
  constexpr int L = LANES<T>;
  if (live < L) memset(panel, 0, K * L * sizeof(T));
  copy_block(panel, {L, 1}, w, {1, step}, K, live);
}

// Memory of one call, taken piece by piece; counted when it starts from 0.
struct Memory {
  uintptr_t at;

  template <class T>
  T* take(int64_t n) {
    T* const p = reinterpret_cast<T*>(at);
    at += (n * sizeof(T) + 63) / 64 * 64;
    return p;
  }
};

// row[i] = from[i], i < n, and zeros up to a whole vector; and back.
template <class T, class Storage>
FASTARCH_INLINE void widen_row(const Storage* from, int64_t n, T* row) {
  for (int64_t i = 0; i < n; i += LANES<T>) store(row + i, load_as<T>(from + i, n - i));
}
template <class T, class Storage>
FASTARCH_INLINE void narrow_row(const T* row, int64_t n, Storage* to) {
  for (int64_t i = 0; i < n; i += LANES<T>) store_as<Storage, T>(to + i, load(row + i), n - i);
}

// A sequence as a walk sees it: steps s = 0 .. T - 1, of which step s is at time(s).
struct Sequence {
  const Gru p;

  FASTARCH_INLINE int64_t time(int64_t s) const { return p.reverse ? p.T - 1 - s : s; }
  FASTARCH_INLINE bool live(int64_t t, int64_t n) const { return !p.lengths || t < p.lengths[n]; }
  // The time of the state before t, or -1 where that is h0.
  FASTARCH_INLINE int64_t before(int64_t t, int64_t n) const {
    if (!p.reverse) return t - 1;
    return t + 1 < p.T && live(t + 1, n) ? t + 1 : -1;
  }
};

// Runs the phases of each step as phase(number, worker, rows, blocks, i), i < steps: by rows, each worker walks its own
// alone; by units, all meet after each phase. `blocks` are vectors of units.
template <class Phase>
void walk(const Team& team, int64_t rows, int64_t blocks, int64_t steps, int phases, const Phase& phase) {
  if (team.split == Split::ROWS) {
    each_worker(team, [&](int64_t worker) {
      const Range mine = part_of(rows, team.size, worker);
      for (int64_t i = 0; i < steps; i++)
        for (int number = 0; number < phases; number++) phase(number, worker, mine, Range{0, blocks}, i);
    });
    return;
  }
  for (int64_t i = 0; i < steps; i++) {
    for (int number = 0; number < phases; number++)
      each_worker(
          team, [&](int64_t worker) { phase(number, worker, Range{0, rows}, part_of(blocks, team.size, worker), i); });
  }
}

}  // namespace
