// The exponential function, written so that loops around it vectorise.

#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#include "cpu/simd.h"

namespace megallm::simd {

// Below 2 units in the last place for results that are not subnormal; smaller ones are 0. NaN stays NaN.
MEGALLM_INLINE float exponential(float x) {
  constexpr float kLargest = 88.72283f;    // above it the result is infinite
  constexpr float kSmallest = -87.33654f;  // below it the result is subnormal
  // x = n ln 2 + r with |r| <= ln(2) / 2. Adding and taking away 1.5 * 2^23 rounds to the nearest integer.
  constexpr float kRound = 12582912.0f;
  const float n = (x * 1.44269504f + kRound) - kRound;
  // ln 2 in two parts, the first of which has so few bits that its product with n is exact.
  const float r = (x - n * 0.693359375f) + n * 2.12194440e-4f;
  // exp(r) on that interval, minimax.
  float p = 1.9875691500e-4f;
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = (p * r) * r + r + 1.0f;
  // 2^n in two factors, since n may be 128.
  const int32_t exponent = static_cast<int32_t>(x > kLargest || x < kSmallest ? 0.0f : n);
  const uint32_t half_bits = static_cast<uint32_t>((exponent >> 1) + 127) << 23;
  const uint32_t rest_bits = static_cast<uint32_t>((exponent - (exponent >> 1)) + 127) << 23;
  float half, rest;
  std::memcpy(&half, &half_bits, sizeof(half));
  std::memcpy(&rest, &rest_bits, sizeof(rest));
  const float result = p * half * rest;
  return x > kLargest ? HUGE_VALF : (x < kSmallest ? 0.0f : result);
}

MEGALLM_INLINE double exponential(double x) { return std::exp(x); }

}  // namespace megallm::simd
