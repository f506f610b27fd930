// What the CPU and CUDA versions of AdamW share.
//
//   g = gradient * gradient_scale                    t = num_updates + 1
//   m = m + (1 - beta1) (g - m)                      v = beta2 v + (1 - beta2) g^2
//   w = w (1 - learning_rate * weight_decay) - learning_rate / (1 - beta1^t) * m / (sqrt(v / (1 - beta2^t)) + epsilon)
//
// The numbers that change from step to step are read where the tensors are. With `skip` at anything but 0 nothing
// changes.

#pragma once

#include "include/flat.h"

namespace megallm::adamw {

struct Settings {
  double beta1;
  double beta2;
  double epsilon;
};

struct Call {
  Tensor weights;
  Tensor gradient;
  Tensor first_moment;
  Tensor second_moment;
  Tensor num_updates;             // float32 scalar
  std::optional<Tensor> rounded;  // bfloat16 or float16: gets the new weights, rounded once
  Tensor learning_rate;           // float64 scalar
  Tensor weight_decay;            // float64 scalar
  Tensor gradient_scale;          // float64 scalar
  Tensor skip;                    // float64 scalar
  Settings settings;

  int64_t count() const { return weights.numel(); }
};

inline void check_call(const Call& call) {
  const Tensor& weights = call.weights;
  STD_TORCH_CHECK(is_float_or_double(weights), "adamw: weights must be float32 or float64");
  check_flat(weights, "adamw: weights");
  for (const Tensor* tensor : {&call.gradient, &call.first_moment, &call.second_moment}) {
    STD_TORCH_CHECK(tensor->scalar_type() == weights.scalar_type() && tensor->numel() == weights.numel() &&
                        tensor->device() == weights.device(),
                    "adamw: gradient and moments must be like the weights");
    check_flat(*tensor, "adamw: gradient and moments");
  }
  check_scalar(call.num_updates, ScalarType::Float, weights, "adamw: num_updates");
  check_scalar(call.learning_rate, ScalarType::Double, weights, "adamw: learning_rate");
  check_scalar(call.weight_decay, ScalarType::Double, weights, "adamw: weight_decay");
  check_scalar(call.gradient_scale, ScalarType::Double, weights, "adamw: gradient_scale");
  check_scalar(call.skip, ScalarType::Double, weights, "adamw: skip");
  if (call.rounded) {
    const ScalarType type = call.rounded->scalar_type();
    STD_TORCH_CHECK(weights.scalar_type() == ScalarType::Float &&
                        (type == ScalarType::BFloat16 || type == ScalarType::Half) &&
                        call.rounded->numel() == weights.numel() && call.rounded->device() == weights.device(),
                    "adamw: rounded must be bfloat16 or float16, as long as the weights, which then are float32");
    check_flat(*call.rounded, "adamw: rounded");
  }
}

}  // namespace megallm::adamw
