// What both passes of attention are made of: panels, products of tiles, and what is done to rows of scores.
#pragma once

#include "cpu/activation.h"
#include "cpu/attention.h"
#include "cpu/exponential.h"
#include "cpu/layout.h"
#include "cpu/product.h"
#include "cpu/range.h"

namespace {

constexpr int64_t QUERY_TILE = 48;  // its scores, KEY_TILE wide, take half of L1

// Cuts scratch memory into arrays; without memory it counts.
template <class T>
struct Scratch {
  T* memory;
  int64_t used = 0;

  T* take(int64_t n) {
    T* const at = memory ? memory + used : nullptr;
    used += (n + 63) / 64 * 64;
    return at;
  }
};

// Columns of a panel, which products read side by side.
template <class T>
constexpr int64_t PANEL = 2 * LANES<T>;

template <class T>
FASTARCH_INLINE int64_t padded(int64_t n) {
  return (n + PANEL<T> - 1) / PANEL<T> * PANEL<T>;
}

// Vectors that hold n elements.
template <class T>
FASTARCH_INLINE int64_t vectors_of(int64_t n) {
  return (n + LANES<T> - 1) / LANES<T>;
}

// So many terms are summed one after the other; then such sums are, which keeps rounding from growing with n. 32 would
// halve an error that is torch's own (8e-7 of 197 keys), and cost 4 % forward and backward on two cores of a Xeon.
constexpr int64_t CHAIN = 64;

// Sums side by side of each element, where registers are left: fewer than 8 in all would wait for themselves, and one
// chain had 1.3 to 2.1 times eager's greatest error (one query, 97 keys). How rows are cut depends on shapes alone.
constexpr int side_by_side(int sums) { return 4 * sums <= 2 * PRODUCT_ROWS ? 4 : 2 * sums <= 2 * PRODUCT_ROWS ? 2 : 1; }

// c[r][..] (+)= sum_i x(r, i) w[i][..] for P rows, V vectors; ACROSS: x(r, i) = x[i * step + r], else x[r * step + i].
template <class T, int P, int V, bool ACROSS>
__attribute__((noinline)) void multiply_block(bool add, const T* x, int64_t step, const T* w, T* c, int64_t c_step,
                                              int64_t n) {
  constexpr int SUMS = side_by_side(P * V);
  for (int64_t begin = 0; begin < n; begin += CHAIN, add = true) {
    Vec<T> acc[SUMS][P][V] = {};
    const int64_t end = least(begin + CHAIN, n);
    const auto add_term = [&](Vec<T>(&into)[P][V], int64_t i) FASTARCH_INLINED {
      Vec<T> factor[V];
#pragma GCC unroll 2
      for (int v = 0; v < V; v++) factor[v] = load(w + i * PANEL<T> + v * LANES<T>);
#pragma GCC unroll 12
      for (int p = 0; p < P; p++) {
        const T one = ACROSS ? x[i * step + p] : x[p * step + i];
#pragma GCC unroll 2
        for (int v = 0; v < V; v++) into[p][v] += factor[v] * one;
      }
    };
    int64_t i = begin;
    for (; i + SUMS <= end; i += SUMS) {
#pragma GCC unroll 4
      for (int sum = 0; sum < SUMS; sum++) add_term(acc[sum], i + sum);
    }
    for (; SUMS > 1 && i < end; i++) add_term(acc[0], i);
#pragma GCC unroll 12
    for (int p = 0; p < P; p++) {
#pragma GCC unroll 2
      for (int v = 0; v < V; v++) {
        Vec<T> total = acc[0][p][v];
        if constexpr (SUMS == 2) total += acc[1][p][v];
        if constexpr (SUMS == 4) total = (total + acc[1][p][v]) + (acc[2][p][v] + acc[3][p][v]);
        T* to = c + p * c_step + v * LANES<T>;
        store(to, add ? load(to) + total : total);
      }
    }
  }
}

template <class T, int V, bool ACROSS, int P = PRODUCT_ROWS>
FASTARCH_INLINE void multiply_rows(int64_t rows, bool add, const T* x, int64_t step, const T* w, T* c, int64_t c_step,
                                   int64_t n) {
  if constexpr (P > 1) {
    if (rows < P) return multiply_rows<T, V, ACROSS, P - 1>(rows, add, x, step, w, c, c_step, n);
  }
  multiply_block<T, P, V, ACROSS>(add, x, step, w, c, c_step, n);
}

// The same for any number of rows and vectors: w in panels, `panel_step` apart.
template <bool ACROSS, class T>
void multiply(bool add, int64_t rows, int64_t n, const T* x, int64_t step, const T* w, int64_t panel_step,
              int64_t vectors, T* c, int64_t c_step) {
  const int64_t together = balanced_rows(rows);
  for (int64_t v = 0; v < vectors; v += 2) {
    for (int64_t r = 0; r < rows; r += together) {
      const int64_t m = least(together, rows - r);
      const T* from = x + (ACROSS ? r : r * step);
      T* to = c + r * c_step + v * LANES<T>;
      const T* panel = w + v / 2 * panel_step;
      if (vectors - v >= 2) {
        multiply_rows<T, 2, ACROSS>(m, add, from, step, panel, to, c_step, n);
      } else {
        multiply_rows<T, 1, ACROSS>(m, add, from, step, panel, to, c_step, n);
      }
    }
  }
}

// Rows [n][width] into panels [..][i][PANEL], each of `height` rows; what a panel has beyond width is 0.
template <class T, class Storage>
void pack_rows(const Storage* from, int64_t from_step, int64_t n, int64_t width, T* to, int64_t height) {
  for (int64_t column = 0; column < width; column += PANEL<T>, to += height * PANEL<T>) {
    const int64_t m = least(PANEL<T>, width - column);
    for (int64_t i = 0; i < n; i++) {
      T* row = to + i * PANEL<T>;
      if (m < PANEL<T>) {
        for (int64_t e = m; e < PANEL<T>; e++) row[e] = 0;
      }
      copy_row(row, from + i * from_step + column, m);
    }
  }
}

// The transpose of rows [n][width], times `scale`, into panels [n / PANEL][width][PANEL]; 0 beyond n.
template <class T, class Storage>
void pack_columns(const Storage* from, int64_t from_step, int64_t n, int64_t width, T scale, T* to) {
  constexpr int64_t L = LANES<T>;
  for (int64_t i = 0; i < n; i += PANEL<T>, to += width * PANEL<T>) {
    if (n - i < PANEL<T>) {
      for (int64_t e = 0; e < width * PANEL<T>; e++) to[e] = 0;
    }
    for (int64_t half = 0; half < PANEL<T> && i + half < n; half += L) {
      const Storage* rows = from + (i + half) * from_step;
      const int64_t m = least(L, n - i - half);
      int64_t e = 0;
      if (m == L) {
        for (; e + L <= width; e += L) copy_transposed(to + e * PANEL<T> + half, PANEL<T>, rows + e, from_step, L, L);
      }
      for (; e < width; e += L)
        copy_transposed(to + e * PANEL<T> + half, PANEL<T>, rows + e, from_step, m, least(L, width - e));
    }
    if (scale != 1) {
      for (int64_t e = 0; e < width * PANEL<T>; e += L) store(to + e, load(to + e) * scale);
    }
  }
}

// Rows that products can read: where they are, or converted.
template <class T, class Storage>
struct Rows {
  const T* data;
  int64_t step;

  Rows(const Storage* from, int64_t from_step, int64_t n, int64_t width, T* to) {
    if constexpr (sizeof(T) == sizeof(Storage)) {
      data = (const T*)from, step = from_step;
    } else {
      for (int64_t i = 0; i < n; i++) copy_row(to + i * width, from + i * from_step, width);
      data = to, step = width;
    }
  }
};

// Lane i ^ DISTANCE at lane i. The distance is a template's: from a variable GCC builds the lanes' numbers one by one.
template <int DISTANCE, class T>
FASTARCH_INLINE Vec<T> exchange(Vec<T> v) {
  constexpr int L = LANES<T>;
#if defined(__clang__)
  Vec<T> other;
  for (int i = 0; i < L; i++) other[i] = v[i ^ DISTANCE];
  return other;
#else
  Vec<IntOf<T> > from;
  for (int i = 0; i < L; i++) from[i] = i ^ DISTANCE;
  return __builtin_shuffle(v, from);
#endif
}

// The lanes' sum or maximum, by halves.
template <class T, int HALF = LANES<T> / 2, class Combine>
FASTARCH_INLINE T across(Vec<T> v, Combine combine) {
  const Vec<T> half = combine(v, exchange<HALF, T>(v));
  if constexpr (HALF == 1) {
    return half[0];
  } else {
    return across<T, HALF / 2>(half, combine);
  }
}

template <class T>
FASTARCH_INLINE Vec<T> larger(Vec<T> a, Vec<T> b) {
  return a > b ? a : b;
}

// The keys that query i may attend to.
FASTARCH_INLINE Range reach_of(const Attention& p, const Sequence& s, int64_t i) {
  const int64_t d = i + s.shift;
  return {p.left >= 0 ? most(0, d - p.left) : 0, p.right >= 0 ? least(s.keys, d + p.right + 1) : s.keys};
}

// Which keys of a tile, from a multiple of PANEL on, queries [i, i + n) see any of.
template <class T>
FASTARCH_INLINE Range reach_in_tile(const Attention& p, const Sequence& s, int64_t i, int64_t n, Range tile) {
  const int64_t begin = most(tile.begin, reach_of(p, s, i).begin);
  const int64_t end = least(tile.end, reach_of(p, s, i + n - 1).end);
  return {tile.begin + (begin - tile.begin) / PANEL<T> * PANEL<T>, end};
}

template <class T>
constexpr T INFINITE = T(__builtin_inf());

// -inf where query i may not attend: s holds the scores of n keys (whole vectors) from `first` on.
template <class T>
FASTARCH_INLINE void keep_reach(Range reach, int64_t first, int64_t n, T* s) {
  if (reach.begin <= first && reach.end >= first + n) return;
  for (int64_t j = 0; j < least(n, reach.begin - first); j++) s[j] = -INFINITE<T>;
  for (int64_t j = most(0, reach.end - first); j < n; j++) s[j] = -INFINITE<T>;
}

template <class T, class M>
FASTARCH_INLINE void add_mask(const M* mask, int64_t step, int64_t n, T* s) {
  if (step == 0) {
    const T one = Convert<T, M>::from(*mask) * T(LOG2_E);
    for (int64_t j = 0; j < n; j++) s[j] += one;
  } else {
    for (int64_t j = 0; j < n; j++) s[j] += Convert<T, M>::from(mask[j]) * T(LOG2_E);
  }
}

FASTARCH_INLINE bool modifies_scores(const Attention& p) { return p.softcap > 0 || p.slopes || p.mask_type != NO_MASK; }

// Soft cap, ALiBi and mask on the scores, in units of log 2, of query i and the n keys (whole vectors) from `first` on.
// capped: tanh of the soft cap, for its derivative, or nullptr.
template <class T, class Storage>
void modify_scores(const Attention& p, const Sequence& of, int64_t h, int64_t i, int64_t first, int64_t n, T* s,
                   T* capped) {
  if (p.softcap > 0) {
    const T cap = T(p.softcap * LOG2_E), inverse = T(1 / (p.softcap * LOG2_E));
    for (int64_t j = 0; j < n; j += LANES<T>) {
      const Vec<T> t = tanh<T>(load(s + j) * inverse);
      if (capped) store(capped + j, t);
      store(s + j, t * cap);
    }
  }
  if (p.slopes) {
    const T slope = T(p.slopes[of.b * p.slopes_b + h]) * T(LOG2_E);
    const int64_t distance = first - (i + of.shift);
    for (int64_t j = 0; j < n; j++) s[j] -= slope * T(__builtin_llabs(distance + j));
  }
  if (p.mask_type == NO_MASK) return;
  const int64_t at = of.b * p.mask_b + h * p.mask_h + i * p.mask_i + first * p.mask_j, m = least(n, of.keys - first);
  if (p.mask_type == BOOLEAN) {
    const uint8_t* mask = static_cast<const uint8_t*>(p.mask) + at;
    if (p.mask_j == 1) {  // as vectors
      for (int64_t j = 0; j < m; j++) s[j] = mask[j] ? s[j] : -INFINITE<T>;
    } else if (!*mask) {
      for (int64_t j = 0; j < m; j++) s[j] = -INFINITE<T>;
    }
  } else if (p.mask_type == AS_INPUT) {
    add_mask(static_cast<const Storage*>(p.mask) + at, p.mask_j, m, s);
  } else {
    add_mask(static_cast<const T*>(p.mask) + at, p.mask_j, m, s);
  }
}

// How far a score, in units of log 2, may lie above top: that costs no accuracy, and after its first tile a row hardly
// ever has to be scaled again (Zadouri et al., FlashAttention-4).
constexpr int SLACK = 8;

// s becomes 2^(s - top), top being the largest so far or SLACK below it; sum and output, of `width` elements, were
// added up under the top before and are scaled to the new one.
template <class T>
FASTARCH_INLINE void softmax(int64_t vectors, T* s, T& top, T* sum, T* output, int64_t width) {
  Vec<T> highest = load(s);
  for (int64_t v = 1; v < vectors; v++) highest = larger<T>(highest, load(s + v * LANES<T>));
  const T high = across<T>(highest, larger<T>);
  if (high > top + SLACK) {
    if (top != -INFINITE<T>) {  // else they are 0 still
      const Vec<T> down = exp2<T>(splat<T>(top - high));
      for (int64_t e = 0; e < width; e += LANES<T>) store(output + e, load(output + e) * down);
      store(sum, load(sum) * down);
    }
    top = high;
  }
  const T base = top == -INFINITE<T> ? T(0) : top;  // no key so far: 2^(-inf - 0) is 0
  Vec<T> total = load(sum);
  for (int64_t v = 0; v < vectors; v++) {
    const Vec<T> e = exp2<T>(load(s + v * LANES<T>) - base);
    store(s + v * LANES<T>, e);
    total += e;
  }
  store(sum, total);
}

// The low halves of 64-bit lanes, multiplied to 64 bits.
FASTARCH_INLINE Vec<uint64_t> multiply_wide(Vec<uint64_t> x, uint32_t by) {
#if defined(__AVX512F__)
  return (Vec<uint64_t>)_mm512_maskz_mul_epu32(0xff, (__m512i)x, _mm512_set1_epi64(by));
#elif defined(__AVX2__)
  return (Vec<uint64_t>)_mm256_mul_epu32((__m256i)x, _mm256_set1_epi64x(by));
#else
  return (x & 0xffffffff) * uint64_t(by);
#endif
}

// z of query i and the n keys from `first`, a multiple of 64, on: see fastarch/ref/attention.py.
template <class T>
void dropout_factors(const Attention& p, const Sequence& of, int64_t h, int64_t i, int64_t first, int64_t n, T* z) {
  constexpr int L = LANES<uint64_t>;
  const double bound = p.dropout * 0x1p32 + 0.5;
  const uint32_t threshold = bound >= 0xffffffffu ? 0xffffffffu : uint32_t(bound);
  const T kept = T(1 / (1 - p.dropout));
  for (int64_t j = 0; j < n; j += 64) {
    uint32_t words[64];
    for (int lane = 0; lane < 16; lane += L) {
      Vec<uint64_t> c0 = {}, c1 = splat<uint64_t>(uint32_t(i)), c2 = splat<uint64_t>(uint32_t(of.b * p.H + h)), c3 = {};
      for (int l = 0; l < L; l++) c0[l] = uint32_t((first + j) / 64 * 16 + lane + l);
      uint32_t k0 = uint32_t(p.seed), k1 = uint32_t(p.seed >> 32);
      for (int round = 0; round < 10; round++, k0 += 0x9E3779B9u, k1 += 0xBB67AE85u) {
        const Vec<uint64_t> low0 = multiply_wide(c0, 0xD2511F53u), low1 = multiply_wide(c2, 0xCD9E8D57u);
        c0 = (low1 >> 32) ^ c1 ^ uint64_t(k0), c1 = low1;
        c2 = (low0 >> 32) ^ c3 ^ uint64_t(k1), c3 = low0;
      }
      for (int l = 0; l < L; l++) {
        words[lane + l] = uint32_t(c0[l]), words[16 + lane + l] = uint32_t(c1[l]);
        words[32 + lane + l] = uint32_t(c2[l]), words[48 + lane + l] = uint32_t(c3[l]);
      }
    }
    for (int64_t e = 0; e < least(64, n - j); e++) z[j + e] = words[e] >= threshold ? kept : T(0);
  }
}

}  // namespace
