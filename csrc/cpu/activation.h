// sigmoid and tanh of vectors, within 2.6 units of the last place in float32 and float64 (tests/test_gru.py, over the
// whole range); NaN stays NaN. Results below the smallest normal number may be off by as much as that.
#pragma once

#include "cpu/simd.h"

namespace {

template <class T>
struct Exponential;
template <>
struct Exponential<float> {
  static constexpr float LEAST = -87.33f, LOG2E = 0x1.715476p+0f, LN2 = 0x1.62e4p-1f, LN2_REST = 0x1.7f7d1cp-20f;
  static constexpr float ROUND = 0x1.8p23f;  // adding it leaves the nearest integer in the lowest bits
  static constexpr int MANTISSA = 23, BIAS = 127;
  static constexpr float TAYLOR[] = {1.0f / 5040, 1.0f / 720, 1.0f / 120, 1.0f / 24, 1.0f / 6, 1.0f / 2};
};
template <>
struct Exponential<double> {
  static constexpr double LEAST = -708.39, LOG2E = 0x1.71547652b82fep+0, LN2 = 0x1.62e42fefa38p-1;
  static constexpr double LN2_REST = 0x1.ef35793c7673p-45, ROUND = 0x1.8p52;
  static constexpr int MANTISSA = 52, BIAS = 1023;
  static constexpr double TAYLOR[] = {1.0 / 6227020800, 1.0 / 479001600, 1.0 / 39916800, 1.0 / 3628800,
                                      1.0 / 362880,     1.0 / 40320,     1.0 / 5040,     1.0 / 720,
                                      1.0 / 120,        1.0 / 24,        1.0 / 6,        1.0 / 2};
};

// exp(x) = scale * (1 + rest) for x <= 0, scale a power of two and |rest| < 0.42 exact where it is small. Apart,
// because exp(x) - 1 = scale * rest + (scale - 1) does not cancel. Below LEAST x counts as that.
template <class T>
struct Parts {
  Vec<T> scale, rest;
};

template <class T>
FASTARCH_INLINE Parts<T> exponential(Vec<T> x) {
  using E = Exponential<T>;
  using Int = IntOf<T>;
  x = x < splat<T>(E::LEAST) ? splat<T>(E::LEAST) : x;  // NaN is not less
  const Vec<T> shifted = x * E::LOG2E + E::ROUND, n = shifted - E::ROUND;
  const Vec<T> r = x - n * E::LN2 - n * E::LN2_REST;
  Vec<T> p = splat<T>(E::TAYLOR[0]);
#pragma GCC unroll 16
  for (int i = 1; i < int(sizeof(E::TAYLOR) / sizeof(T)); i++) p = p * r + E::TAYLOR[i];
  const Vec<Int> scale = ((Vec<Int>)shifted + Int(E::BIAS)) << E::MANTISSA;
  return {(Vec<T>)scale, p * (r * r) + r};
}

template <class T>
FASTARCH_INLINE Vec<IntOf<T>> sign_bits() {
  return (Vec<IntOf<T>>)splat<T>(T(-0.0));
}

template <class T>
FASTARCH_INLINE Vec<T> minus_magnitude(Vec<T> x) {
  return (Vec<T>)((Vec<IntOf<T>>)x | sign_bits<T>());
}

// 1 / (1 + exp(-x)), by the exponential of -|x|, which cannot overflow.
template <class T>
FASTARCH_INLINE Vec<T> sigmoid(Vec<T> x) {
  const Parts<T> e = exponential<T>(minus_magnitude<T>(x));
  const Vec<T> small = e.scale * e.rest + e.scale;
  return (x < Vec<T>{} ? small : splat<T>(1)) / (small + T(1));
}

// (1 - e) / (1 + e), e = exp(-2|x|), with the sign of x; where e is small 1 - 2 e / (1 + e), for 1 - tanh^2 counts the
// error of tanh twice.
template <class T>
FASTARCH_INLINE Vec<T> tanh(Vec<T> x) {
  const Parts<T> parts = exponential<T>(minus_magnitude<T>(x + x));
  const Vec<T> e = parts.scale * parts.rest + parts.scale;
  const Vec<T> m = (T(1) - parts.scale) - parts.scale * parts.rest;  // 1 - e
  const Vec<IntOf<T>> saturates = e < splat<T>(T(0.25));
  const Vec<T> q = (saturates ? e + e : m) / (e + T(1));
  const Vec<T> y = saturates ? T(1) - q : q;
  return (Vec<T>)((Vec<IntOf<T>>)y | ((Vec<IntOf<T>>)x & sign_bits<T>()));
}

}  // namespace
