// Initial values: normal and uniform numbers of a slice of a tensor, each a function of the element's place.
//
// In float64 and rounded to float32 once, as the reference computes them. The polynomials are good to 1e-15, so that
// all but one in a million values have the reference's bits, and the same bits wherever this library runs.

#if defined(__GNUC__) && !defined(__clang__)
// A fused multiply-add would round otherwise on processors that have one, and replicas that no message makes equal
// would begin with different weights.
#pragma GCC optimize("fp-contract=off")
#elif defined(__clang__)
#pragma clang fp contract(off)
#endif

#include <torch/csrc/stable/library.h>

#include <cmath>
#include <cstring>

#include "cpu/column_sums.h"
#include "cpu/philox.h"
#include "cpu/simd.h"

namespace megallm::initial {
namespace {

// Words at once; a multiple of four.
constexpr int64_t kWords = 1024;

// log(x) for normal x > 0: x = 2^e m with m between sqrt(1/2) and sqrt(2), log m = 2 artanh((m - 1) / (m + 1)).
MEGALLM_INLINE double logarithm(double x) {
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
  p = p * z + 1.0 / 19.0;
  p = p * z + 1.0 / 17.0;
  p = p * z + 1.0 / 15.0;
  p = p * z + 1.0 / 13.0;
  p = p * z + 1.0 / 11.0;
  p = p * z + 1.0 / 9.0;
  p = p * z + 1.0 / 7.0;
  p = p * z + 1.0 / 5.0;
  p = p * z + 1.0 / 3.0;
  return static_cast<double>(static_cast<int32_t>(exponent)) * 0.69314718055994530942 + 2.0 * (s + s * z * p);
}

// Cosine and sine of 2 pi word / 2^32: the nearest quarter turn is taken off exactly, the rest is below pi / 4.
MEGALLM_INLINE void cosine_and_sine(uint32_t word, double& cosine, double& sine) {
  const uint32_t quarter = (word + 0x20000000u) >> 30;
  const double t = static_cast<double>(static_cast<int32_t>(word - (quarter << 30))) * 1.46291807926715968e-9;
  const double z = t * t;
  double s = -7.6471637318198164759e-13;
  s = s * z + 1.6059043836821614599e-10;
  s = s * z - 2.5052108385441718775e-8;
  s = s * z + 2.7557319223985890653e-6;
  s = s * z - 1.9841269841269841270e-4;
  s = s * z + 8.3333333333333333333e-3;
  s = s * z - 1.6666666666666666667e-1;
  s = t + t * z * s;
  double c = 4.7794773323873852974e-14;
  c = c * z - 1.1470745597729724714e-11;
  c = c * z + 2.0876756987868098979e-9;
  c = c * z - 2.7557319223985890653e-7;
  c = c * z + 2.4801587301587301587e-5;
  c = c * z - 1.3888888888888888889e-3;
  c = c * z + 4.1666666666666666667e-2;
  c = 1.0 - 0.5 * z + z * z * c;
  const bool swapped = (quarter & 1u) != 0;
  const double first = swapped ? s : c;
  const double second = swapped ? c : s;
  // Quarters 1 and 2 have a negative cosine, quarters 2 and 3 a negative sine.
  cosine = ((quarter + 1u) & 2u) != 0 ? -first : first;
  sine = (quarter & 2u) != 0 ? -second : second;
}

// Box and Muller: two words make two numbers.
MEGALLM_CLONES void normal_values(const uint32_t* words, int64_t count, float* __restrict__ values) {
#pragma omp simd
  for (int64_t i = 0; i < count / 2; ++i) {
    const double radius = std::sqrt(-2.0 * logarithm((static_cast<double>(words[2 * i]) + 0.5) * 0x1p-32));
    double cosine, sine;
    cosine_and_sine(words[2 * i + 1], cosine, sine);
    values[2 * i] = static_cast<float>(radius * cosine);
    values[2 * i + 1] = static_cast<float>(radius * sine);
  }
}

// The middles of 2^32 equal parts of [-1, 1].
MEGALLM_CLONES void uniform_values(const uint32_t* words, int64_t count, float* __restrict__ values) {
#pragma omp simd
  for (int64_t i = 0; i < count; ++i) {
    values[i] = static_cast<float>((static_cast<double>(words[i]) + 0.5) * 0x1p-31 - 1.0);
  }
}

// Columns [start, start + num_columns) of the rows numbered `rows`, under `key`: float32 [rows, num_columns].
Tensor rows_of(const Tensor& key, const Tensor& rows, int64_t start, int64_t num_columns, bool normal) {
  STD_TORCH_CHECK(key.scalar_type() == ScalarType::Long && key.numel() == 2, "initial: key must be int64 [2]");
  STD_TORCH_CHECK(rows.scalar_type() == ScalarType::Long && rows.dim() == 1, "initial: rows must be int64 [rows]");
  STD_TORCH_CHECK(start >= 0 && num_columns >= 0, "initial: columns are counted from 0");
  const Tensor keys = torch::stable::contiguous(key);
  const Tensor numbers = torch::stable::contiguous(rows);
  const philox::Key generator = philox::key_of(keys, 0);
  const int64_t* row_numbers = static_cast<const int64_t*>(numbers.const_data_ptr());
  Tensor result = torch::stable::new_empty(rows, {rows.size(0), num_columns}, ScalarType::Float);
  float* values = static_cast<float*>(result.mutable_data_ptr());
  const int64_t first = start / 4 * 4;
  const int64_t stop = start + num_columns;
  torch::stable::parallel_for(0, rows.size(0), std::max<int64_t>(1, kGrain / std::max<int64_t>(1, num_columns)),
                              [&](int64_t begin, int64_t end) {
                                uint32_t words[kWords];
                                float made[kWords];
                                for (int64_t row = begin; row < end; ++row) {
                                  float* target = values + row * num_columns;
                                  for (int64_t column = first; column < stop; column += kWords) {
                                    const int64_t count = std::min(kWords, (stop - column + 3) / 4 * 4);
                                    philox::row_words(generator, static_cast<uint64_t>(row_numbers[row]),
                                                      static_cast<uint32_t>(column / 4), count / 4, words);
                                    normal ? normal_values(words, count, made) : uniform_values(words, count, made);
                                    const int64_t from = std::max(start, column);
                                    const int64_t to = std::min(stop, column + count);
                                    std::copy(made + (from - column), made + (to - column), target + (from - start));
                                  }
                                }
                              });
  return result;
}

}  // namespace
}  // namespace megallm::initial

STABLE_TORCH_LIBRARY_FRAGMENT(megallm, library) {
  library.def("initial_rows(Tensor key, Tensor rows, int start, int num_columns, bool normal) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(megallm, CPU, library) {
  library.impl("initial_rows", TORCH_BOX(&megallm::initial::rows_of));
}
