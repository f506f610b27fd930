// AdamW on the CPU: one pass over weights, gradient and moments.

#include "include/adamw.h"

#include <cmath>

#include "cpu/simd.h"

namespace megallm::adamw {
namespace {

using simd::narrow;
using torch::headeronly::BFloat16;
using torch::headeronly::Half;

constexpr int64_t kGrain = 32768;

struct NotRounded {};

// Numbers of one step, in the type that the update is computed in.
template <typename Scalar>
struct Step {
  Scalar gradient_scale;
  Scalar first_rate;  // 1 - beta1
  Scalar beta2;
  Scalar second_rate;      // 1 - beta2
  Scalar reciprocal_root;  // 1 / sqrt(1 - beta2^t)
  Scalar epsilon;
  Scalar step_size;  // learning rate / (1 - beta1^t)
  Scalar kept;       // 1 - learning rate * weight decay
};

template <typename Scalar, typename Rounded>
struct Arrays {
  Scalar* weights;
  const Scalar* gradient;
  Scalar* first_moment;
  Scalar* second_moment;
  Rounded* rounded;
};

template <typename Scalar, typename Rounded>
MEGALLM_INLINE void update_elements(const Arrays<Scalar, Rounded>& arrays, const Step<Scalar>& step, int64_t begin,
                                    int64_t end) {
  Scalar* __restrict__ weights = arrays.weights;
  const Scalar* __restrict__ gradient = arrays.gradient;
  Scalar* __restrict__ first_moment = arrays.first_moment;
  Scalar* __restrict__ second_moment = arrays.second_moment;
  Rounded* __restrict__ rounded = arrays.rounded;
#pragma omp simd
  for (int64_t i = begin; i < end; ++i) {
    const Scalar scaled = gradient[i] * step.gradient_scale;
    const Scalar first = first_moment[i] + step.first_rate * (scaled - first_moment[i]);
    const Scalar second = step.beta2 * second_moment[i] + step.second_rate * (scaled * scaled);
    const Scalar denominator = std::sqrt(second) * step.reciprocal_root + step.epsilon;
    const Scalar weight = step.kept * weights[i] - step.step_size * (first / denominator);
    first_moment[i] = first;
    second_moment[i] = second;
    weights[i] = weight;
    if constexpr (!std::is_same_v<Rounded, NotRounded>) {
      narrow(weight, rounded[i]);
    }
  }
}

// Per-processor versions exist for plain functions only, not for templates.
#define MEGALLM_ADAMW_RANGE(Scalar, Rounded)                                                                       \
  MEGALLM_CLONES void update_range(const Arrays<Scalar, Rounded>& arrays, const Step<Scalar>& step, int64_t begin, \
                                   int64_t end) {                                                                  \
    update_elements(arrays, step, begin, end);                                                                     \
  }

MEGALLM_ADAMW_RANGE(float, NotRounded)
MEGALLM_ADAMW_RANGE(double, NotRounded)
MEGALLM_ADAMW_RANGE(float, BFloat16)
MEGALLM_ADAMW_RANGE(float, Half)
#undef MEGALLM_ADAMW_RANGE

template <typename Scalar>
Scalar* data(const Tensor& tensor) {
  return static_cast<Scalar*>(tensor.mutable_data_ptr());
}

template <typename Scalar, typename Rounded>
void run(const Call& call) {
  const Settings& settings = call.settings;
  const double updates = *data<float>(call.num_updates) + 1.0;
  const double learning_rate = *data<double>(call.learning_rate);
  const double weight_decay = *data<double>(call.weight_decay);
  const Step<Scalar> step{
      static_cast<Scalar>(*data<double>(call.gradient_scale)),
      static_cast<Scalar>(1.0 - settings.beta1),
      static_cast<Scalar>(settings.beta2),
      static_cast<Scalar>(1.0 - settings.beta2),
      static_cast<Scalar>(1.0 / std::sqrt(1.0 - std::pow(settings.beta2, updates))),
      static_cast<Scalar>(settings.epsilon),
      static_cast<Scalar>(learning_rate / (1.0 - std::pow(settings.beta1, updates))),
      static_cast<Scalar>(1.0 - learning_rate * weight_decay),
  };
  const Arrays<Scalar, Rounded> arrays{data<Scalar>(call.weights), data<Scalar>(call.gradient),
                                       data<Scalar>(call.first_moment), data<Scalar>(call.second_moment),
                                       call.rounded ? data<Rounded>(*call.rounded) : nullptr};
  torch::stable::parallel_for(0, call.count(), kGrain,
                              [&](int64_t begin, int64_t end) { update_range(arrays, step, begin, end); });
  *data<float>(call.num_updates) = static_cast<float>(updates);
}

void adamw(const Tensor& weights, const Tensor& gradient, const Tensor& first_moment, const Tensor& second_moment,
           const Tensor& num_updates, const std::optional<Tensor>& rounded, const Tensor& learning_rate,
           const Tensor& weight_decay, const Tensor& gradient_scale, const Tensor& skip, double beta1, double beta2,
           double epsilon) {
  const Call call{weights,
                  gradient,
                  first_moment,
                  second_moment,
                  num_updates,
                  rounded,
                  learning_rate,
                  weight_decay,
                  gradient_scale,
                  skip,
                  Settings{beta1, beta2, epsilon}};
  check_call(call);
  if (*data<double>(skip) != 0.0) {
    return;
  }
  if (weights.scalar_type() == ScalarType::Double) {
    run<double, NotRounded>(call);
  } else if (!rounded) {
    run<float, NotRounded>(call);
  } else if (rounded->scalar_type() == ScalarType::BFloat16) {
    run<float, BFloat16>(call);
  } else {
    run<float, Half>(call);
  }
}

}  // namespace
}  // namespace megallm::adamw

STABLE_TORCH_LIBRARY_FRAGMENT(megallm, library) {
  library.def(
      "adamw_(Tensor(a!) weights, Tensor gradient, Tensor(b!) first_moment, Tensor(c!) second_moment, Tensor(d!) "
      "num_updates, Tensor(e!)? rounded, Tensor learning_rate, Tensor weight_decay, Tensor gradient_scale, Tensor "
      "skip, float beta1, float beta2, float epsilon) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(megallm, CPU, library) { library.impl("adamw_", TORCH_BOX(&megallm::adamw::adamw)); }
