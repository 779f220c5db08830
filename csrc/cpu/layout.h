// Copies between layouts. Kernels compute on channels-last tiles of their own; these copies are all it takes to serve
// contiguous, channels-last and sliced tensors, and every element type, alike.
#pragma once

#include "cpu/storage.h"

namespace {

// The lanes in which a copy converts and transposes.
template <class To, class From>
struct LaneOf {
  typedef float type;
};
template <>
struct LaneOf<double, double> {
  typedef double type;
};
template <>
struct LaneOf<uint8_t, uint8_t> {
  typedef int32_t type;
};
template <class From>
struct LaneOf<uint8_t, From> {
  typedef From type;
};

template <class To, class From>
FASTARCH_INLINE Vec<To> load_as(const From* p, int64_t n) {
  if constexpr (sizeof(To) == sizeof(From)) {
    return n >= LANES<To> ? load((const To*)p) : load_first((const To*)p, n);
  } else {
    From full[LANES<To>] = {};
    if (n < LANES<To>) {
      for (int64_t i = 0; i < n; i++) full[i] = p[i];
      p = full;
    }
    Vec<To> v;
    for (int i = 0; i < LANES<To>; i++) v[i] = Convert<To, From>::from(p[i]);
    return v;
  }
}

template <class To, class From>
FASTARCH_INLINE void store_as(To* p, Vec<From> v, int64_t n) {
  if constexpr (sizeof(To) == sizeof(From)) {
    n >= LANES<From> ? store((From*)p, v) : store_first((From*)p, v, n);
  } else {
    To full[LANES<From>];
    for (int i = 0; i < LANES<From>; i++) full[i] = Convert<To, From>::from(v[i]);
    if (n >= LANES<From>) {
      memcpy(p, full, sizeof(full));
    } else {
      for (int64_t i = 0; i < n; i++) p[i] = full[i];
    }
  }
}

template <class To, class From>
FASTARCH_INLINE void copy_row(To* to, const From* from, int64_t n) {
  using Lane = typename LaneOf<To, From>::type;
  for (int64_t i = 0; i < n; i += LANES<Lane>) store_as<To, Lane>(to + i, load_as<Lane>(from + i, n - i), n - i);
}

// to[j][i] = from[i][j] for rows i < L, columns j < L of lanes; only the first `rows` and `columns` exist.
template <class To, class From>
FASTARCH_INLINE void copy_transposed(To* to, int64_t to_step, const From* from, int64_t from_step, int64_t rows,
                                     int64_t columns) {
  using Lane = typename LaneOf<To, From>::type;
  constexpr int L = LANES<Lane>;
  Vec<Lane> v[L];
#pragma GCC unroll 16
  for (int i = 0; i < L; i++) v[i] = i < rows ? load_as<Lane>(from + i * from_step, columns) : Vec<Lane>{};
  transpose<Lane>(v);
#pragma GCC unroll 16
  for (int j = 0; j < L; j++) {
    if (j < columns) store_as<To, Lane>(to + j * to_step, v[j], rows);
  }
}

// Where element (i, j) of a 2-D block stands: i * this.i + j * this.j.
struct Steps {
  int64_t i, j;
};

// to(i, j) = from(i, j), i < ni, j < nj. Fast where both sides have a step of 1, along the same axis or not.
template <class To, class From>
void copy_block(To* to, Steps t, const From* from, Steps f, int64_t ni, int64_t nj) {
  constexpr int L = LANES<typename LaneOf<To, From>::type>;
  if (nj == 1 || (t.j != 1 && t.i == 1)) {  // let j be the axis along which the destination is contiguous
    t = {t.j, t.i}, f = {f.j, f.i};
    const int64_t n = ni;
    ni = nj, nj = n;
  }
  if (t.j == 1 && f.j == 1) {
    for (int64_t i = 0; i < ni; i++) copy_row(to + i * t.i, from + i * f.i, nj);
  } else if (t.j == 1 && f.i == 1 && 4 * ni * nj >= L * L) {
    for (int64_t j = 0; j < nj; j += L) {
      for (int64_t i = 0; i < ni; i += L) {
        if (nj - j >= L && ni - i >= L) {
          copy_transposed(to + i * t.i + j, t.i, from + i + j * f.j, f.j, L, L);
        } else {
          copy_transposed(to + i * t.i + j, t.i, from + i + j * f.j, f.j, nj - j, ni - i);
        }
      }
    }
  } else {
    for (int64_t i = 0; i < ni; i++) {
      for (int64_t j = 0; j < nj; j++) to[i * t.i + j * t.j] = Convert<To, From>::from(from[i * f.i + j * f.j]);
    }
  }
}

}  // namespace
