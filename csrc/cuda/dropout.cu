// Bias, dropout and residual addition on CUDA devices.

#include "include/column_sums.cuh"
#include "include/dropout.cuh"
#include "include/dropout.h"
#include "include/strips.cuh"

namespace megallm::dropout {
namespace {

using cuda::AccumulatorOf;
using cuda::DropoutArguments;
using cuda::load;
using cuda::narrow;
using cuda::Vector;
using cuda::widen;

template <int kVectorSize, typename Scalar, typename A>
struct ForwardWork {
  static constexpr int kSize = kVectorSize;
  static constexpr int kSums = 0;
  using Accumulator = A;

  struct Columns {
    A bias[kSize];
    philox::Key generator;
  };
  struct Loaded {
    Vector<Scalar, kSize> x;
    Vector<Scalar, kSize> residual;
    int64_t number;
  };

  DropoutArguments<A> dropout;
  const Scalar* x;
  int64_t x_stride;
  const Scalar* bias;      // or null
  const Scalar* residual;  // or null
  int64_t residual_stride;
  int width;
  Scalar* y;

  __device__ __forceinline__ void begin(int column, Columns& columns) const {
    columns.generator = dropout.generator();
    Vector<Scalar, kSize> loaded = {};
    if (bias != nullptr) {
      loaded = cuda::load<kSize>(bias + column);
    }
#pragma unroll
    for (int i = 0; i < kSize; ++i) {
      columns.bias[i] = widen(loaded.values[i]);
    }
  }

  __device__ __forceinline__ void load(int64_t row, int column, Loaded& loaded) const {
    loaded.number = dropout.rows[row];
    loaded.x = cuda::load<kSize>(x + row * x_stride + column);
    loaded.residual = {};
    if (residual != nullptr) {
      loaded.residual = cuda::load<kSize>(residual + row * residual_stride + column);
    }
  }

  __device__ __forceinline__ void store(int64_t row, int column, const Loaded& loaded, Columns& columns) const {
    A values[kSize];
#pragma unroll
    for (int i = 0; i < kSize; ++i) {
      values[i] = widen(loaded.x.values[i]) + columns.bias[i];
    }
    cuda::drop<kSize>(dropout, columns.generator, loaded.number, column, values);
    Vector<Scalar, kSize> result;
#pragma unroll
    for (int i = 0; i < kSize; ++i) {
      narrow(values[i] + widen(loaded.residual.values[i]), result.values[i]);
    }
    cuda::store<kSize>(y + row * width + column, result);
  }
};

template <bool kBias, int kVectorSize, typename Scalar, typename A>
struct BackwardWork {
  static constexpr int kSize = kVectorSize;
  static constexpr int kSums = kBias ? kSize : 0;
  using Accumulator = A;

  struct Columns {
    A sums[kBias ? kSize : 1];
    philox::Key generator;
  };
  struct Loaded {
    Vector<Scalar, kSize> grad_output;
    int64_t number;
  };

  DropoutArguments<A> dropout;
  const Scalar* grad_output;
  int64_t grad_output_stride;
  int width;
  Scalar* grad_input;
  A* partials;  // [chunks, partials_width], or null without a bias
  int64_t partials_width;

  __device__ __forceinline__ int64_t sum_column(int column, int i) const { return column + i; }

  __device__ __forceinline__ void begin(int, Columns& columns) const {
    columns.generator = dropout.generator();
#pragma unroll
    for (int i = 0; i < kSums; ++i) {
      columns.sums[i] = A(0);
    }
  }

  __device__ __forceinline__ void load(int64_t row, int column, Loaded& loaded) const {
    loaded.number = dropout.rows[row];
    loaded.grad_output = cuda::load<kSize>(grad_output + row * grad_output_stride + column);
  }

  __device__ __forceinline__ void store(int64_t row, int column, const Loaded& loaded, Columns& columns) const {
    A values[kSize];
#pragma unroll
    for (int i = 0; i < kSize; ++i) {
      values[i] = widen(loaded.grad_output.values[i]);
    }
    cuda::drop<kSize>(dropout, columns.generator, loaded.number, column, values);
    Vector<Scalar, kSize> result;
#pragma unroll
    for (int i = 0; i < kSize; ++i) {
      if constexpr (kBias) {
        columns.sums[i] += values[i];
      }
      narrow(values[i], result.values[i]);
    }
    cuda::store<kSize>(grad_input + row * width + column, result);
  }
};

template <int kSize, typename Scalar>
void launch_forward(const Forward& call, const Scalar* bias, const Scalar* residual, cudaStream_t stream) {
  using A = typename AccumulatorOf<Scalar>::type;
  const Rows& x = call.x;
  const ForwardWork<kSize, Scalar, A> work{cuda::dropout_arguments<A>(call.mask),
                                           x.data<Scalar>(),
                                           x.stride,
                                           bias,
                                           residual,
                                           call.residual ? call.residual->stride : 0,
                                           static_cast<int>(x.width),
                                           static_cast<Scalar*>(call.y.mutable_data_ptr())};
  const cuda::Strips strips = cuda::choose_strips(x.count, x.width, kSize, false);
  cuda::launch_strips(work, strips, x.count, x.width, stream, "dropout_add");
}

template <typename Scalar>
void run_forward(const Forward& call) {
  constexpr int kSize = cuda::kVector<Scalar>;
  const Rows& x = call.x;
  const auto aligned = [&](const void* data, int64_t stride) {
    return cuda::aligned(data, stride, x.count, sizeof(Scalar));
  };
  const Scalar* bias = call.bias ? static_cast<const Scalar*>(call.bias->const_data_ptr()) : nullptr;
  const Scalar* residual = call.residual ? call.residual->data<Scalar>() : nullptr;
  const bool vectors = x.width % kSize == 0 && aligned(x.data<Scalar>(), x.stride) && aligned(bias, 0) &&
                       aligned(residual, call.residual ? call.residual->stride : 0) &&
                       aligned(call.y.const_data_ptr(), x.width);
  const cudaStream_t stream = cuda::current_stream(x.tensor);
  vectors ? launch_forward<kSize>(call, bias, residual, stream) : launch_forward<1>(call, bias, residual, stream);
}

template <bool kBias, int kSize, typename Scalar>
void launch_backward(const Backward& call, cudaStream_t stream) {
  using A = typename AccumulatorOf<Scalar>::type;
  const Rows& grad = call.grad_output;
  const cuda::Strips strips = cuda::choose_strips(grad.count, grad.width, kSize, kBias);
  std::optional<Tensor> workspace;
  A* partials = nullptr;
  if (kBias) {
    const int64_t sizes[] = {strips.chunks, grad.width};
    workspace = torch::stable::new_empty(call.grad_bias, torch::headeronly::IntHeaderOnlyArrayRef(sizes, 2));
    partials = static_cast<A*>(workspace->mutable_data_ptr());
  }
  const BackwardWork<kBias, kSize, Scalar, A> work{cuda::dropout_arguments<A>(call.mask),
                                                   grad.data<Scalar>(),
                                                   grad.stride,
                                                   static_cast<int>(grad.width),
                                                   static_cast<Scalar*>(call.grad_input.mutable_data_ptr()),
                                                   partials,
                                                   grad.width};
  cuda::launch_strips(work, strips, grad.count, grad.width, stream, "dropout_add_backward");
  if (kBias) {
    cuda::sum_partials(partials, strips.chunks, grad.width, static_cast<A*>(call.grad_bias.mutable_data_ptr()), stream);
  }
}

template <typename Scalar>
void run_backward(const Backward& call) {
  constexpr int kSize = cuda::kVector<Scalar>;
  const Rows& grad = call.grad_output;
  const bool vectors = grad.width % kSize == 0 &&
                       cuda::aligned(grad.data<Scalar>(), grad.stride, grad.count, sizeof(Scalar)) &&
                       cuda::aligned(call.grad_input.const_data_ptr(), grad.width, grad.count, sizeof(Scalar));
  const cudaStream_t stream = cuda::current_stream(grad.tensor);
  if (call.bias) {
    vectors ? launch_backward<true, kSize, Scalar>(call, stream) : launch_backward<true, 1, Scalar>(call, stream);
  } else {
    vectors ? launch_backward<false, kSize, Scalar>(call, stream) : launch_backward<false, 1, Scalar>(call, stream);
  }
}

Tensor forward(const Tensor& x, const std::optional<Tensor>& bias, const std::optional<Tensor>& residual,
               const Tensor& key, const Tensor& step, const Tensor& rows, double drop) {
  const torch::stable::accelerator::DeviceGuard guard(x.get_device_index());
  const Forward call = prepare_forward(x, bias, residual, key, step, rows, drop);
  if (x.numel() > 0) {
    cuda::dispatch(x, [&](auto scalar) { run_forward<decltype(scalar)>(call); });
  }
  return call.y;
}

std::tuple<Tensor, Tensor> backward(const Tensor& grad_output, const Tensor& key, const Tensor& step,
                                    const Tensor& rows, double drop, bool bias) {
  const torch::stable::accelerator::DeviceGuard guard(grad_output.get_device_index());
  Backward call = prepare_backward(grad_output, key, step, rows, drop, bias);
  if (grad_output.numel() > 0) {
    cuda::dispatch(grad_output, [&](auto scalar) { run_backward<decltype(scalar)>(call); });
  } else {
    torch::stable::zero_(call.grad_bias);
  }
  return {call.grad_input, call.grad_bias};
}

}  // namespace
}  // namespace megallm::dropout

STABLE_TORCH_LIBRARY_IMPL(megallm, CUDA, library) {
  library.impl("dropout_add", TORCH_BOX(&megallm::dropout::forward));
  library.impl("dropout_add_backward", TORCH_BOX(&megallm::dropout::backward));
}
