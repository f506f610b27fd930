// Flat tensors: the shards of buckets that the optimizer works on, one contiguous range each.

#pragma once

#include "include/rows.h"

namespace megallm {

inline void check_flat(const Tensor& tensor, const char* what) {
  STD_TORCH_CHECK(tensor.is_contiguous(), what, " must be contiguous");
}

inline void check_scalar(const Tensor& tensor, ScalarType type, const Tensor& beside, const char* what) {
  STD_TORCH_CHECK(tensor.numel() == 1 && tensor.scalar_type() == type, what, " must be one number of the right type");
  STD_TORCH_CHECK(tensor.device() == beside.device(), what, " must be on the device of what it acts on");
}

inline bool is_float_or_double(const Tensor& tensor) {
  return tensor.scalar_type() == ScalarType::Float || tensor.scalar_type() == ScalarType::Double;
}

// One tensor of a list whose squares are summed.
inline void check_summand(const Tensor& tensor, const Tensor& first) {
  STD_TORCH_CHECK(is_float_or_double(tensor), "sum_of_squares: tensors must be float32 or float64");
  STD_TORCH_CHECK(tensor.device() == first.device(), "sum_of_squares: tensors must be on one device");
  check_flat(tensor, "sum_of_squares: tensors");
}

// `target` takes `source`, which may be narrower.
inline void check_accumulation(const Tensor& target, const Tensor& source) {
  const ScalarType type = source.scalar_type();
  STD_TORCH_CHECK(target.numel() == source.numel() && target.device() == source.device(),
                  "accumulate: source must be as long as the target and beside it");
  STD_TORCH_CHECK(is_float_or_double(target) &&
                      (type == target.scalar_type() || (target.scalar_type() == ScalarType::Float &&
                                                        (type == ScalarType::BFloat16 || type == ScalarType::Half))),
                  "accumulate: target must be float32 or float64, source like it or, for float32, bfloat16 or float16");
  check_flat(target, "accumulate: target");
  check_flat(source, "accumulate: source");
}

}  // namespace megallm
