// What the CPU and CUDA versions of LayerNorm and RMSNorm share: checks of the arguments and allocation of the results.
//
//   forward:   s = x + residual, rounded, or x without a residual
//              y = (s - m) * r * weight + bias        r = 1 / sqrt(mean((s - m)^2) + epsilon), one m and r per row;
//                                                     m = mean(s), or 0 when not centred (RMSNorm, without a bias)
//   backward:  g = grad_output * weight, n = (s - m) * r
//              grad_input = r * (g - mean(g) - n * mean(g * n)) + grad_sum      without mean(g) when not centred
//              grad_weight = sum over rows of grad_output * n,  grad_bias = sum over rows of grad_output
//
// The norm is of the rounded sum: the same bits as an addition by itself before it, wherever a model is cut. All else
// is rounded once. Sums have an order that depends on the shape alone on a CPU, and on a GPU also on its model and on
// whether rows begin at multiples of 16 bytes; never on timing or the number of threads, and those of a row never on
// the rows around it.

#pragma once

#include "include/rows.h"

namespace megallm::norm {

struct Forward {
  bool centred;
  Rows x;
  std::optional<Rows> residual;
  Tensor weight;               // [width], contiguous, x's type or float32
  std::optional<Tensor> bias;  // like the weight
  Tensor y;                    // like x, contiguous
  Tensor sum;                  // like x, contiguous; [0] without a residual
  Tensor mean;                 // [rows], accumulation type; [0] when not centred
  Tensor reciprocal;           // [rows], accumulation type
};

struct Backward {
  bool centred;
  Rows grad_output;
  Rows sum;
  Tensor weight;
  Tensor mean;
  Tensor reciprocal;
  std::optional<Rows> grad_sum;
  Tensor grad_input;       // like sum, contiguous
  Tensor grad_parameters;  // of the weight and, when centred, the bias: [1 or 2, width], accumulation type
};

inline void check_like(const Tensor& tensor, const Tensor& x, const char* name) {
  STD_TORCH_CHECK(same_shape(tensor, x), "norm: ", name, " must have the shape of x");
  STD_TORCH_CHECK(tensor.scalar_type() == x.scalar_type(), "norm: ", name, " must have the type of x");
  STD_TORCH_CHECK(tensor.device() == x.device(), "norm: ", name, " must be on the device of x");
}

inline Tensor checked_parameter(const Tensor& parameter, const Rows& x, const char* name) {
  STD_TORCH_CHECK(parameter.dim() == 1 && parameter.size(0) == x.width, "norm: ", name, " must have shape [", x.width,
                  "]");
  STD_TORCH_CHECK(parameter.scalar_type() == x.tensor.scalar_type() || parameter.scalar_type() == ScalarType::Float,
                  "norm: ", name, " must have the type of x or be float32");
  STD_TORCH_CHECK(parameter.device() == x.tensor.device(), "norm: ", name, " must be on the device of x");
  return torch::stable::contiguous(parameter);
}

inline void check_statistic(const Tensor& statistic, const Rows& x, int64_t count) {
  STD_TORCH_CHECK(statistic.dim() == 1 && statistic.size(0) == count &&
                      statistic.scalar_type() == accumulation_type(x.tensor.scalar_type()) &&
                      statistic.device() == x.tensor.device(),
                  "norm: mean and reciprocal must be what the forward pass returned");
}

inline Forward prepare_forward(const Tensor& x, const std::optional<Tensor>& residual, const Tensor& weight,
                               const std::optional<Tensor>& bias, bool centred) {
  check_floating(x, "norm");
  STD_TORCH_CHECK(centred || !bias, "norm: only a centred norm has a bias");
  STD_TORCH_CHECK(!bias || bias->scalar_type() == weight.scalar_type(), "norm: bias must have the type of weight");
  const Rows rows = as_rows(x);
  std::optional<Rows> residual_rows;
  if (residual) {
    check_like(*residual, x, "residual");
    residual_rows = as_rows(*residual);
  }
  std::optional<Tensor> checked_bias;
  if (bias) {
    checked_bias = checked_parameter(*bias, rows, "bias");
  }
  const ScalarType accumulation = accumulation_type(x.scalar_type());
  return Forward{centred,
                 rows,
                 residual_rows,
                 checked_parameter(weight, rows, "weight"),
                 checked_bias,
                 torch::stable::new_empty(x, x.sizes()),
                 residual ? torch::stable::new_empty(x, x.sizes()) : torch::stable::new_empty(x, {0}),
                 torch::stable::new_empty(x, {centred ? rows.count : 0}, accumulation),
                 torch::stable::new_empty(x, {rows.count}, accumulation)};
}

inline Backward prepare_backward(const Tensor& grad_output, const Tensor& sum, const Tensor& weight, const Tensor& mean,
                                 const Tensor& reciprocal, const std::optional<Tensor>& grad_sum, bool centred) {
  check_floating(sum, "norm");
  check_like(grad_output, sum, "grad_output");
  const Rows rows = as_rows(sum);
  check_statistic(mean, rows, centred ? rows.count : 0);
  check_statistic(reciprocal, rows, rows.count);
  std::optional<Rows> grad_sum_rows;
  if (grad_sum) {
    check_like(*grad_sum, sum, "grad_sum");
    grad_sum_rows = as_rows(*grad_sum);
  }
  return Backward{centred,
                  as_rows(grad_output),
                  rows,
                  checked_parameter(weight, rows, "weight"),
                  torch::stable::contiguous(mean),
                  torch::stable::contiguous(reciprocal),
                  grad_sum_rows,
                  torch::stable::new_empty(sum, sum.sizes()),
                  torch::stable::new_empty(sum, {centred ? 2 : 1, rows.width}, accumulation_type(sum.scalar_type()))};
}

}  // namespace megallm::norm
