// The register-blocked product that every matrix-like kernel ends in.
#pragma once

#include "cpu/simd.h"

namespace {

// Rows of the largest block: with 2 vectors of columns its accumulators, their two factors and a broadcast fill the
// registers (24 + 2 + 1 of 32, or 12 + 2 + 1 of 16).
constexpr int PRODUCT_ROWS = VECTOR_REGISTERS == 32 ? 12 : 6;

// Two neighbouring floats, which alternate in a vector when they are broadcast.
typedef int64_t __attribute__((may_alias)) Pair;

template <class T>
FASTARCH_INLINE T broadcast(T x) {
  return x;  // as a scalar operand, which the vector extensions broadcast
}
FASTARCH_INLINE Vec<float> broadcast(Pair x) { return (Vec<float>)splat<int64_t>(x); }

// acc[p][v] += sum_i x[offset(p) + i * STEP] * w[v * w_step + i * L .. + L], i < n: the rows p broadcast against
// vectors v. Where rows are few their broadcasts stay in registers, and each vector is used as it is loaded.
template <int P, int V, class T, int STEP = 1, class X, class Offset>
FASTARCH_INLINE void multiply_add(Vec<T> (&acc)[P][V], const X* x, Offset offset, const T* w, int64_t w_step,
                                  int64_t n) {
  for (int64_t i = 0; i < n; i++) {
    if constexpr (P <= 2 && V > 2) {
      Vec<T> row[P];
#pragma GCC unroll 2
      for (int p = 0; p < P; p++) row[p] = splat<T>(x[offset(p) + i * STEP]);
#pragma GCC unroll 6
      for (int v = 0; v < V; v++) {
        const Vec<T> factor = load(w + v * w_step + i * LANES<T>);
#pragma GCC unroll 2
        for (int p = 0; p < P; p++) acc[p][v] += factor * row[p];
      }
      continue;
    }
    Vec<T> factor[V];
#pragma GCC unroll 6
    for (int v = 0; v < V; v++) factor[v] = load(w + v * w_step + i * LANES<T>);
#pragma GCC unroll 12
    for (int p = 0; p < P; p++) {
#pragma GCC unroll 6
      for (int v = 0; v < V; v++) acc[p][v] += factor[v] * broadcast(x[offset(p) + i * STEP]);
    }
  }
}

// Rows a step apart.
FASTARCH_INLINE auto every(int64_t step) {
  return [step](int64_t p) { return p * step; };
}

// Rows of the next block when n are left: blocks of nearly equal size, since a small one cannot hide the latency.
FASTARCH_INLINE int64_t balanced_rows(int64_t n, int64_t most = PRODUCT_ROWS) {
  const int64_t blocks = (n + most - 1) / most;
  return (n + blocks - 1) / blocks;
}

}  // namespace
