// Vectors of 2^x, for scores that are kept in units of log 2. (activation.h has e^x, whose argument is cut exactly.)
#pragma once

#include "cpu/simd.h"

namespace {

constexpr double LOG2_E = 1.4426950408889634, LN_2 = 0.6931471805599453;

// 2^x = 2^n (1 + r q(r)), n the integer nearest to x, |r| <= 1/2. q by weighted minimax: 1 + r q(r) is off by 2e-9 of
// itself for float, 3e-18 for double, so that what is left is rounding.
template <class T>
struct PowerOfTwo;
template <>
struct PowerOfTwo<float> {
  static constexpr int TERMS = 6, MANTISSA = 23;
  static constexpr float LEAST = -126, SHIFT = 0x1.8p23f + 127;  // x + SHIFT ends in the bits of n + 127
  static constexpr float Q[TERMS] = {6.93147202855128822e-01f, 2.40226479136196101e-01f, 5.55033247102648078e-02f,
                                     9.61843735829936195e-03f, 1.33988744455557263e-03f, 1.53533618149787572e-04f};
};
template <>
struct PowerOfTwo<double> {
  static constexpr int TERMS = 11, MANTISSA = 52;
  static constexpr double LEAST = -1022, SHIFT = 0x1.8p52 + 1023;
  static constexpr double Q[TERMS] = {6.93147180559945326e-01, 2.40226506959101314e-01, 5.55041086648200705e-02,
                                      9.61812910759408178e-03, 1.33335581467775888e-03, 1.54035304571574564e-04,
                                      1.52527334903280164e-05, 1.32154352617178404e-06, 1.01782007290463222e-07,
                                      7.07378643185668504e-09, 4.43459711086492551e-10};
};

// 2^x for x <= 127 (1023): at most 1 unit off; 0 where that would be subnormal, NaN for NaN.
template <class T>
FASTARCH_INLINE Vec<T> exp2(Vec<T> x) {
  using E = PowerOfTwo<T>;
  const Vec<T> shifted = x + E::SHIFT, r = x - (shifted - E::SHIFT);
  Vec<T> q = splat<T>(E::Q[E::TERMS - 1]);
#pragma GCC unroll 16
  for (int i = E::TERMS - 2; i >= 0; i--) q = q * r + E::Q[i];
  const Vec<T> scale = (Vec<T>)((Vec<IntOf<T>>)shifted << E::MANTISSA);
  const Vec<T> y = scale * (r * q) + scale;
  return x < E::LEAST ? Vec<T>{} : y;
}

}  // namespace
