// Units of 16 elements: what the kernels of batch_norm load, compute and store at once, and two bytes of a mask.
#pragma once

#include "cpu/batch_norm.h"
#include "cpu/layout.h"

namespace {

constexpr int UNIT = 16;

template <class T>
struct Unit {
  static constexpr int VECTORS = UNIT / LANES<T>;
  Vec<T> v[VECTORS];
};

// n = UNIT is known where units are whole; of others only the first n elements exist, and the rest are 0.
template <class T, class Storage>
FASTARCH_INLINE Unit<T> load_unit(const Storage* p, int64_t n) {
  Unit<T> u;
#pragma GCC unroll 8
  for (int i = 0; i < u.VECTORS; i++) {
    const int64_t left = n - i * LANES<T>;
    u.v[i] = left > 0 ? load_as<T>(p + i * LANES<T>, left) : Vec<T>{};
  }
  return u;
}

template <class T, class Storage>
FASTARCH_INLINE void store_unit(Storage* p, const Unit<T>& u, int64_t n) {
#pragma GCC unroll 8
  for (int i = 0; i < u.VECTORS; i++) {
    const int64_t left = n - i * LANES<T>;
    if (left > 0) store_as<Storage, T>(p + i * LANES<T>, u.v[i], left);
  }
}

template <class T, class Storage>
FASTARCH_INLINE void store_unit(Storage* p, const Unit<T>& u, int64_t n, bool past_caches) {
  if constexpr (sizeof(T) == sizeof(Storage)) {
    if (past_caches) {
#pragma GCC unroll 8
      for (int i = 0; i < u.VECTORS; i++) stream((T*)p + i * LANES<T>, u.v[i]);
      return;
    }
  }
  store_unit(p, u, n);
}

template <class T>
FASTARCH_INLINE Unit<T> splat_unit(T x) {
  Unit<T> u;
#pragma GCC unroll 8
  for (int i = 0; i < u.VECTORS; i++) u.v[i] = splat<T>(x);
  return u;
}

// Calls f(i) for each vector of a unit.
template <class T, class F>
FASTARCH_INLINE void each_vector(const F& f) {
#pragma GCC unroll 8
  for (int i = 0; i < Unit<T>::VECTORS; i++) f(i);
}

template <class V, V VALUE>
struct Known {
  static constexpr V value = VALUE;
};
using Yes = Known<bool, true>;
using No = Known<bool, false>;

// Calls f(offset, n) for the units of a row; n is a constant UNIT for all but the last.
template <class F>
FASTARCH_INLINE void each_unit(int64_t begin, int64_t end, const F& f) {
  int64_t i = begin;
  for (; i + UNIT <= end; i += UNIT) f(i, UNIT);
  if (i < end) f(i, end - i);
}

// 1 << lane, for the lanes of vector i of a unit.
template <class T>
FASTARCH_INLINE Vec<IntOf<T>> lane_bits(int i) {
  Vec<IntOf<T>> bits;
  for (int j = 0; j < LANES<T>; j++) bits[j] = IntOf<T>(1) << (i * LANES<T> + j);
  return bits;
}

// v where the bit of its lane is set, 0 elsewhere.
template <class T>
FASTARCH_INLINE Vec<T> where_bits(uint32_t bits, int i, Vec<T> v) {
  const Vec<IntOf<T>> lanes = lane_bits<T>(i);
  return (Vec<T>)((Vec<IntOf<T>>)v & ((splat<IntOf<T>>(IntOf<T>(bits)) & lanes) == lanes));
}

FASTARCH_INLINE uint32_t load_bits(const uint8_t* p, int64_t n) { return n > 8 ? p[0] | uint32_t(p[1]) << 8 : p[0]; }

FASTARCH_INLINE void store_bits(uint8_t* p, uint32_t bits, int64_t n) {
  if (n < UNIT) bits &= (1u << n) - 1;
  p[0] = uint8_t(bits);
  if (n > 8) p[1] = uint8_t(bits >> 8);
}

// The elements that pass ReLU: all but those <= 0, so that NaN passes.
template <class T>
FASTARCH_INLINE Vec<IntOf<T>> passes(Vec<T> z) {
  return ~(Vec<IntOf<T>>)(z <= Vec<T>{});
}

// The lowest LANES bits: bit j is set where lane j of a comparison is.
template <class T>
FASTARCH_INLINE uint32_t bits_of_lanes(Vec<IntOf<T>> lanes) {
#if defined(__AVX512F__)
  if constexpr (sizeof(T) == 4) return _mm512_movepi32_mask((__m512i)lanes);
  if constexpr (sizeof(T) == 8) return _mm512_movepi64_mask((__m512i)lanes);
#elif defined(__AVX2__)
  if constexpr (sizeof(T) == 4) return _mm256_movemask_ps((__m256)lanes);
  if constexpr (sizeof(T) == 8) return _mm256_movemask_pd((__m256d)lanes);
#elif defined(__SSE2__)
  if constexpr (sizeof(T) == 4) return _mm_movemask_ps((__m128)lanes);
  if constexpr (sizeof(T) == 8) return _mm_movemask_pd((__m128d)lanes);
#else
  uint32_t bits = 0;
  for (int j = 0; j < LANES<T>; j++) bits |= uint32_t(lanes[j] & 1) << j;
  return bits;
#endif
}

// (x - mean) * scale + bias, in one way, for the backward has to find the same sign as the forward.
template <class T>
FASTARCH_INLINE Vec<T> normalised(Vec<T> x, Vec<T> mean, Vec<T> scale, Vec<T> bias) {
  return (x - mean) * scale + bias;
}

// What a unit of elements is computed with, lane by lane: dx = scale * dz + (x - mean) * slope + offset.
template <class T>
struct Coefficients {
  Unit<T> mean, scale, bias, slope, offset;
};

FASTARCH_INLINE double rstd(const BatchNorm& p, double var) { return 1 / __builtin_sqrt(var + p.eps); }

// The same for all channels. slope and offset are the backward's.
template <class T>
struct Channels {
  T *mean, *scale, *bias, *slope, *offset;

  static int64_t bytes(const BatchNorm& p) { return 5 * p.C * sizeof(T); }

  Channels(const BatchNorm& p, const void* memory) {
    T* at = static_cast<T*>(const_cast<void*>(memory));
    T** arrays[] = {&mean, &scale, &bias, &slope, &offset};
    for (T** array : arrays) *array = at, at += p.C;
  }

  void prepare(const BatchNorm& p, Affine affine, const void* means, const void* vars, Range c) const {
    const T *weights = static_cast<const T*>(affine.weight), *biases = static_cast<const T*>(affine.bias);
    for (int64_t i = c.begin; i < c.end; i++) {
      const double r = rstd(p, static_cast<const T*>(vars)[i]);
      mean[i] = static_cast<const T*>(means)[i];
      scale[i] = T(weights ? weights[i] * r : r);
      bias[i] = biases ? biases[i] : 0;
    }
  }

  FASTARCH_INLINE Coefficients<T> of_row(int64_t c, int64_t m) const {
    return {load_unit<T>(mean + c, m), load_unit<T>(scale + c, m), load_unit<T>(bias + c, m),
            load_unit<T>(slope + c, m), load_unit<T>(offset + c, m)};
  }
  FASTARCH_INLINE Coefficients<T> of_plane(int64_t c) const {
    return {splat_unit(mean[c]), splat_unit(scale[c]), splat_unit(bias[c]), splat_unit(slope[c]),
            splat_unit(offset[c])};
  }
};

// How many elements further on the memory lies that is worth asking for now: in rows 4 KB, in planes as many planes of
// the same channel. (Sums over 2 x 205 MB on one core: 22.6 ms without, 10.5 with it.) 0 where the caches hold x, and
// asking only costs time: 64x32x14x14 0.072 ms instead of 0.059.
FASTARCH_INLINE int64_t ahead(const BatchNorm& p) {
  constexpr int64_t ELEMENTS = 1024, CACHED = 1 << 20;
  if (p.N * p.C * p.S <= CACHED) return 0;
  return p.rows ? ELEMENTS : ceil_div(ELEMENTS, p.S) * p.C * p.S;
}

template <class Storage>
FASTARCH_INLINE void prefetch(const Storage* p, int64_t next) {
  if (next) __builtin_prefetch(p + next);
}

// Whether y is to be written past the caches: where they cannot hold it anyway, and its units are whole and aligned.
// Then nothing of it is read before it is written. (64x256x56x56, planes, one core: 26.9 ms without, 22.9 with it.)
template <class T, class Storage>
FASTARCH_INLINE bool past_caches(const BatchNorm& p, const Storage* y) {
  constexpr int64_t BYTES = 32 << 20, ALIGNMENT = 64;
  const int64_t row = (p.rows ? p.C : p.S) * sizeof(Storage);
  return sizeof(T) == sizeof(Storage) && p.N * p.C * p.S * int64_t(sizeof(T)) > BYTES &&
         (uintptr_t(y) | row) % ALIGNMENT == 0;
}

// Rows that are summed side by side, so that sums stay in registers for a while: in 64x32x14x14 4 rows take 0.041 ms,
// one 0.062. Long rows are streams of their own, and one at a time is best: 64x512x28x28 with 4 rows 5.2 ms, with
// one 2.6.
FASTARCH_INLINE int64_t rows_together(const BatchNorm& p) {
  constexpr int64_t MOST = 4, ELEMENTS = 512;
  return least(MOST, ceil_div(ELEMENTS, p.C));
}

// Two sums over elements, lane by lane.
template <class T>
struct Sums {
  Unit<T> a, b;

  FASTARCH_INLINE void add(const Sums& other) {
    each_vector<T>([&](int i) FASTARCH_INLINED { a.v[i] += other.a.v[i], b.v[i] += other.b.v[i]; });
  }
};

// Sums over planes of a few channels: small planes of neighbours lie side by side, and one stream of memory serves all.
// Float sums are kept as short as a CHUNK of elements.
// Calls add(sums, channel, element, m, byte of the mask) for all units, and flush(channel, elements before, elements,
// a, b) for every chunk.
template <class T, int64_t CHUNK, class Add, class Flush>
FASTARCH_INLINE void sum_planes(const BatchNorm& p, Range n, Range c, const Add& add, const Flush& flush) {
  constexpr int UNROLL = Unit<T>::VECTORS < 4 ? 4 / Unit<T>::VECTORS : 1;  // chains of additions, to hide their latency
  const int64_t bytes = mask_bytes(p.S);
  Sums<T> sums[CHANNELS_TOGETHER] = {};
  int64_t before = 0, summed = 0;
  const auto flush_all = [&] {
    for (int64_t channel = c.begin; channel < c.end; channel++) {
      Sums<T>& s = sums[channel - c.begin];
      double a = 0, b = 0;
      for (int i = 0; i < UNIT; i++) a += s.a.v[i / LANES<T>][i % LANES<T>], b += s.b.v[i / LANES<T>][i % LANES<T>];
      flush(channel, before, summed, a, b);
      s = {};
    }
    before += summed, summed = 0;
  };
  for (int64_t i = n.begin; i < n.end; i++) {
    for (int64_t begin = 0; begin < p.S; begin += CHUNK) {
      const int64_t end = least(begin + CHUNK, p.S);
      for (int64_t channel = c.begin; channel < c.end; channel++) {
        const int64_t plane = i * p.C + channel;
        Sums<T> wide[UNROLL] = {};
        int64_t s = begin;
        for (; s + UNROLL * UNIT <= end; s += UNROLL * UNIT) {
#pragma GCC unroll 4
          for (int u = 0; u < UNROLL; u++)
            add(wide[u], channel, plane * p.S + s + u * UNIT, UNIT, plane * bytes + (s + u * UNIT) / 8);
        }
        each_unit(s, end, [&](int64_t at, int64_t m) FASTARCH_INLINED {
          add(wide[0], channel, plane * p.S + at, m, plane * bytes + at / 8);
        });
        for (int u = 0; u < UNROLL; u++) sums[channel - c.begin].add(wide[u]);
      }
      if ((summed += end - begin) >= CHUNK) flush_all();
    }
  }
  if (summed) flush_all();
}

// Calls f(coefficients, element, m, byte of the mask) for all units of m elements in a part of some channels.
template <class T, class F>
FASTARCH_INLINE void walk(const BatchNorm& p, const Channels<T>& channels, Range n, Range c, const F& f) {
  const int64_t bytes = mask_bytes(p.rows ? p.C : p.S);
  for (int64_t i = n.begin; i < n.end; i++) {
    if (p.rows) {
      each_unit(c.begin, c.end, [&](int64_t channel, int64_t m) FASTARCH_INLINED {
        f(channels.of_row(channel, m), i * p.C + channel, m, i * bytes + channel / 8);
      });
      continue;
    }
    for (int64_t channel = c.begin; channel < c.end; channel++) {
      const Coefficients<T> k = channels.of_plane(channel);
      const int64_t plane = i * p.C + channel;
      each_unit(0, p.S,
                [&](int64_t s, int64_t m) FASTARCH_INLINED { f(k, plane * p.S + s, m, plane * bytes + s / 8); });
    }
  }
}

}  // namespace
