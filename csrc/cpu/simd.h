// Short vectors over the GCC and Clang vector extensions: Vec<T> fills one register of the instruction set that this
// translation unit is compiled for. Everything sits in an anonymous namespace: a function that two instruction sets
// shared by name could be linked from the wrong one and crash older machines (pytorch#32724).
#pragma once

#include <stdint.h>
#include <string.h>

#if defined(__SSE2__)
#include <immintrin.h>
#endif

#define FASTARCH_INLINE inline __attribute__((always_inline))
// For lambdas: sizes that they are given are constants where they are inlined.
#define FASTARCH_INLINED __attribute__((always_inline))

namespace {

#if defined(__AVX512F__)
constexpr int VECTOR_BYTES = 64, VECTOR_REGISTERS = 32;
#elif defined(__AVX2__)
constexpr int VECTOR_BYTES = 32, VECTOR_REGISTERS = 16;
#elif defined(__aarch64__)
constexpr int VECTOR_BYTES = 16, VECTOR_REGISTERS = 32;
#else
constexpr int VECTOR_BYTES = 16, VECTOR_REGISTERS = 16;
#endif

template <class T>
constexpr int LANES = VECTOR_BYTES / sizeof(T);

template <class T>
struct VectorOf {
  typedef T type __attribute__((vector_size(VECTOR_BYTES)));
  typedef T unaligned __attribute__((vector_size(VECTOR_BYTES), aligned(1), may_alias));
};
template <class T>
using Vec = typename VectorOf<T>::type;

// The integer as wide as T: comparisons of Vec<T> give Vec<IntOf<T>>, all bits set where true.
template <int BYTES>
struct IntOfSize;
template <>
struct IntOfSize<4> {
  typedef int32_t type;
  typedef uint32_t without_sign;
};
template <>
struct IntOfSize<8> {
  typedef int64_t type;
  typedef uint64_t without_sign;
};
template <class T>
using IntOf = typename IntOfSize<sizeof(T)>::type;
template <class T>
using UnsignedOf = typename IntOfSize<sizeof(T)>::without_sign;

template <class T>
FASTARCH_INLINE Vec<T> load(const T* p) {
  return *reinterpret_cast<const typename VectorOf<T>::unaligned*>(p);
}

template <class T>
FASTARCH_INLINE void store(T* p, Vec<T> v) {
  *reinterpret_cast<typename VectorOf<T>::unaligned*>(p) = v;
}

// Past the caches, to an address that is a multiple of the vector's size; fence_streams() before other threads read it.
template <class T>
FASTARCH_INLINE void stream(T* p, Vec<T> v) {
#if defined(__AVX512F__)
  _mm512_stream_si512((__m512i*)p, (__m512i)v);
#elif defined(__AVX2__)
  _mm256_stream_si256((__m256i*)p, (__m256i)v);
#elif defined(__SSE2__)
  _mm_stream_si128((__m128i*)p, (__m128i)v);
#else
  store(p, v);
#endif
}

FASTARCH_INLINE void fence_streams() {
#if defined(__SSE2__)
  _mm_sfence();
#endif
}

// Asks for n elements that will be needed soon, for the L2 cache. They need not exist: nothing faults.
template <class T>
FASTARCH_INLINE void fetch(const T* p, int64_t n) {
  for (int64_t i = 0; i < n; i += 64 / int64_t(sizeof(T))) __builtin_prefetch(p + i, 0, 2);
}

// The first n < LANES<T> lanes; the others are 0 when loaded and stay untouched when stored.
template <class T>
FASTARCH_INLINE Vec<T> load_first(const T* p, int64_t n) {
#if defined(__AVX512F__)
  if constexpr (sizeof(T) == 4) return (Vec<T>)_mm512_maskz_loadu_epi32((1u << n) - 1, p);
  if constexpr (sizeof(T) == 8) return (Vec<T>)_mm512_maskz_loadu_epi64((1u << n) - 1, p);
#endif
  Vec<T> v = {};
  memcpy(&v, p, n * sizeof(T));
  return v;
}

template <class T>
FASTARCH_INLINE void store_first(T* p, Vec<T> v, int64_t n) {
#if defined(__AVX512F__)
  if constexpr (sizeof(T) == 4) return _mm512_mask_storeu_epi32(p, (1u << n) - 1, (__m512i)v);
  if constexpr (sizeof(T) == 8) return _mm512_mask_storeu_epi64(p, (1u << n) - 1, (__m512i)v);
#endif
  memcpy(p, &v, n * sizeof(T));
}

template <class T>
FASTARCH_INLINE Vec<T> splat(T x) {
  return x - Vec<T>{};  // minus 0 changes nothing, not even -0, and compilers drop it
}

// The lower (HIGH = 0) or upper half of a0 b0 a1 b1 a2 b2 ...
template <int HIGH, class T>
FASTARCH_INLINE Vec<T> interleave(Vec<T> a, Vec<T> b) {
  constexpr int L = LANES<T>;
  Vec<IntOf<T>> from;
  for (int i = 0; i < L; i++) from[i] = HIGH * L / 2 + i / 2 + (i % 2) * L;
#if defined(__clang__)
  Vec<T> r;
  for (int i = 0; i < L; i++) r[i] = from[i] < L ? a[from[i]] : b[from[i] - L];  // folds to one shuffle
  return r;
#else
  return __builtin_shuffle(a, b, from);
#endif
}

// a0 a2 a4 ... a1 a3 a5 ...: the inverse of interleaving a vector's halves.
template <class T>
FASTARCH_INLINE Vec<T> deinterleave(Vec<T> a) {
  constexpr int L = LANES<T>;
#if defined(__clang__)
  Vec<T> r;
  for (int i = 0; i < L; i++) r[i] = a[i % (L / 2) * 2 + i / (L / 2)];
  return r;
#else
  Vec<IntOf<T>> from;
  for (int i = 0; i < L; i++) from[i] = i % (L / 2) * 2 + i / (L / 2);
  return __builtin_shuffle(a, from);
#endif
}

// Rows to columns: v[i][j] becomes v[j][i]. log2(L) rounds, each of which interleaves row i with row i + L/2.
template <class T>
FASTARCH_INLINE void transpose(Vec<T> (&v)[LANES<T>]) {
  constexpr int L = LANES<T>;
#pragma GCC unroll 4
  for (int round = 1; round < L; round *= 2) {
    Vec<T> t[L];
#pragma GCC unroll 16
    for (int i = 0; i < L / 2; i++) {
      t[2 * i] = interleave<0, T>(v[i], v[i + L / 2]);
      t[2 * i + 1] = interleave<1, T>(v[i], v[i + L / 2]);
    }
#pragma GCC unroll 16
    for (int i = 0; i < L; i++) v[i] = t[i];
  }
}

// The lowest bits of 8 bytes, side by side.
FASTARCH_INLINE uint64_t gather_bits(uint64_t word) { return (word & 0x0101010101010101u) * 0x0102040810204080u >> 56; }

// Bit i is set where bytes[i] == value, i < 64.
FASTARCH_INLINE uint64_t bytes_equal_to(const uint8_t* bytes, uint8_t value) {
#if defined(__AVX512BW__)
  return _mm512_cmpeq_epi8_mask(_mm512_loadu_si512(bytes), _mm512_set1_epi8(char(value)));
#else
  uint64_t mask = 0;
  for (int i = 0; i < 8; i++) {
    uint64_t word;
    memcpy(&word, bytes + 8 * i, 8);
    word ^= value * 0x0101010101010101u;                                      // equal bytes are 0 now
    const uint64_t low = (word & 0x7f7f7f7f7f7f7f7fu) + 0x7f7f7f7f7f7f7f7fu;  // bit 7: any of the low 7 is set
    mask |= gather_bits(~(low | word) >> 7) << (8 * i);
  }
  return mask;
#endif
}

// Bit i is set where bytes[i] has the given bit, i < 64.
FASTARCH_INLINE uint64_t bytes_with_bit(const uint8_t* bytes, int bit) {
#if defined(__AVX512BW__)
  return _mm512_test_epi8_mask(_mm512_loadu_si512(bytes), _mm512_set1_epi8(char(1 << bit)));
#else
  uint64_t mask = 0;
  for (int i = 0; i < 8; i++) {
    uint64_t word;
    memcpy(&word, bytes + 8 * i, 8);
    mask |= gather_bits(word >> bit) << (8 * i);
  }
  return mask;
#endif
}

}  // namespace
