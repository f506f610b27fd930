// Exponential and normal distribution function, for loops that the compiler vectorises: float32 by polynomials, float64
// by the C library.

#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#include "cpu/simd.h"

namespace megallm::simd {

// e^x of x <= 0, within 2 units in the last place; 0 below -87.7, where float32 would be subnormal. x = n log 2 + r
// with |r| <= log 2 / 2, a polynomial for e^r (minimax, 4e-9; Cody and Waite 1980 for the reduction), times 2^n.
MEGALLM_INLINE float exponential(float x) {
  constexpr float kRound = 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer, which the last bits then hold
  const float bounded = x < -88.0f ? -88.0f : x;
  const float shifted = bounded * 1.44269504f + kRound;
  const float n = shifted - kRound;
  uint32_t bits;
  std::memcpy(&bits, &shifted, sizeof(bits));
  // 2^n, and 0 for n = -127; of a NaN it is some number, which does not matter.
  const uint32_t scale_bits = (bits << 23) + 0x3f800000u;
  float scale;
  std::memcpy(&scale, &scale_bits, sizeof(scale));
  const float r = (bounded - n * 0.693359375f) + n * 2.12194440e-4f;
  // Sums of pairs of terms: a chain of one after another would leave the processor waiting.
  const float squared = r * r;
  const float high = 1.3863756e-3f * squared + (8.3675100e-3f * r + 4.1667238e-2f);
  const float p = high * squared + (1.6666535e-1f * r + 0.5f);
  return (p * squared + (r + 1.0f)) * scale;
}

MEGALLM_INLINE double exponential(double x) { return std::exp(x); }

// x sigmoid(y). Nothing overflows: only e^-|y| is computed.
template <typename Accumulator>
MEGALLM_INLINE Accumulator times_sigmoid(Accumulator x, Accumulator y) {
  const Accumulator small = exponential(-std::fabs(y));
  return (y < Accumulator(0) ? x * small : x) / (Accumulator(1) + small);
}

// sigmoid(x), and 1 - sigmoid(x) to full relative accuracy.
template <typename Accumulator>
MEGALLM_INLINE Accumulator sigmoid_and_rest(Accumulator x, Accumulator& rest) {
  const Accumulator small = exponential(-std::fabs(x));
  const Accumulator large_share = Accumulator(1) / (Accumulator(1) + small);
  const Accumulator small_share = small * large_share;
  rest = x < Accumulator(0) ? large_share : small_share;
  return x < Accumulator(0) ? small_share : large_share;
}

// The normal density at x, times sqrt(2 pi).
template <typename Accumulator>
MEGALLM_INLINE Accumulator bell(Accumulator x) {
  return exponential(Accumulator(-0.5) * x * x);
}

// The normal distribution function, given bell(x). The tail is bell(x) times a polynomial in 1 / (1 + |x| / 4), fitted
// to 1.5e-8 of it.
MEGALLM_INLINE float normal_distribution(float x, float bell) {
  const float t = 1.0f / (1.0f + 0.25f * std::fabs(x));
  const float squared = t * t;
  const float fourth = squared * squared;
  const float high = (3.394674599e-2f * t - 1.961774396e-1f) * fourth +
                     ((3.950016841e-1f * t - 3.334695536e-1f) * squared + (3.044871023e-1f * t - 2.038416134e-2f));
  const float p =
      high * fourth + ((1.215679706e-1f * t + 9.482024552e-2f) * squared + (1.002289990e-1f * t - 2.160011557e-5f));
  const float tail = bell * p;
  return x < 0.0f ? tail : 1.0f - tail;
}

MEGALLM_INLINE double normal_distribution(double x, double) { return 0.5 * std::erfc(-x * 0.70710678118654752440); }

}  // namespace megallm::simd
