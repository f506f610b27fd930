// Loops that the compiler vectorises, in three versions of which the processor picks one when the library is loaded.

#pragma once

#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <cstdint>
#include <cstring>
#include <limits>
#include <type_traits>

// The marked function is compiled for AVX-512, AVX2 and the baseline. Everything it calls must be inlined into it to be
// part of that, hence MEGALLM_INLINE on the helpers.
#if defined(__x86_64__) && defined(__linux__) && defined(__GNUC__) && !defined(__clang__)
#define MEGALLM_CLONES __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#else
#define MEGALLM_CLONES
#endif
#define MEGALLM_INLINE __attribute__((always_inline)) inline

namespace megallm::simd {

using torch::headeronly::BFloat16;
using torch::headeronly::Half;
using torch::headeronly::ScalarType;

// What sums are carried in.
template <typename Scalar>
using Accumulation = std::conditional_t<std::is_same_v<Scalar, double>, double, float>;

// Calls `run` with a value of the element type.
template <typename Run>
void dispatch(ScalarType type, const Run& run) {
  switch (type) {
    case ScalarType::Float:
      return run(float());
    case ScalarType::Double:
      return run(double());
    case ScalarType::BFloat16:
      return run(BFloat16());
    default:
      return run(Half());
  }
}

MEGALLM_INLINE float widen(float value) { return value; }
MEGALLM_INLINE double widen(double value) { return value; }
MEGALLM_INLINE float widen(Half value) { return static_cast<float>(value); }

// Integer shifts vectorise; the conversions of the type itself do not.
MEGALLM_INLINE float widen(BFloat16 value) {
  const uint32_t bits = static_cast<uint32_t>(value.x) << 16;
  float result;
  std::memcpy(&result, &bits, sizeof(result));
  return result;
}

MEGALLM_INLINE void narrow(float value, float& result) { result = value; }
MEGALLM_INLINE void narrow(double value, double& result) { result = value; }
MEGALLM_INLINE void narrow(float value, Half& result) { result = static_cast<Half>(value); }

// To nearest, ties to even; a NaN would otherwise round to infinity.
MEGALLM_INLINE void narrow(float value, BFloat16& result) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof(bits));
  const uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  result.x = static_cast<uint16_t>(value != value ? 0x7fc0u : rounded);
}

// Partial sums that a sum over a row is carried in, interleaved.
constexpr int kLanes = 64;
// Elements after which they are added up and start anew, so that long rows lose no accuracy.
constexpr int64_t kSumBlock = 32 * kLanes;

template <typename Accumulator>
MEGALLM_INLINE Accumulator sum_lanes(Accumulator (&lanes)[kLanes]) {
  for (int half = kLanes / 2; half > 0; half /= 2) {
    for (int lane = 0; lane < half; ++lane) {
      lanes[lane] += lanes[lane + half];
    }
  }
  return lanes[0];
}

// The largest of term(0), ..., term(width - 1), or -inf; a NaN is not the largest of anything.
template <typename Accumulator, typename Term>
MEGALLM_INLINE Accumulator largest_over_row(int64_t width, const Term& term) {
  Accumulator lanes[kLanes];
  for (int lane = 0; lane < kLanes; ++lane) {
    lanes[lane] = -std::numeric_limits<Accumulator>::infinity();
  }
  int64_t start = 0;
  for (; start + kLanes <= width; start += kLanes) {
#pragma omp simd
    for (int lane = 0; lane < kLanes; ++lane) {
      const Accumulator value = term(start + lane);
      lanes[lane] = value > lanes[lane] ? value : lanes[lane];
    }
  }
  for (int64_t i = start; i < width; ++i) {
    const Accumulator value = term(i);
    lanes[i - start] = value > lanes[i - start] ? value : lanes[i - start];
  }
  for (int half = kLanes / 2; half > 0; half /= 2) {
    for (int lane = 0; lane < half; ++lane) {
      lanes[lane] = lanes[lane + half] > lanes[lane] ? lanes[lane + half] : lanes[lane];
    }
  }
  return lanes[0];
}

// term(0) + ... + term(width - 1). The order of additions is fixed by the width alone: it is the same for every
// address, batch and thread. `term` must be marked always_inline too.
template <typename Accumulator, typename Term>
MEGALLM_INLINE Accumulator sum_over_row(int64_t width, const Term& term) {
  double total = 0;
  for (int64_t block = 0; block < width; block += kSumBlock) {
    const int64_t stop = block + kSumBlock < width ? block + kSumBlock : width;
    Accumulator lanes[kLanes] = {};
    int64_t start = block;
    for (; start + kLanes <= stop; start += kLanes) {
#pragma omp simd
      for (int lane = 0; lane < kLanes; ++lane) {
        lanes[lane] += term(start + lane);
      }
    }
    for (int64_t i = start; i < stop; ++i) {
      lanes[i - start] += term(i);
    }
    total += sum_lanes(lanes);
  }
  return static_cast<Accumulator>(total);
}

// Two such sums in one pass; ahead(start, elements) is called before each part of it, and asks for what is read next.
template <typename Accumulator, typename First, typename Second, typename Ahead>
MEGALLM_INLINE void two_sums_over_row(int64_t width, const First& first, const Second& second, Accumulator& first_sum,
                                      Accumulator& second_sum, const Ahead& ahead) {
  double first_total = 0;
  double second_total = 0;
  for (int64_t block = 0; block < width; block += kSumBlock) {
    const int64_t stop = block + kSumBlock < width ? block + kSumBlock : width;
    Accumulator first_lanes[kLanes] = {};
    Accumulator second_lanes[kLanes] = {};
    int64_t start = block;
    for (; start + kLanes <= stop; start += kLanes) {
      ahead(start, kLanes);
#pragma omp simd
      for (int lane = 0; lane < kLanes; ++lane) {
        first_lanes[lane] += first(start + lane);
        second_lanes[lane] += second(start + lane);
      }
    }
    for (int64_t i = start; i < stop; ++i) {
      first_lanes[i - start] += first(i);
      second_lanes[i - start] += second(i);
    }
    first_total += sum_lanes(first_lanes);
    second_total += sum_lanes(second_lanes);
  }
  first_sum = static_cast<Accumulator>(first_total);
  second_sum = static_cast<Accumulator>(second_total);
}

}  // namespace megallm::simd
