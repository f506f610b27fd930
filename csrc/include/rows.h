// A tensor seen as rows: the view every operator over the last dimension works on.

#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <cstdint>
#include <optional>
#include <tuple>
#include <vector>

// For functions that both compilers see, of which only nvcc tells processors apart.
#ifdef __CUDACC__
#define MEGALLM_HOST_DEVICE __host__ __device__
#else
#define MEGALLM_HOST_DEVICE
#endif

namespace megallm {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// `count` rows of `width` elements; elements of a row lie next to each other, rows `stride` elements apart.
struct Rows {
  Tensor tensor;  // keeps the memory alive, also when it is a copy
  int64_t count;
  int64_t width;
  int64_t stride;

  template <typename Scalar>
  const Scalar* data() const {
    return static_cast<const Scalar*>(tensor.const_data_ptr());
  }
};

// Distance between rows when the leading dimensions are one regular sequence of contiguous rows, otherwise nothing.
inline std::optional<int64_t> row_stride(const Tensor& tensor, int64_t width) {
  const int64_t last = tensor.dim() - 1;
  if (width != 1 && tensor.stride(last) != 1) {
    return std::nullopt;
  }
  std::optional<int64_t> stride;
  int64_t extent = 0;
  for (int64_t dim = last - 1; dim >= 0; --dim) {
    if (tensor.size(dim) == 1) {
      continue;
    }
    if (!stride) {
      stride = tensor.stride(dim);
      extent = *stride * tensor.size(dim);
    } else if (tensor.stride(dim) == extent) {
      extent *= tensor.size(dim);
    } else {
      return std::nullopt;
    }
  }
  return stride.value_or(width);
}

// Copies only what cannot be read in place: a slice of a packed tensor can, a transposed one cannot.
inline Rows as_rows(const Tensor& tensor) {
  STD_TORCH_CHECK(tensor.dim() >= 1, "expected a tensor with at least one dimension");
  const int64_t width = tensor.size(tensor.dim() - 1);
  int64_t count = 1;
  for (int64_t dim = 0; dim < tensor.dim() - 1; ++dim) {
    count *= tensor.size(dim);
  }
  if (count == 0 || width == 0) {
    return Rows{tensor, count, width, width};
  }
  if (const std::optional<int64_t> stride = row_stride(tensor, width)) {
    return Rows{tensor, count, width, *stride};
  }
  return Rows{torch::stable::contiguous(tensor), count, width, width};
}

// Sums are carried in float32, and in float64 for float64.
inline ScalarType accumulation_type(ScalarType type) {
  return type == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}

// Columns are counted in 32 bits on CUDA.
inline void check_floating(const Tensor& x, const char* operator_name) {
  const ScalarType type = x.scalar_type();
  STD_TORCH_CHECK(x.dim() >= 1 && x.size(x.dim() - 1) < (int64_t{1} << 30), operator_name,
                  ": x must have a last dimension below 2^30");
  STD_TORCH_CHECK(type == ScalarType::Float || type == ScalarType::BFloat16 || type == ScalarType::Half ||
                      type == ScalarType::Double,
                  operator_name, ": x must be float32, bfloat16, float16 or float64");
}

inline bool same_shape(const Tensor& left, const Tensor& right) {
  if (left.dim() != right.dim()) {
    return false;
  }
  for (int64_t dim = 0; dim < left.dim(); ++dim) {
    if (left.size(dim) != right.size(dim)) {
      return false;
    }
  }
  return true;
}

}  // namespace megallm
