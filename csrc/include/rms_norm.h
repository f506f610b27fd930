// What the CPU and CUDA versions of RMSNorm share: checks of the arguments and allocation of the results.
//
//   forward:   y = x * r * (weight + weight_offset),        r = 1 / sqrt(mean(x^2) + epsilon)      one r per row
//   backward:  g = grad_output * (weight + weight_offset),  grad_input = r * (g - x * r * mean(g * x * r)) +
//   grad_residual
//              grad_weight = sum over rows of grad_output * x * r
//
// Every output is rounded once. Sums have an order that depends on the shape alone, never on timing, threads or
// alignment.

#pragma once

#include "include/rows.h"

namespace megallm::rms_norm {

struct Forward {
  Rows x;
  std::optional<Tensor> weight;  // [width], contiguous, x's type or float32
  Tensor y;                      // like x, contiguous
  Tensor reciprocal_rms;         // [rows], accumulation type
};

struct Backward {
  Rows grad_output;
  Rows x;
  std::optional<Tensor> weight;
  Tensor reciprocal_rms;
  std::optional<Rows> grad_residual;
  Tensor grad_input;   // like x, contiguous
  Tensor grad_weight;  // [width], accumulation type; [0] without a weight
};

inline void check_like(const Tensor& tensor, const Tensor& x, const char* name) {
  STD_TORCH_CHECK(same_shape(tensor, x), "rms_norm: ", name, " must have the shape of x");
  STD_TORCH_CHECK(tensor.scalar_type() == x.scalar_type(), "rms_norm: ", name, " must have the type of x");
  STD_TORCH_CHECK(tensor.device() == x.device(), "rms_norm: ", name, " must be on the device of x");
}

inline std::optional<Tensor> checked_weight(const std::optional<Tensor>& weight, const Rows& x) {
  if (!weight) {
    return std::nullopt;
  }
  STD_TORCH_CHECK(weight->dim() == 1 && weight->size(0) == x.width, "rms_norm: weight must have shape [", x.width, "]");
  STD_TORCH_CHECK(weight->scalar_type() == x.tensor.scalar_type() || weight->scalar_type() == ScalarType::Float,
                  "rms_norm: weight must have the type of x or be float32");
  STD_TORCH_CHECK(weight->device() == x.tensor.device(), "rms_norm: weight must be on the device of x");
  return torch::stable::contiguous(*weight);
}

inline Forward prepare_forward(const Tensor& x, const std::optional<Tensor>& weight) {
  check_floating(x, "rms_norm");
  const Rows rows = as_rows(x);
  return Forward{rows, checked_weight(weight, rows), torch::stable::new_empty(x, x.sizes()),
                 torch::stable::new_empty(x, {rows.count}, accumulation_type(x.scalar_type()))};
}

inline Backward prepare_backward(const Tensor& grad_output, const Tensor& x, const std::optional<Tensor>& weight,
                                 const Tensor& reciprocal_rms, const std::optional<Tensor>& grad_residual) {
  check_floating(x, "rms_norm");
  check_like(grad_output, x, "grad_output");
  const Rows rows = as_rows(x);
  const ScalarType accumulation = accumulation_type(x.scalar_type());
  STD_TORCH_CHECK(reciprocal_rms.dim() == 1 && reciprocal_rms.size(0) == rows.count &&
                      reciprocal_rms.scalar_type() == accumulation && reciprocal_rms.device() == x.device(),
                  "rms_norm: reciprocal_rms must be what the forward pass returned");
  std::optional<Rows> residual;
  if (grad_residual) {
    check_like(*grad_residual, x, "grad_residual");
    residual = as_rows(*grad_residual);
  }
  return Backward{as_rows(grad_output),
                  rows,
                  checked_weight(weight, rows),
                  torch::stable::contiguous(reciprocal_rms),
                  residual,
                  torch::stable::new_empty(x, x.sizes()),
                  torch::stable::new_empty(x, {weight ? rows.width : 0}, accumulation)};
}

}  // namespace megallm::rms_norm
