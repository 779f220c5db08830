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

// What a copy does with a vector of n lanes before it stores them at `to`: nothing.
struct AsItIs {
  static constexpr bool COPIES = true;
  template <class V, class To>
  FASTARCH_INLINE V operator()(V v, const To*, int64_t) const {
    return v;
  }
};

// to[j][i] = from[i][j] for rows i < L, columns j < L of lanes; only the first `rows` and `columns` exist.
template <class To, class From, class Finish = AsItIs>
FASTARCH_INLINE void copy_transposed(To* to, int64_t to_step, const From* from, int64_t from_step, int64_t rows,
                                     int64_t columns, const Finish& finish = {}) {
  using Lane = typename LaneOf<To, From>::type;
  constexpr int L = LANES<Lane>;
  Vec<Lane> v[L];
#pragma GCC unroll 16
  for (int i = 0; i < L; i++) v[i] = i < rows ? load_as<Lane>(from + i * from_step, columns) : Vec<Lane>{};
  transpose<Lane>(v);
#pragma GCC unroll 16
  for (int j = 0; j < L; j++) {
    if (j < columns) store_as<To, Lane>(to + j * to_step, finish(v[j], to + j * to_step, rows), rows);
  }
}

template <class To, class From, class Finish = AsItIs>
FASTARCH_INLINE void copy_row(To* to, const From* from, int64_t n, const Finish& finish = {}) {
  using Lane = typename LaneOf<To, From>::type;
  for (int64_t i = 0; i < n; i += LANES<Lane>)
    store_as<To, Lane>(to + i, finish(load_as<Lane>(from + i, n - i), to + i, n - i), n - i);
}

// Where element (i, j) of a 2-D block stands: i * this.i + j * this.j.
struct Steps {
  int64_t i, j;
};

// to(i, j) = from(i, j), i < ni, j < nj. Fast where both sides have a step of 1, along the same axis or not.
template <class To, class From, class Finish = AsItIs>
void copy_block(To* to, Steps t, const From* from, Steps f, int64_t ni, int64_t nj, const Finish& finish = {}) {
  using Lane = typename LaneOf<To, From>::type;
  constexpr int L = LANES<Lane>;
  if (nj == 1 || (t.j != 1 && t.i == 1)) {  // let j be the axis along which the destination is contiguous
    t = {t.j, t.i}, f = {f.j, f.i};
    const int64_t n = ni;
    ni = nj, nj = n;
  }
  if (t.j == 1 && f.j == 1) {
    for (int64_t i = 0; i < ni; i++) copy_row(to + i * t.i, from + i * f.i, nj, finish);
  } else if (t.j == 1 && f.i == 1 && 4 * ni * nj >= L * L) {
    for (int64_t j = 0; j < nj; j += L) {
      for (int64_t i = 0; i < ni; i += L) {
        if (nj - j >= L && ni - i >= L) {
          copy_transposed(to + i * t.i + j, t.i, from + i + j * f.j, f.j, L, L, finish);
        } else {
          copy_transposed(to + i * t.i + j, t.i, from + i + j * f.j, f.j, nj - j, ni - i, finish);
        }
      }
    }
  } else {
    for (int64_t i = 0; i < ni; i++) {
      for (int64_t j = 0; j < nj; j++) {
        To* const at = to + i * t.i + j * t.j;
        const From* const element = from + i * f.i + j * f.j;
        if constexpr (Finish::COPIES) {
          *at = Convert<To, From>::from(*element);
        } else {
          store_as<To, Lane>(at, finish(load_as<Lane>(element, 1), at, 1), 1);
        }
      }
    }
  }
}

}  // namespace
