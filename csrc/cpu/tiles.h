// Tiles of rows in the accumulation type. Operators that compute much for each element are written once for float32
// and float64 and see 16-bit types through these: no version of the arithmetic for each type.

#pragma once

#include <torch/headeronly/core/ScalarType.h>

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <optional>
#include <vector>

#include "cpu/simd.h"
#include "include/rows.h"

namespace megallm::tiles {

// Elements of a tile: a handful of buffers of this size stay in the first-level cache.
constexpr int64_t kTile = 1024;

// Vectors of 64 bytes that lie across two cache lines would take twice as long.
template <typename Scalar, int64_t kSize = kTile>
struct alignas(64) Buffer {
  Scalar values[kSize];
  operator Scalar*() { return values; }
};

template <typename Scalar>
MEGALLM_INLINE void widen_all(const Scalar* __restrict__ data, int64_t count, float* __restrict__ result) {
#pragma omp simd
  for (int64_t i = 0; i < count; ++i) {
    result[i] = simd::widen(data[i]);
  }
}

template <typename Scalar>
MEGALLM_INLINE void narrow_all(const float* __restrict__ values, int64_t count, Scalar* __restrict__ result) {
#pragma omp simd
  for (int64_t i = 0; i < count; ++i) {
    simd::narrow(values[i], result[i]);
  }
}

MEGALLM_CLONES static void widen_tile(const simd::BFloat16* data, int64_t count, float* result) {
  widen_all(data, count, result);
}
MEGALLM_CLONES static void widen_tile(const simd::Half* data, int64_t count, float* result) {
  widen_all(data, count, result);
}
MEGALLM_CLONES static void narrow_tile(const float* values, int64_t count, simd::BFloat16* result) {
  narrow_all(values, count, result);
}
MEGALLM_CLONES static void narrow_tile(const float* values, int64_t count, simd::Half* result) {
  narrow_all(values, count, result);
}

// A tensor's memory, read tile by tile.
struct Source {
  const void* data;
  ScalarType type;

  // `count` elements from `offset` on: in place if they have the accumulation type, otherwise widened into `buffer`.
  const float* read(int64_t offset, int64_t count, float* buffer) const {
    switch (type) {
      case ScalarType::BFloat16:
        widen_tile(static_cast<const simd::BFloat16*>(data) + offset, count, buffer);
        return buffer;
      case ScalarType::Half:
        widen_tile(static_cast<const simd::Half*>(data) + offset, count, buffer);
        return buffer;
      default:
        return static_cast<const float*>(data) + offset;
    }
  }
  const double* read(int64_t offset, int64_t count, double* buffer) const {
    if (type == ScalarType::Double) {
      return static_cast<const double*>(data) + offset;
    }
    for (int64_t i = 0; i < count; ++i) {
      buffer[i] = static_cast<const float*>(data)[offset + i];
    }
    return buffer;
  }
};

// A tensor's memory, written tile by tile: compute into `begin`, then `end`.
struct Target {
  void* data;
  ScalarType type;

  float* begin(int64_t offset, float* buffer) const {
    return type == ScalarType::Float ? static_cast<float*>(data) + offset : buffer;
  }
  double* begin(int64_t offset, double*) const { return static_cast<double*>(data) + offset; }

  void end(int64_t offset, int64_t count, const float* values) const {
    if (type == ScalarType::BFloat16) {
      narrow_tile(values, count, static_cast<simd::BFloat16*>(data) + offset);
    } else if (type == ScalarType::Half) {
      narrow_tile(values, count, static_cast<simd::Half*>(data) + offset);
    }
  }
  void end(int64_t, int64_t, const double*) const {}
};

inline Source source(const Tensor& tensor) { return {tensor.const_data_ptr(), tensor.scalar_type()}; }
inline Source source(const Rows& rows) { return source(rows.tensor); }
inline Target target(const Tensor& tensor) { return {tensor.mutable_data_ptr(), tensor.scalar_type()}; }

[[maybe_unused]] MEGALLM_CLONES static void add(const float* left, const float* right, int64_t count,
                                                float* __restrict__ result) {
#pragma omp simd
  for (int64_t i = 0; i < count; ++i) {
    result[i] = left[i] + right[i];
  }
}

inline void add(const double* left, const double* right, int64_t count, double* __restrict__ result) {
  for (int64_t i = 0; i < count; ++i) {
    result[i] = left[i] + right[i];
  }
}

// `accumulate` as part of the function that calls it.
template <typename Value, typename Sum>
MEGALLM_INLINE void accumulate_inline(const Value* values, int64_t count, Sum* __restrict__ sums) {
#pragma omp simd
  for (int64_t i = 0; i < count; ++i) {
    sums[i] += values[i];
  }
}

[[maybe_unused]] MEGALLM_CLONES static void accumulate(const float* values, int64_t count, float* sums) {
  accumulate_inline(values, count, sums);
}

[[maybe_unused]] MEGALLM_CLONES static void accumulate(const float* values, int64_t count, double* sums) {
  accumulate_inline(values, count, sums);
}

inline void accumulate(const double* values, int64_t count, double* sums) { accumulate_inline(values, count, sums); }

// A vector for all rows, such as a bias, whole in the accumulation type; nothing where there is none.
template <typename A>
std::vector<A> widened(const std::optional<Tensor>& vector) {
  if (!vector) {
    return {};
  }
  std::vector<A> result(vector->size(0));
  const Source values = source(*vector);
  for (int64_t start = 0; start < vector->size(0); start += kTile) {
    const int64_t count = std::min(kTile, vector->size(0) - start);
    Buffer<A> buffer;
    const A* read = values.read(start, count, buffer);
    std::copy(read, read + count, result.begin() + start);
  }
  return result;
}

// A row's `count` elements from `offset` on, with the bias from `column` on, which may be null.
template <typename A>
const A* read_biased(const Source& source, int64_t offset, int64_t count, const A* bias, int64_t column,
                     Buffer<A>& buffer) {
  const A* values = source.read(offset, count, buffer);
  if (bias == nullptr) {
    return values;
  }
  add(values, bias + column, count, buffer);
  return buffer;
}

}  // namespace megallm::tiles
