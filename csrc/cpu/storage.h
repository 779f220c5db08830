// Element types in memory and the type that kernels compute in: float32 and float64 in their own, the 16-bit types in
// float32. Conversions are plain integer arithmetic, which compilers vectorise at every instruction set.
#pragma once

#include "cpu/simd.h"

namespace {

struct BFloat16 {
  uint16_t bits;
};
struct Float16 {
  uint16_t bits;
};

template <class Storage>
struct ComputeOf {
  typedef float type;
};
template <>
struct ComputeOf<double> {
  typedef double type;
};
template <class Storage>
using Compute = typename ComputeOf<Storage>::type;

FASTARCH_INLINE uint32_t bits_of(float x) {
  uint32_t bits;
  memcpy(&bits, &x, 4);
  return bits;
}

FASTARCH_INLINE float from_bits(uint32_t bits) {
  float x;
  memcpy(&x, &bits, 4);
  return x;
}

template <class To, class From>
struct Convert {
  static FASTARCH_INLINE To from(From x) { return To(x); }
};

template <>
struct Convert<float, BFloat16> {
  static FASTARCH_INLINE float from(BFloat16 x) { return from_bits(uint32_t(x.bits) << 16); }
};

template <>
struct Convert<BFloat16, float> {  // to nearest, ties to even
  static FASTARCH_INLINE BFloat16 from(float x) {
    const uint32_t bits = bits_of(x);
    const uint32_t rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
    return {uint16_t(x != x ? (bits >> 16) | 0x40 : rounded)};
  }
};

template <>
struct Convert<float, Float16> {
  static FASTARCH_INLINE float from(Float16 x) {
    const uint32_t sign = uint32_t(x.bits & 0x8000) << 16, rest = uint32_t(x.bits & 0x7fff) << 13;
    const uint32_t scaled = bits_of(from_bits(rest) * 0x1p112f);  // moves the exponent's bias from 15 to 127
    return from_bits(sign | scaled | (rest >= 0x0f800000 ? 0x7f800000 : 0));
  }
};

template <>
struct Convert<Float16, float> {  // to nearest, ties to even
  static FASTARCH_INLINE Float16 from(float x) {
    const uint32_t sign = bits_of(x) & 0x80000000, rest = bits_of(x) ^ sign;
    const uint32_t normal = (rest + 0xc8000fff + ((rest >> 13) & 1)) >> 13;
    const uint32_t subnormal = bits_of(from_bits(rest) + 0.5f) - bits_of(0.5f);  // the addition shifts and rounds
    const uint32_t finite = rest < 0x38800000 ? subnormal : normal;
    const uint32_t special = rest > 0x7f800000 ? 0x7e00 : 0x7c00;  // NaN, or beyond the range
    return {uint16_t((sign >> 16) | (rest >= 0x47800000 ? special : finite))};
  }
};

}  // namespace
