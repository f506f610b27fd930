// What the CPU and CUDA versions of dropout share: which elements are kept, checks of the arguments and allocation of
// the results.
//
//   y = (x + bias) * f + residual           f = 1 / (1 - drop) where an element is kept, otherwise 0
//   grad_input = grad_output * f,  grad_bias = sum over rows of grad_output * f,  and the residual's is grad_output
//
// An element is kept where its random word is at least drop * 2^32. The word is a function of key, step, the row's
// number and the column, so that no mask is stored: the backward pass makes it again. Each result is rounded once.

#pragma once

#include <tuple>

#include "include/philox.h"
#include "include/rows.h"

namespace megallm::dropout {

// What the words are made of, in memory of the device of what is masked.
struct Mask {
  Tensor key;   // int64 [2], 32 bits in each
  Tensor step;  // int64, one number
  Tensor rows;  // int64, the global number of each row, contiguous
  uint32_t threshold;
  double scale;  // 1 / (1 - drop)

  static const int64_t* words(const Tensor& tensor) { return static_cast<const int64_t*>(tensor.const_data_ptr()); }
};

struct Forward {
  Mask mask;
  Rows x;
  std::optional<Tensor> bias;  // [width], contiguous
  std::optional<Rows> residual;
  Tensor y;  // like x, contiguous
};

struct Backward {
  Mask mask;
  Rows grad_output;
  bool bias;
  Tensor grad_input;  // like grad_output, contiguous
  Tensor grad_bias;   // [width], accumulation type; [0] without a bias
};

inline Mask prepare_mask(const Tensor& key, const Tensor& step, const Tensor& rows, double drop, const Rows& beside) {
  const auto is_long = [&](const Tensor& tensor) {
    return tensor.scalar_type() == ScalarType::Long && tensor.device() == beside.tensor.device();
  };
  STD_TORCH_CHECK(is_long(key) && key.numel() == 2, "dropout: key must be int64 [2], beside x");
  STD_TORCH_CHECK(is_long(step) && step.numel() == 1, "dropout: step must be one int64, beside x");
  STD_TORCH_CHECK(is_long(rows) && rows.numel() == beside.count, "dropout: there must be one int64 for each row of x");
  STD_TORCH_CHECK(drop >= 0.0 && drop < 1.0, "dropout: the probability must be at least 0 and below 1");
  return Mask{torch::stable::contiguous(key), step, torch::stable::contiguous(rows), philox::threshold(drop),
              1.0 / (1.0 - drop)};
}

inline Forward prepare_forward(const Tensor& x, const std::optional<Tensor>& bias,
                               const std::optional<Tensor>& residual, const Tensor& key, const Tensor& step,
                               const Tensor& rows, double drop) {
  check_floating(x, "dropout");
  const Rows values = as_rows(x);
  std::optional<Tensor> added;
  if (bias) {
    STD_TORCH_CHECK(bias->dim() == 1 && bias->size(0) == values.width && bias->scalar_type() == x.scalar_type() &&
                        bias->device() == x.device(),
                    "dropout: bias must have shape [", values.width, "], and type and device of x");
    added = torch::stable::contiguous(*bias);
  }
  std::optional<Rows> beside;
  if (residual) {
    STD_TORCH_CHECK(
        same_shape(*residual, x) && residual->scalar_type() == x.scalar_type() && residual->device() == x.device(),
        "dropout: residual must have shape, type and device of x");
    beside = as_rows(*residual);
  }
  return Forward{prepare_mask(key, step, rows, drop, values), values, added, beside,
                 torch::stable::new_empty(x, x.sizes())};
}

inline Backward prepare_backward(const Tensor& grad_output, const Tensor& key, const Tensor& step, const Tensor& rows,
                                 double drop, bool bias) {
  check_floating(grad_output, "dropout");
  const Rows values = as_rows(grad_output);
  return Backward{
      prepare_mask(key, step, rows, drop, values), values, bias,
      torch::stable::new_empty(grad_output, grad_output.sizes()),
      torch::stable::new_empty(grad_output, {bias ? values.width : 0}, accumulation_type(grad_output.scalar_type()))};
}

}  // namespace megallm::dropout
