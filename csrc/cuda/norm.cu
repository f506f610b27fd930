// LayerNorm and RMSNorm on CUDA devices.
//
// A row belongs to a warp when it is short and to a block otherwise. The first vectors of each thread are read once and
// kept in registers; whatever a very long row has beyond them is read again, from the cache as a rule.

#include "include/norm.h"

#include <algorithm>

#include "include/column_sums.cuh"
#include "include/groups.cuh"

namespace megallm::norm {
namespace {

using cuda::kWarp;
using cuda::load;
using cuda::narrow;
using cuda::store;
using cuda::Vector;
using cuda::widen;

// Fewer rows than this per partial sum of the parameters' gradients, and writing the partial sums would cost more than
// it helps.
constexpr int64_t kMinRowsPerPartial = 16;

// Vectors of one thread that are kept in registers. A centred norm has a weight and a bias, and two sums, for each
// column.
template <bool kCentred>
constexpr int kCachedVectors = kCentred ? 2 : 4;

template <typename Scalar, typename Parameter, typename Accumulator>
struct ForwardArguments {
  const Scalar* x;
  int64_t x_stride;
  const Scalar* residual;  // or null
  int64_t residual_stride;
  const Parameter* weight;
  const Parameter* bias;  // or null
  Accumulator epsilon;
  int64_t rows;
  int width;
  Accumulator reciprocal_width;
  Scalar* sum;  // null without a residual
  Scalar* y;
  Accumulator* mean;
  Accumulator* reciprocal;
};

template <typename Scalar, typename Parameter, typename Accumulator>
struct BackwardArguments {
  const Scalar* grad_output;
  int64_t grad_output_stride;
  const Scalar* sum;
  int64_t sum_stride;
  const Scalar* grad_sum;  // or null
  int64_t grad_sum_stride;
  const Parameter* weight;
  const Accumulator* mean;
  const Accumulator* reciprocal;
  int64_t rows;
  int width;
  Accumulator reciprocal_width;
  Scalar* grad_input;
  Accumulator* partials;  // [groups, 1 or 2, width]
};

// A parameter at `column`, or `otherwise` where there is none.
template <int kSize, typename Parameter, typename Accumulator>
__device__ __forceinline__ void load_parameter(const Parameter* parameter, Accumulator otherwise, int column,
                                               Accumulator (&result)[kSize]) {
  if (parameter == nullptr) {
#pragma unroll
    for (int i = 0; i < kSize; ++i) {
      result[i] = otherwise;
    }
    return;
  }
  const Vector<Parameter, kSize> vector = load<kSize>(parameter + column);
#pragma unroll
  for (int i = 0; i < kSize; ++i) {
    result[i] = static_cast<Accumulator>(widen(vector.values[i]));
  }
}

// One vector of x, or of the rounded sum of x and the residual, which is also written.
template <int kSize, typename Scalar, typename Parameter, typename Accumulator>
__device__ __forceinline__ Vector<Scalar, kSize> load_sum(
    const ForwardArguments<Scalar, Parameter, Accumulator>& arguments, int64_t row, int column) {
  Vector<Scalar, kSize> x = load<kSize>(arguments.x + row * arguments.x_stride + column);
  if (arguments.residual != nullptr) {
    const Vector<Scalar, kSize> residual = load<kSize>(arguments.residual + row * arguments.residual_stride + column);
#pragma unroll
    for (int i = 0; i < kSize; ++i) {
      narrow(widen(x.values[i]) + widen(residual.values[i]), x.values[i]);
    }
    store<kSize>(arguments.sum + row * arguments.width + column, x);
  }
  return x;
}

template <int kSize, typename Scalar, typename Accumulator>
__device__ __forceinline__ Accumulator sum_of_values(const Vector<Scalar, kSize>& vector) {
  Accumulator sum = 0;
#pragma unroll
  for (int i = 0; i < kSize; ++i) {
    sum += static_cast<Accumulator>(widen(vector.values[i]));
  }
  return sum;
}

template <int kSize, typename Scalar, typename Accumulator>
__device__ __forceinline__ Accumulator sum_of_squares(const Vector<Scalar, kSize>& vector, Accumulator mean) {
  Accumulator sum = 0;
#pragma unroll
  for (int i = 0; i < kSize; ++i) {
    const Accumulator value = widen(vector.values[i]) - mean;
    sum += value * value;
  }
  return sum;
}

template <bool kCentred, int kSize, typename Scalar, typename Parameter, typename Accumulator>
__device__ __forceinline__ void write_normalised(const ForwardArguments<Scalar, Parameter, Accumulator>& arguments,
                                                 const Vector<Scalar, kSize>& x, Accumulator mean,
                                                 Accumulator reciprocal, int64_t row, int column) {
  Accumulator weight[kSize];
  load_parameter<kSize>(arguments.weight, Accumulator(1), column, weight);
  Vector<Scalar, kSize> result;
  if constexpr (kCentred) {
    Accumulator bias[kSize];
    load_parameter<kSize>(arguments.bias, Accumulator(0), column, bias);
#pragma unroll
    for (int i = 0; i < kSize; ++i) {
      narrow((widen(x.values[i]) - mean) * reciprocal * weight[i] + bias[i], result.values[i]);
    }
  } else {
#pragma unroll
    for (int i = 0; i < kSize; ++i) {
      narrow(widen(x.values[i]) * reciprocal * weight[i], result.values[i]);
    }
  }
  store<kSize>(arguments.y + row * arguments.width + column, result);
}

template <bool kCentred, int kSize, typename Scalar, typename Parameter, typename Accumulator>
__global__ void __launch_bounds__(cuda::kMaxGroupThreads, 1)
    forward_kernel(const ForwardArguments<Scalar, Parameter, Accumulator> arguments, bool row_per_block) {
  constexpr int kCached = kCachedVectors<kCentred>;
  __shared__ Accumulator scratch[2 * cuda::kMaxGroupThreads / kWarp];
  const cuda::Group group = cuda::this_group(row_per_block);
  const int width = arguments.width;
  const int step = group.size * kSize;
  const int first = group.lane * kSize;
  int turn = 0;
  for (int64_t row = group.index; row < arguments.rows; row += group.count) {
    // What a long row has beyond the cached vectors; of a sum, each thread reads what it wrote itself.
    const Scalar* rest =
        arguments.residual == nullptr ? arguments.x + row * arguments.x_stride : arguments.sum + row * arguments.width;
    Vector<Scalar, kSize> cached[kCached];
#pragma unroll
    for (int k = 0; k < kCached; ++k) {
      if (first + k * step < width) {
        cached[k] = load_sum<kSize>(arguments, row, first + k * step);
      }
    }
    Accumulator sum = 0;
    if constexpr (kCentred) {
#pragma unroll
      for (int k = 0; k < kCached; ++k) {
        if (first + k * step < width) {
          sum += sum_of_values<kSize, Scalar, Accumulator>(cached[k]);
        }
      }
    }
    Accumulator squares = 0;
#pragma unroll 1
    for (int column = first + kCached * step; column < width; column += step) {
      const Vector<Scalar, kSize> x = load_sum<kSize>(arguments, row, column);
      if constexpr (kCentred) {
        sum += sum_of_values<kSize, Scalar, Accumulator>(x);
      } else {
        squares += sum_of_squares<kSize, Scalar, Accumulator>(x, Accumulator(0));
      }
    }
    Accumulator mean = 0;
    if constexpr (kCentred) {
      mean = cuda::sum_over_group(sum, group, scratch, turn) * arguments.reciprocal_width;
      cuda::forget_conversions(cached);
#pragma unroll 1
      for (int column = first + kCached * step; column < width; column += step) {
        squares += sum_of_squares<kSize, Scalar, Accumulator>(load<kSize>(rest + column), mean);
      }
    }
#pragma unroll
    for (int k = 0; k < kCached; ++k) {
      if (first + k * step < width) {
        squares += sum_of_squares<kSize, Scalar, Accumulator>(cached[k], mean);
      }
    }
    const Accumulator variance = cuda::sum_over_group(squares, group, scratch, turn) * arguments.reciprocal_width;
    const Accumulator reciprocal = rsqrt(variance + arguments.epsilon);
    if (group.lane == 0) {
      arguments.reciprocal[row] = reciprocal;
      if constexpr (kCentred) {
        arguments.mean[row] = mean;
      }
    }
    cuda::forget_conversions(cached);
#pragma unroll
    for (int k = 0; k < kCached; ++k) {
      if (first + k * step < width) {
        write_normalised<kCentred, kSize>(arguments, cached[k], mean, reciprocal, row, first + k * step);
      }
    }
#pragma unroll 1
    for (int column = first + kCached * step; column < width; column += step) {
      write_normalised<kCentred, kSize>(arguments, load<kSize>(rest + column), mean, reciprocal, row, column);
    }
  }
}

// The sums of a row's gradient that its elements need.
template <typename Accumulator>
struct RowSums {
  Accumulator products;  // of the gradient and the centred row
  Accumulator grads;     // when centred
};

template <bool kCentred, int kSize, typename Scalar, typename Parameter, typename Accumulator>
__device__ __forceinline__ void add_to_sums(const BackwardArguments<Scalar, Parameter, Accumulator>& arguments,
                                            const Vector<Scalar, kSize>& grad_output, const Vector<Scalar, kSize>& x,
                                            Accumulator mean, int column, RowSums<Accumulator>& sums) {
  Accumulator weight[kSize];
  load_parameter<kSize>(arguments.weight, Accumulator(1), column, weight);
#pragma unroll
  for (int i = 0; i < kSize; ++i) {
    const Accumulator grad = widen(grad_output.values[i]) * weight[i];
    sums.products += grad * (widen(x.values[i]) - mean);
    if constexpr (kCentred) {
      sums.grads += grad;
    }
  }
}

// Statistics of a row and the means of its gradient.
template <typename Accumulator>
struct RowMeans {
  Accumulator mean;
  Accumulator reciprocal;
  Accumulator products;
  Accumulator grads;
};

// Writes the input gradient of one vector and adds to the sums of the parameters' gradients.
template <bool kCentred, int kSize, typename Scalar, typename Parameter, typename Accumulator>
__device__ __forceinline__ void write_gradient(const BackwardArguments<Scalar, Parameter, Accumulator>& arguments,
                                               const Vector<Scalar, kSize>& grad_output, const Vector<Scalar, kSize>& x,
                                               const RowMeans<Accumulator>& means, int64_t row, int column,
                                               Accumulator (&weight_sums)[kSize], Accumulator (&bias_sums)[kSize]) {
  Accumulator weight[kSize];
  load_parameter<kSize>(arguments.weight, Accumulator(1), column, weight);
  Accumulator gradient[kSize];
#pragma unroll
  for (int i = 0; i < kSize; ++i) {
    const Accumulator normalised = (widen(x.values[i]) - means.mean) * means.reciprocal;
    const Accumulator grad = widen(grad_output.values[i]);
    gradient[i] = means.reciprocal * (grad * weight[i] - means.grads - normalised * means.products);
    weight_sums[i] += grad * normalised;
    if constexpr (kCentred) {
      bias_sums[i] += grad;
    }
  }
  if (arguments.grad_sum != nullptr) {
    const Vector<Scalar, kSize> grad_sum = load<kSize>(arguments.grad_sum + row * arguments.grad_sum_stride + column);
#pragma unroll
    for (int i = 0; i < kSize; ++i) {
      gradient[i] += widen(grad_sum.values[i]);
    }
  }
  Vector<Scalar, kSize> result;
#pragma unroll
  for (int i = 0; i < kSize; ++i) {
    narrow(gradient[i], result.values[i]);
  }
  store<kSize>(arguments.grad_input + row * arguments.width + column, result);
}

// As many groups as the device holds at once, each with its own partial sums of the parameters' gradients: in registers
// for the cached part of a row, in its row of the workspace (which starts at zero) for the rest.
template <bool kCentred, int kSize, typename Scalar, typename Parameter, typename Accumulator>
__global__ void __launch_bounds__(cuda::kMaxGroupThreads, 1)
    backward_kernel(const BackwardArguments<Scalar, Parameter, Accumulator> arguments, bool row_per_block) {
  constexpr int kCached = kCachedVectors<kCentred>;
  __shared__ Accumulator scratch[2 * cuda::kMaxGroupThreads / kWarp];
  const cuda::Group group = cuda::this_group(row_per_block);
  const int width = arguments.width;
  const int step = group.size * kSize;
  const int first = group.lane * kSize;
  Accumulator* weight_partial = arguments.partials + static_cast<int64_t>(group.index) * width * (kCentred ? 2 : 1);
  Accumulator* bias_partial = weight_partial + (kCentred ? width : 0);
  Vector<Accumulator, kSize> weight_sums[kCached] = {};
  Vector<Accumulator, kSize> bias_sums[kCentred ? kCached : 1] = {};
  int turn = 0;
  for (int64_t row = group.index; row < arguments.rows; row += group.count) {
    const Scalar* grad_output = arguments.grad_output + row * arguments.grad_output_stride;
    const Scalar* x = arguments.sum + row * arguments.sum_stride;
    RowMeans<Accumulator> means;
    means.mean = kCentred ? arguments.mean[row] : Accumulator(0);
    means.reciprocal = arguments.reciprocal[row];
    Vector<Scalar, kSize> cached_x[kCached];
    Vector<Scalar, kSize> cached_grad[kCached];
#pragma unroll
    for (int k = 0; k < kCached; ++k) {
      if (first + k * step < width) {
        cached_x[k] = load<kSize>(x + first + k * step);
        cached_grad[k] = load<kSize>(grad_output + first + k * step);
      }
    }
    RowSums<Accumulator> sums{};
#pragma unroll
    for (int k = 0; k < kCached; ++k) {
      if (first + k * step < width) {
        add_to_sums<kCentred, kSize>(arguments, cached_grad[k], cached_x[k], means.mean, first + k * step, sums);
      }
    }
#pragma unroll 1
    for (int column = first + kCached * step; column < width; column += step) {
      add_to_sums<kCentred, kSize>(arguments, load<kSize>(grad_output + column), load<kSize>(x + column), means.mean,
                                   column, sums);
    }
    means.products =
        cuda::sum_over_group(sums.products, group, scratch, turn) * means.reciprocal * arguments.reciprocal_width;
    means.grads =
        kCentred ? cuda::sum_over_group(sums.grads, group, scratch, turn) * arguments.reciprocal_width : Accumulator(0);
    cuda::forget_conversions(cached_x);
    cuda::forget_conversions(cached_grad);
#pragma unroll
    for (int k = 0; k < kCached; ++k) {
      if (first + k * step < width) {
        write_gradient<kCentred, kSize>(arguments, cached_grad[k], cached_x[k], means, row, first + k * step,
                                        weight_sums[k].values, bias_sums[kCentred ? k : 0].values);
      }
    }
#pragma unroll 1
    for (int column = first + kCached * step; column < width; column += step) {
      Vector<Accumulator, kSize> sums_of_weight = load<kSize>(weight_partial + column);
      Vector<Accumulator, kSize> sums_of_bias = {};
      if constexpr (kCentred) {
        sums_of_bias = load<kSize>(bias_partial + column);
      }
      write_gradient<kCentred, kSize>(arguments, load<kSize>(grad_output + column), load<kSize>(x + column), means, row,
                                      column, sums_of_weight.values, sums_of_bias.values);
      store<kSize>(weight_partial + column, sums_of_weight);
      if constexpr (kCentred) {
        store<kSize>(bias_partial + column, sums_of_bias);
      }
    }
  }
#pragma unroll
  for (int k = 0; k < kCached; ++k) {
    if (first + k * step < width) {
      store<kSize>(weight_partial + first + k * step, weight_sums[k]);
      if constexpr (kCentred) {
        store<kSize>(bias_partial + first + k * step, bias_sums[kCentred ? k : 0]);
      }
    }
  }
}

template <bool kCentred, int kSize, typename Scalar, typename Parameter, typename Accumulator>
void launch_forward(const ForwardArguments<Scalar, Parameter, Accumulator>& arguments, cudaStream_t stream) {
  const cuda::GroupShape shape = cuda::choose_group_shape(arguments.width, kSize, kCachedVectors<kCentred>);
  forward_kernel<kCentred, kSize>
      <<<cuda::grid_for_groups(arguments.rows, shape), shape.threads, 0, stream>>>(arguments, shape.row_per_block);
  cuda::check(cudaGetLastError(), "norm_forward");
}

template <bool kCentred, typename Scalar, typename Parameter, typename Accumulator>
void run_forward(const Forward& call, double epsilon) {
  const Rows& x = call.x;
  const ForwardArguments<Scalar, Parameter, Accumulator> arguments{
      x.data<Scalar>(),
      x.stride,
      call.residual ? call.residual->data<Scalar>() : nullptr,
      call.residual ? call.residual->stride : 0,
      static_cast<const Parameter*>(call.weight.const_data_ptr()),
      call.bias ? static_cast<const Parameter*>(call.bias->const_data_ptr()) : nullptr,
      static_cast<Accumulator>(epsilon),
      x.count,
      static_cast<int>(x.width),
      Accumulator(1) / static_cast<Accumulator>(x.width),
      call.residual ? static_cast<Scalar*>(call.sum.mutable_data_ptr()) : nullptr,
      static_cast<Scalar*>(call.y.mutable_data_ptr()),
      static_cast<Accumulator*>(call.mean.mutable_data_ptr()),
      static_cast<Accumulator*>(call.reciprocal.mutable_data_ptr())};
  // float64 is for checks: it has narrow accesses only.
  constexpr int kSize = cuda::kVector<Scalar>;
  const cudaStream_t stream = cuda::current_stream(x.tensor);
  const auto aligned = [&](const void* data, int64_t stride) {
    return cuda::aligned(data, stride, x.count, sizeof(Scalar));
  };
  const bool vectors = x.width % kSize == 0 && aligned(arguments.x, x.stride) &&
                       aligned(arguments.residual, arguments.residual_stride) && aligned(arguments.sum, x.width) &&
                       aligned(arguments.y, x.width) && cuda::aligned(arguments.weight, 0, 1, sizeof(Parameter)) &&
                       cuda::aligned(arguments.bias, 0, 1, sizeof(Parameter));
  vectors ? launch_forward<kCentred, kSize>(arguments, stream) : launch_forward<kCentred, 1>(arguments, stream);
}

// Groups that work on all rows together: what fits on the device at once, but no more than pays for its partial sums.
template <typename Kernel>
int64_t persistent_blocks(Kernel kernel, const cuda::GroupShape& shape, int64_t rows) {
  int device = 0;
  int processors = 0;
  int blocks_per_processor = 0;
  cuda::check(cudaGetDevice(&device), "norm_backward");
  cuda::check(cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, device), "norm_backward");
  cuda::check(cudaOccupancyMaxActiveBlocksPerMultiprocessor(&blocks_per_processor, kernel, shape.threads, 0),
              "norm_backward");
  const int64_t resident = static_cast<int64_t>(processors) * std::max(1, blocks_per_processor);
  const int64_t rows_per_block = shape.groups_per_block() * kMinRowsPerPartial;
  const int64_t useful = std::max<int64_t>(processors, (rows + rows_per_block - 1) / rows_per_block);
  const int64_t needed = (rows + shape.groups_per_block() - 1) / shape.groups_per_block();
  return std::min({resident, useful, needed});
}

template <bool kCentred, int kSize, typename Scalar, typename Parameter, typename Accumulator>
void launch_backward(BackwardArguments<Scalar, Parameter, Accumulator> arguments, const Tensor& grad_parameters,
                     cudaStream_t stream) {
  constexpr int kCached = kCachedVectors<kCentred>;
  const auto kernel = backward_kernel<kCentred, kSize, Scalar, Parameter, Accumulator>;
  const cuda::GroupShape shape = cuda::choose_group_shape(arguments.width, kSize, kCached);
  const int64_t blocks = persistent_blocks(kernel, shape, arguments.rows);
  const int64_t groups = blocks * shape.groups_per_block();
  const int64_t sizes[] = {groups, grad_parameters.numel()};
  const Tensor workspace =
      torch::stable::new_empty(grad_parameters, torch::headeronly::IntHeaderOnlyArrayRef(sizes, 2));
  const int64_t in_registers = static_cast<int64_t>(shape.row_per_block ? shape.threads : kWarp) * kSize * kCached;
  if (arguments.width > in_registers) {
    Tensor filled = workspace;
    torch::stable::zero_(filled);
  }
  arguments.partials = static_cast<Accumulator*>(workspace.mutable_data_ptr());
  kernel<<<static_cast<unsigned>(blocks), shape.threads, 0, stream>>>(arguments, shape.row_per_block);
  cuda::check(cudaGetLastError(), "norm_backward");
  cuda::sum_partials(arguments.partials, groups, grad_parameters.numel(),
                     static_cast<Accumulator*>(grad_parameters.mutable_data_ptr()), stream);
}

template <bool kCentred, typename Scalar, typename Parameter, typename Accumulator>
void run_backward(const Backward& call) {
  const int64_t rows = call.sum.count;
  const int64_t width = call.sum.width;
  const BackwardArguments<Scalar, Parameter, Accumulator> arguments{
      call.grad_output.data<Scalar>(),
      call.grad_output.stride,
      call.sum.data<Scalar>(),
      call.sum.stride,
      call.grad_sum ? call.grad_sum->data<Scalar>() : nullptr,
      call.grad_sum ? call.grad_sum->stride : 0,
      static_cast<const Parameter*>(call.weight.const_data_ptr()),
      static_cast<const Accumulator*>(call.mean.const_data_ptr()),
      static_cast<const Accumulator*>(call.reciprocal.const_data_ptr()),
      rows,
      static_cast<int>(width),
      Accumulator(1) / static_cast<Accumulator>(width),
      static_cast<Scalar*>(call.grad_input.mutable_data_ptr()),
      nullptr};
  constexpr int kSize = cuda::kVector<Scalar>;
  const auto aligned = [&](const void* data, int64_t stride) {
    return cuda::aligned(data, stride, rows, sizeof(Scalar));
  };
  const bool vectors = width % kSize == 0 && aligned(arguments.grad_output, arguments.grad_output_stride) &&
                       aligned(arguments.sum, arguments.sum_stride) &&
                       aligned(arguments.grad_sum, arguments.grad_sum_stride) && aligned(arguments.grad_input, width) &&
                       cuda::aligned(arguments.weight, 0, 1, sizeof(Parameter));
  const cudaStream_t stream = cuda::current_stream(call.sum.tensor);
  vectors ? launch_backward<kCentred, kSize>(arguments, call.grad_parameters, stream)
          : launch_backward<kCentred, 1>(arguments, call.grad_parameters, stream);
}

// Calls `run` with values of the element type, the parameters' type and the accumulation type.
template <typename Run>
void dispatch(const Tensor& x, const Tensor& weight, const Run& run) {
  const bool is_float = weight.scalar_type() == ScalarType::Float;
  switch (x.scalar_type()) {
    case ScalarType::Float:
      return run(float(), float(), float());
    case ScalarType::Double:
      return is_float ? run(double(), float(), double()) : run(double(), double(), double());
    case ScalarType::BFloat16:
      return is_float ? run(__nv_bfloat16(), float(), float()) : run(__nv_bfloat16(), __nv_bfloat16(), float());
    default:
      return is_float ? run(__half(), float(), float()) : run(__half(), __half(), float());
  }
}

std::tuple<Tensor, Tensor, Tensor, Tensor> forward(const Tensor& x, const std::optional<Tensor>& residual,
                                                   const Tensor& weight, const std::optional<Tensor>& bias,
                                                   double epsilon, bool centred) {
  const torch::stable::accelerator::DeviceGuard guard(x.get_device_index());
  const Forward call = prepare_forward(x, residual, weight, bias, centred);
  if (x.numel() > 0) {
    dispatch(x, weight, [&](auto scalar, auto parameter, auto accumulator) {
      using Scalar = decltype(scalar);
      using Parameter = decltype(parameter);
      using Accumulator = decltype(accumulator);
      centred ? run_forward<true, Scalar, Parameter, Accumulator>(call, epsilon)
              : run_forward<false, Scalar, Parameter, Accumulator>(call, epsilon);
    });
  }
  return {call.y, call.sum, call.mean, call.reciprocal};
}

std::tuple<Tensor, Tensor> backward(const Tensor& grad_output, const Tensor& sum, const Tensor& weight,
                                    const Tensor& mean, const Tensor& reciprocal, const std::optional<Tensor>& grad_sum,
                                    bool centred) {
  const torch::stable::accelerator::DeviceGuard guard(sum.get_device_index());
  Backward call = prepare_backward(grad_output, sum, weight, mean, reciprocal, grad_sum, centred);
  if (sum.numel() > 0) {
    dispatch(sum, weight, [&](auto scalar, auto parameter, auto accumulator) {
      using Scalar = decltype(scalar);
      using Parameter = decltype(parameter);
      using Accumulator = decltype(accumulator);
      centred ? run_backward<true, Scalar, Parameter, Accumulator>(call)
              : run_backward<false, Scalar, Parameter, Accumulator>(call);
    });
  } else {
    torch::stable::zero_(call.grad_parameters);
  }
  return {call.grad_input, call.grad_parameters};
}

}  // namespace
}  // namespace megallm::norm

STABLE_TORCH_LIBRARY_IMPL(megallm, CUDA, library) {
  library.impl("norm_forward", TORCH_BOX(&megallm::norm::forward));
  library.impl("norm_backward", TORCH_BOX(&megallm::norm::backward));
}
