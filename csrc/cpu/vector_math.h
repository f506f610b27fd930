// Exponential and normal distribution function, for loops that the compiler vectorises: float32 by polynomials, float64
// by the C library.

#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#include "cpu/simd.h"

namespace megallm::simd {

// Within 2 units in the last place, for arguments from -87 to 88; what lies outside counts as the nearer end. x = n log
// 2
// + r with |r| <= log 2 / 2, a polynomial for e^r (Cody and Waite 1980), times 2^n.
MEGALLM_INLINE float exponential(float x) {
  constexpr float kRound = 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer, which the last bits then hold
  float clamped = x > 88.0f ? 88.0f : x;
  clamped = clamped < -87.0f ? -87.0f : clamped;
  const float shifted = clamped * 1.44269504f + kRound;
  const float n = shifted - kRound;
  uint32_t bits;
  std::memcpy(&bits, &shifted, sizeof(bits));
  const uint32_t scale_bits = (bits << 23) + 0x3f800000u;  // 2^n; of a NaN it is some number, which does not matter
  float scale;
  std::memcpy(&scale, &scale_bits, sizeof(scale));
  const float r = (clamped - n * 0.693359375f) + n * 2.12194440e-4f;
  float p = 1.9875691500e-4f;
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  return (p * (r * r) + r + 1.0f) * scale;
}

MEGALLM_INLINE double exponential(double x) { return std::exp(x); }

// exp(x) of what the largest was taken away from. What is too small for float32 is 0, as that of -inf is.
template <typename Accumulator>
MEGALLM_INLINE Accumulator exponential_below_largest(Accumulator x) {
  const Accumulator result = exponential(x);
  return x < Accumulator(-87) ? Accumulator(0) : result;
}

template <typename Accumulator>
MEGALLM_INLINE Accumulator sigmoid(Accumulator x) {
  return Accumulator(1) / (Accumulator(1) + exponential(-x));
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
  float p = 3.394674599e-2f;
  p = p * t - 1.961774396e-1f;
  p = p * t + 3.950016841e-1f;
  p = p * t - 3.334695536e-1f;
  p = p * t + 3.044871023e-1f;
  p = p * t - 2.038416134e-2f;
  p = p * t + 1.215679706e-1f;
  p = p * t + 9.482024552e-2f;
  p = p * t + 1.002289990e-1f;
  p = p * t - 2.160011557e-5f;
  const float tail = bell * p;
  return x < 0.0f ? tail : 1.0f - tail;
}

MEGALLM_INLINE double normal_distribution(double x, double) { return 0.5 * std::erfc(-x * 0.70710678118654752440); }

}  // namespace megallm::simd
