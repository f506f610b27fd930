// Exponential and normal distribution function, for loops that the compiler vectorises: float32 by polynomials, float64
// by the C library.

#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#include "cpu/simd.h"

namespace megallm::simd {

// Functions with kShort are for results that are rounded to 16 bits: polynomials with fewer terms, 2.2e-5 of the result
// wrong at most, where the rounding of float16 takes up to 4.9e-4 and that of bfloat16 eight times as much.

// e^x of -88 <= x <= 0, within 2 units in the last place; 0 below -87.7, where float32 would be subnormal. x = n log 2
// + r with |r| <= log 2 / 2, a polynomial for e^r (minimax, 4e-9 and 3e-6; Cody and Waite 1980 for the reduction),
// times 2^n.
template <bool kShort>
MEGALLM_INLINE float bounded_exponential(float x) {
  // 1.5 * 2^23 + 127: adding it rounds to an integer, and the last bits are then the exponent of 2^n.
  constexpr float kRound = 12583039.0f;
  const float shifted = x * 1.44269504f + kRound;
  const float n = shifted - kRound;
  uint32_t bits;
  std::memcpy(&bits, &shifted, sizeof(bits));
  // 2^n, and 0 for n = -127; of a NaN it is some number, which does not matter.
  const uint32_t scale_bits = bits << 23;
  float scale;
  std::memcpy(&scale, &scale_bits, sizeof(scale));
  if constexpr (kShort) {
    const float r = x - n * 0.693147181f;
    const float p = ((4.1513682e-2f * r + 1.6787592e-1f) * r + 5.0003022e-1f) * r + 9.9996680e-1f;
    return (p * r + 1.0f) * scale;
  }
  const float r = (x - n * 0.693359375f) + n * 2.12194440e-4f;
  // Sums of pairs of terms: a chain of one after another would leave the processor waiting.
  const float squared = r * r;
  const float high = 1.3863756e-3f * squared + (8.3675100e-3f * r + 4.1667238e-2f);
  const float p = high * squared + (1.6666535e-1f * r + 0.5f);
  return (p * squared + (r + 1.0f)) * scale;
}

// e^x of x <= 0; of a NaN a NaN.
MEGALLM_INLINE float exponential(float x) { return bounded_exponential<false>(x < -88.0f ? -88.0f : x); }
MEGALLM_INLINE double exponential(double x) { return std::exp(x); }

// e^-x of x >= 0; of a NaN some number. Bounding the bits takes one instruction, bounding the number, which must keep
// NaNs, four.
template <bool kShort>
MEGALLM_INLINE float decay(float x) {
  constexpr int32_t kLargest = 0x42b00000;  // 88
  int32_t bits;
  std::memcpy(&bits, &x, sizeof(bits));
  bits = bits < kLargest ? bits : kLargest;
  std::memcpy(&x, &bits, sizeof(x));
  return bounded_exponential<kShort>(-x);
}

template <bool>
MEGALLM_INLINE double decay(double x) {
  return std::exp(-x);
}

// x sigmoid(y), for a y that is no NaN unless x is one. Nothing overflows: only e^-|y| is computed.
template <bool kShort, typename Accumulator>
MEGALLM_INLINE Accumulator times_sigmoid(Accumulator x, Accumulator y) {
  const Accumulator small = decay<kShort>(std::fabs(y));
  return (y < Accumulator(0) ? x * small : x) / (Accumulator(1) + small);
}

// sigmoid(x), and 1 - sigmoid(x) to full relative accuracy; of a NaN some numbers.
template <bool kShort, typename Accumulator>
MEGALLM_INLINE Accumulator sigmoid_and_rest(Accumulator x, Accumulator& rest) {
  const Accumulator small = decay<kShort>(std::fabs(x));
  const Accumulator large_share = Accumulator(1) / (Accumulator(1) + small);
  const Accumulator small_share = small * large_share;
  rest = x < Accumulator(0) ? large_share : small_share;
  return x < Accumulator(0) ? small_share : large_share;
}

// The normal density at x, times sqrt(2 pi); of a NaN some number.
template <bool kShort, typename Accumulator>
MEGALLM_INLINE Accumulator bell(Accumulator x) {
  return decay<kShort>(Accumulator(0.5) * (x * x));
}

// The tail of the normal distribution beyond x >= 0, given bell(x): that times a polynomial in 1 / (1 + c x), fitted to
// 1.5e-8 of it or, with another c, to 1.1e-5.
template <bool kShort>
MEGALLM_INLINE float normal_tail(float x, float bell) {
  const float t = 1.0f / (1.0f + (kShort ? 0.36f : 0.25f) * x);
  if constexpr (kShort) {
    const float high = (-9.9093065e-2f * t + 2.559129e-1f) * t + 3.360477e-2f;
    return bell * (((high * t + 1.6939282e-1f) * t + 1.3997538e-1f) * t + 2.0299613e-4f);
  }
  const float squared = t * t;
  const float fourth = squared * squared;
  const float high = (3.394674599e-2f * t - 1.961774396e-1f) * fourth +
                     ((3.950016841e-1f * t - 3.334695536e-1f) * squared + (3.044871023e-1f * t - 2.038416134e-2f));
  const float low = (1.215679706e-1f * t + 9.482024552e-2f) * squared + (1.002289990e-1f * t - 2.160011557e-5f);
  return bell * (high * fourth + low);
}

template <bool>
MEGALLM_INLINE double normal_tail(double x, double) {
  return 0.5 * std::erfc(x * 0.70710678118654752440);
}

}  // namespace megallm::simd
