// AdamW on CUDA devices: one pass over weights, gradient and moments, in accesses of 16 bytes.
//
// One thread makes the numbers of the step from the scalars on the device; the threads of the pass read them. So
// nothing waits for the host, and a recorded graph takes the learning rate that is there when it runs.

#include <algorithm>

#include "include/adamw.h"
#include "include/cuda_support.cuh"

namespace megallm::adamw {
namespace {

using cuda::load;
using cuda::narrow;
using cuda::store;
using cuda::Vector;

constexpr int kThreads = 256;

struct NotRounded {};

// As the first kernel leaves them for the second.
struct Step {
  double gradient_scale;
  double reciprocal_root;  // 1 / sqrt(1 - beta2^t)
  double step_size;        // learning rate / (1 - beta1^t)
  double kept;             // 1 - learning rate * weight decay
  double skip;
};
constexpr int64_t kNumbersOfStep = sizeof(Step) / sizeof(double);

__global__ void prepare_kernel(const double* learning_rate, const double* weight_decay, const double* gradient_scale,
                               const double* skip, Settings settings, float* num_updates, Step* step) {
  const double updates = *num_updates + 1.0;
  step->gradient_scale = *gradient_scale;
  step->reciprocal_root = 1.0 / sqrt(1.0 - pow(settings.beta2, updates));
  step->step_size = *learning_rate / (1.0 - pow(settings.beta1, updates));
  step->kept = 1.0 - *learning_rate * *weight_decay;
  step->skip = *skip;
  if (*skip == 0.0) {
    *num_updates = static_cast<float>(updates);
  }
}

template <typename Scalar, typename Rounded>
struct Arguments {
  Scalar* weights;
  const Scalar* gradient;
  Scalar* first_moment;
  Scalar* second_moment;
  Rounded* rounded;
  int64_t count;
  Scalar first_rate;  // 1 - beta1
  Scalar beta2;
  Scalar second_rate;  // 1 - beta2
  Scalar epsilon;
  const Step* step;
};

template <int kSize, typename Scalar, typename Rounded>
__device__ __forceinline__ void update(const Arguments<Scalar, Rounded>& arguments, int64_t index,
                                       Scalar gradient_scale, Scalar reciprocal_root, Scalar step_size, Scalar kept) {
  Vector<Scalar, kSize> weights = load<kSize>(arguments.weights + index);
  const Vector<Scalar, kSize> gradient = load<kSize>(arguments.gradient + index);
  Vector<Scalar, kSize> first = load<kSize>(arguments.first_moment + index);
  Vector<Scalar, kSize> second = load<kSize>(arguments.second_moment + index);
#pragma unroll
  for (int i = 0; i < kSize; ++i) {
    const Scalar scaled = gradient.values[i] * gradient_scale;
    first.values[i] += arguments.first_rate * (scaled - first.values[i]);
    second.values[i] = arguments.beta2 * second.values[i] + arguments.second_rate * (scaled * scaled);
    const Scalar denominator = sqrt(second.values[i]) * reciprocal_root + arguments.epsilon;
    weights.values[i] = kept * weights.values[i] - step_size * (first.values[i] / denominator);
  }
  store<kSize>(arguments.weights + index, weights);
  store<kSize>(arguments.first_moment + index, first);
  store<kSize>(arguments.second_moment + index, second);
  if constexpr (!std::is_same_v<Rounded, NotRounded>) {
    Vector<Rounded, kSize> rounded;
#pragma unroll
    for (int i = 0; i < kSize; ++i) {
      narrow(weights.values[i], rounded.values[i]);
    }
    store<kSize>(arguments.rounded + index, rounded);
  }
}

template <int kSize, typename Scalar, typename Rounded>
__global__ void __launch_bounds__(kThreads) update_kernel(const Arguments<Scalar, Rounded> arguments) {
  if (arguments.step->skip != 0.0) {
    return;
  }
  const Scalar gradient_scale = static_cast<Scalar>(arguments.step->gradient_scale);
  const Scalar reciprocal_root = static_cast<Scalar>(arguments.step->reciprocal_root);
  const Scalar step_size = static_cast<Scalar>(arguments.step->step_size);
  const Scalar kept = static_cast<Scalar>(arguments.step->kept);
  const int64_t thread = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  const int64_t threads = static_cast<int64_t>(gridDim.x) * kThreads;
  const int64_t vectors = arguments.count / kSize;
  for (int64_t vector = thread; vector < vectors; vector += threads) {
    update<kSize>(arguments, vector * kSize, gradient_scale, reciprocal_root, step_size, kept);
  }
  if (kSize > 1) {
    const int64_t index = vectors * kSize + thread;
    if (index < arguments.count) {
      update<1>(arguments, index, gradient_scale, reciprocal_root, step_size, kept);
    }
  }
}

template <typename Scalar>
Scalar* data(const Tensor& tensor) {
  return static_cast<Scalar*>(tensor.mutable_data_ptr());
}

template <int kSize, typename Scalar, typename Rounded>
void launch(const Arguments<Scalar, Rounded>& arguments, cudaStream_t stream) {
  // Each thread has one vector as a rule; more blocks than this only wait for one another.
  constexpr int64_t kMaxBlocks = int64_t{1} << 30;
  const int64_t blocks = std::max<int64_t>(1, (arguments.count / kSize + kThreads - 1) / kThreads);
  update_kernel<kSize><<<static_cast<unsigned>(std::min(blocks, kMaxBlocks)), kThreads, 0, stream>>>(arguments);
  cuda::check(cudaGetLastError(), "adamw_");
}

template <typename Scalar, typename Rounded>
void run(const Call& call, const Step* step, cudaStream_t stream) {
  const Settings& settings = call.settings;
  const Arguments<Scalar, Rounded> arguments{data<Scalar>(call.weights),
                                             data<Scalar>(call.gradient),
                                             data<Scalar>(call.first_moment),
                                             data<Scalar>(call.second_moment),
                                             call.rounded ? data<Rounded>(*call.rounded) : nullptr,
                                             call.count(),
                                             static_cast<Scalar>(1.0 - settings.beta1),
                                             static_cast<Scalar>(settings.beta2),
                                             static_cast<Scalar>(1.0 - settings.beta2),
                                             static_cast<Scalar>(settings.epsilon),
                                             step};
  constexpr int kSize = 16 / sizeof(Scalar);
  const auto aligned = [](const void* pointer) { return cuda::aligned(pointer, 0, 1, 1); };
  if (aligned(arguments.weights) && aligned(arguments.gradient) && aligned(arguments.first_moment) &&
      aligned(arguments.second_moment) && aligned(arguments.rounded)) {
    launch<kSize>(arguments, stream);
  } else {
    launch<1>(arguments, stream);
  }
}

void adamw(const Tensor& weights, const Tensor& gradient, const Tensor& first_moment, const Tensor& second_moment,
           const Tensor& num_updates, const std::optional<Tensor>& rounded, const Tensor& learning_rate,
           const Tensor& weight_decay, const Tensor& gradient_scale, const Tensor& skip, double beta1, double beta2,
           double epsilon) {
  const torch::stable::accelerator::DeviceGuard guard(weights.get_device_index());
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
  const cudaStream_t stream = cuda::current_stream(weights);
  const int64_t sizes[] = {kNumbersOfStep};
  const Tensor numbers = torch::stable::new_empty(learning_rate, torch::headeronly::IntHeaderOnlyArrayRef(sizes, 1));
  Step* step = static_cast<Step*>(numbers.mutable_data_ptr());
  prepare_kernel<<<1, 1, 0, stream>>>(data<double>(learning_rate), data<double>(weight_decay),
                                      data<double>(gradient_scale), data<double>(skip), call.settings,
                                      data<float>(num_updates), step);
  cuda::check(cudaGetLastError(), "adamw_");
  if (call.count() == 0) {
    return;
  }
  if (weights.scalar_type() == ScalarType::Double) {
    run<double, NotRounded>(call, step, stream);
  } else if (!rounded) {
    run<float, NotRounded>(call, step, stream);
  } else if (rounded->scalar_type() == ScalarType::BFloat16) {
    run<float, __nv_bfloat16>(call, step, stream);
  } else {
    run<float, __half>(call, step, stream);
  }
}

}  // namespace
}  // namespace megallm::adamw

STABLE_TORCH_LIBRARY_IMPL(megallm, CUDA, library) { library.impl("adamw_", TORCH_BOX(&megallm::adamw::adamw)); }
