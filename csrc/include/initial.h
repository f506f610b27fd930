// What the CPU and CUDA versions of initial values share: the arithmetic, and checks of the arguments.
//
// In float64 and rounded to float32 once, as the reference computes them. The polynomials are good to 1e-15, so that
// all but one in a million values have the reference's bits. Additions, multiplications, divisions and roots alone are
// used, each rounded by itself: the bits are the same on every processor and every GPU.

#pragma once

#include <cmath>
#include <cstring>

#include "include/philox.h"
#include "include/rows.h"

namespace megallm::initial {

// a b + c in two roundings. A fused multiply-add would round otherwise on processors that have one, and replicas that
// no message makes equal would begin with different weights. nvcc fuses unless it is told so here; of the CPU's
// compiler the file that includes this one asks it.
MEGALLM_INLINE_EVERYWHERE double product_plus(double a, double b, double c) {
#if defined(__CUDA_ARCH__)
  return __dadd_rn(__dmul_rn(a, b), c);
#else
  return a * b + c;
#endif
}

// log(x) for normal x > 0: x = 2^e m with m between sqrt(1/2) and sqrt(2), log m = 2 artanh((m - 1) / (m + 1)).
MEGALLM_INLINE_EVERYWHERE double logarithm(double x) {
  uint64_t bits;
  std::memcpy(&bits, &x, sizeof(bits));
  // Moves the boundary between exponents from 1 to sqrt(1/2).
  const uint64_t shifted = bits - 0x3fe6a09e667f3bcdull;
  const int64_t exponent = static_cast<int64_t>(shifted) >> 52;
  const uint64_t mantissa_bits = bits - (static_cast<uint64_t>(exponent) << 52);
  double m;
  std::memcpy(&m, &mantissa_bits, sizeof(m));
  const double s = (m - 1.0) / (m + 1.0);
  const double z = s * s;
  double p = 1.0 / 21.0;
  p = product_plus(p, z, 1.0 / 19.0);
  p = product_plus(p, z, 1.0 / 17.0);
  p = product_plus(p, z, 1.0 / 15.0);
  p = product_plus(p, z, 1.0 / 13.0);
  p = product_plus(p, z, 1.0 / 11.0);
  p = product_plus(p, z, 1.0 / 9.0);
  p = product_plus(p, z, 1.0 / 7.0);
  p = product_plus(p, z, 1.0 / 5.0);
  p = product_plus(p, z, 1.0 / 3.0);
  const double half_of_mantissa = product_plus(s * z, p, s);
  return product_plus(static_cast<double>(static_cast<int32_t>(exponent)), 0.69314718055994530942,
                      2.0 * half_of_mantissa);
}

// Cosine and sine of 2 pi word / 2^32: the nearest quarter turn is taken off exactly, the rest is below pi / 4.
MEGALLM_INLINE_EVERYWHERE void cosine_and_sine(uint32_t word, double& cosine, double& sine) {
  const uint32_t quarter = (word + 0x20000000u) >> 30;
  const double t = static_cast<double>(static_cast<int32_t>(word - (quarter << 30))) * 1.46291807926715968e-9;
  const double z = t * t;
  double s = -7.6471637318198164759e-13;
  s = product_plus(s, z, 1.6059043836821614599e-10);
  s = product_plus(s, z, -2.5052108385441718775e-8);
  s = product_plus(s, z, 2.7557319223985890653e-6);
  s = product_plus(s, z, -1.9841269841269841270e-4);
  s = product_plus(s, z, 8.3333333333333333333e-3);
  s = product_plus(s, z, -1.6666666666666666667e-1);
  s = product_plus(t * z, s, t);
  double c = 4.7794773323873852974e-14;
  c = product_plus(c, z, -1.1470745597729724714e-11);
  c = product_plus(c, z, 2.0876756987868098979e-9);
  c = product_plus(c, z, -2.7557319223985890653e-7);
  c = product_plus(c, z, 2.4801587301587301587e-5);
  c = product_plus(c, z, -1.3888888888888888889e-3);
  c = product_plus(c, z, 4.1666666666666666667e-2);
  c = product_plus(z * z, c, product_plus(-0.5, z, 1.0));
  const bool swapped = (quarter & 1u) != 0;
  const double first = swapped ? s : c;
  const double second = swapped ? c : s;
  // Quarters 1 and 2 have a negative cosine, quarters 2 and 3 a negative sine.
  cosine = ((quarter + 1u) & 2u) != 0 ? -first : first;
  sine = (quarter & 2u) != 0 ? -second : second;
}

// Box and Muller: two words make two numbers. The first is moved into (0, 1), where every logarithm is finite.
MEGALLM_INLINE_EVERYWHERE void normal_pair(uint32_t word, uint32_t next, float& first, float& second) {
  const double radius = std::sqrt(-2.0 * logarithm((static_cast<double>(word) + 0.5) * 0x1p-32));
  double cosine, sine;
  cosine_and_sine(next, cosine, sine);
  first = static_cast<float>(radius * cosine);
  second = static_cast<float>(radius * sine);
}

// The middle of one of 2^32 equal parts of [-1, 1]. Only the subtraction rounds.
MEGALLM_INLINE_EVERYWHERE float uniform_value(uint32_t word) {
  return static_cast<float>((static_cast<double>(word) + 0.5) * 0x1p-31 - 1.0);
}

inline void check(const Tensor& key, const Tensor& rows, int64_t start, int64_t num_columns) {
  STD_TORCH_CHECK(key.scalar_type() == ScalarType::Long && key.numel() == 2, "initial: key must be int64 [2]");
  STD_TORCH_CHECK(rows.scalar_type() == ScalarType::Long && rows.dim() == 1 && rows.device() == key.device(),
                  "initial: rows must be int64 [rows], beside the key");
  STD_TORCH_CHECK(start >= 0 && num_columns >= 0, "initial: columns are counted from 0");
}

}  // namespace megallm::initial
