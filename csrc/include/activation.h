// What the CPU and CUDA versions of the activations share: checks of the arguments and allocation of the results.
//
//   plain:  y = f(x + bias)                                     x [..., width]
//   gated:  y = f(gate + bias_gate) * (up + bias_up)            x = (gate, up) [..., 2 width]
//
// The sums and products are not rounded on the way, each result once. The gradient of the bias is a sum over rows in an
// order that depends on the shape alone.

#pragma once

#include <string>

#include "include/rows.h"

namespace megallm::activation {

enum class Kind { kSilu, kGelu, kGeluTanh, kRelu, kSquaredRelu };

inline Kind kind_of(const std::string& name) {
  if (name == "silu") return Kind::kSilu;
  if (name == "gelu") return Kind::kGelu;
  if (name == "gelu_tanh") return Kind::kGeluTanh;
  if (name == "relu") return Kind::kRelu;
  STD_TORCH_CHECK(name == "squared_relu", "activation: unknown activation ", name);
  return Kind::kSquaredRelu;
}

struct Forward {
  Kind kind;
  bool gated;
  Rows x;
  std::optional<Tensor> bias;  // as long as a row of x, contiguous
  Tensor y;                    // contiguous
};

struct Backward {
  Kind kind;
  bool gated;
  Rows grad_output;
  Rows x;
  std::optional<Tensor> bias;
  Tensor grad_input;  // like x, contiguous
  Tensor grad_bias;   // as long as a row of x, accumulation type; [0] without a bias
};

inline void check(const Tensor& x, bool gated) {
  check_floating(x, "activation");
  STD_TORCH_CHECK(!gated || x.size(x.dim() - 1) % 2 == 0, "activation: gate and up need a last dimension that is even");
}

inline std::optional<Tensor> checked_bias(const std::optional<Tensor>& bias, const Rows& x) {
  if (!bias) {
    return std::nullopt;
  }
  STD_TORCH_CHECK(bias->dim() == 1 && bias->size(0) == x.width, "activation: bias must have shape [", x.width, "]");
  STD_TORCH_CHECK(bias->scalar_type() == x.tensor.scalar_type(), "activation: bias must have the type of x");
  STD_TORCH_CHECK(bias->device() == x.tensor.device(), "activation: bias must be on the device of x");
  return torch::stable::contiguous(*bias);
}

inline std::vector<int64_t> output_sizes(const Tensor& x, bool gated) {
  std::vector<int64_t> sizes;
  for (int64_t dim = 0; dim < x.dim(); ++dim) {
    sizes.push_back(x.size(dim));
  }
  sizes.back() /= gated ? 2 : 1;
  return sizes;
}

inline Forward prepare_forward(const Tensor& x, const std::optional<Tensor>& bias, const std::string& name,
                               bool gated) {
  check(x, gated);
  const Rows rows = as_rows(x);
  return Forward{kind_of(name), gated, rows, checked_bias(bias, rows),
                 torch::stable::new_empty(x, output_sizes(x, gated))};
}

inline Backward prepare_backward(const Tensor& grad_output, const Tensor& x, const std::optional<Tensor>& bias,
                                 const std::string& name, bool gated) {
  check(x, gated);
  const std::vector<int64_t> sizes = output_sizes(x, gated);
  STD_TORCH_CHECK(grad_output.dim() == x.dim(), "activation: grad_output must have the shape of the output");
  for (int64_t dim = 0; dim < x.dim(); ++dim) {
    STD_TORCH_CHECK(grad_output.size(dim) == sizes[dim], "activation: grad_output must have the shape of the output");
  }
  STD_TORCH_CHECK(grad_output.scalar_type() == x.scalar_type() && grad_output.device() == x.device(),
                  "activation: grad_output must have the type and the device of x");
  const Rows rows = as_rows(x);
  return Backward{kind_of(name),
                  gated,
                  as_rows(grad_output),
                  rows,
                  checked_bias(bias, rows),
                  torch::stable::new_empty(x, x.sizes()),
                  torch::stable::new_empty(x, {bias ? rows.width : 0}, accumulation_type(x.scalar_type()))};
}

}  // namespace megallm::activation
