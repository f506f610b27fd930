// RMSNorm on CUDA devices.
//
// A row belongs to a warp when it is short and to a block otherwise. The first kCached vectors of each thread are read
// once and kept in registers; whatever a very long row has beyond them is read a second time, from the cache as a rule.

#include <algorithm>
#include <limits>

#include "include/cuda_support.cuh"
#include "include/rms_norm.h"

namespace megallm::rms_norm {
namespace {

using cuda::kWarp;
using cuda::load;
using cuda::narrow;
using cuda::store;
using cuda::Vector;
using cuda::widen;

// With more threads the backward pass would have too few registers for its sums of the weight gradient.
constexpr int kMaxThreads = 512;
constexpr int kWarpsPerBlockOfShortRows = 4;
// Fewer rows than this per partial sum of the weight gradient, and writing the partial sums would cost more than it
// helps.
constexpr int64_t kMinRowsPerPartial = 16;

template <typename Scalar>
struct AccumulatorOf {
  using type = float;
};
template <>
struct AccumulatorOf<double> {
  using type = double;
};

// Vectors of one thread that are kept in registers: 64 bytes when they are 16 bytes each.
constexpr int kCached = 4;

template <typename Scalar, typename Weight, typename Accumulator>
struct ForwardArguments {
  const Scalar* x;
  int64_t x_stride;
  const Weight* weight;  // or null
  Accumulator epsilon;
  Accumulator weight_offset;
  int64_t rows;
  int width;
  Accumulator reciprocal_width;
  Scalar* y;
  Accumulator* reciprocal_rms;
};

template <typename Scalar, typename Weight, typename Accumulator>
struct BackwardArguments {
  const Scalar* grad_output;
  int64_t grad_output_stride;
  const Scalar* x;
  int64_t x_stride;
  const Scalar* grad_residual;  // or null
  int64_t grad_residual_stride;
  const Weight* weight;  // or null
  Accumulator weight_offset;
  const Accumulator* reciprocal_rms;
  int64_t rows;
  int width;
  Accumulator reciprocal_width;
  Scalar* grad_input;
  Accumulator* partials;  // [groups, width], or null without a weight
};

// The threads that share a row: a warp or a block.
struct Group {
  int index;
  int count;
  int lane;
  int size;
  bool is_block;
};

__device__ __forceinline__ Group this_group(bool row_per_block) {
  const int block = blockIdx.x;
  const int blocks = gridDim.x;
  const int thread = threadIdx.x;
  const int threads = blockDim.x;
  if (row_per_block) {
    return Group{block, blocks, thread, threads, true};
  }
  return Group{block * (threads / kWarp) + thread / kWarp, blocks * (threads / kWarp), thread % kWarp, kWarp, false};
}

// `turn` alternates between two halves of the scratch memory.
template <typename Accumulator>
__device__ __forceinline__ Accumulator sum_over_group(Accumulator value, const Group& group, Accumulator* scratch,
                                                      int turn) {
  return group.is_block ? cuda::sum_over_block(value, scratch + (turn & 1) * (kMaxThreads / kWarp))
                        : cuda::sum_over_warp(value);
}

// The weight at `column`, or ones; an element that is not there is not read.
template <int kSize, typename Weight, typename Accumulator>
__device__ __forceinline__ void load_weight(const Weight* weight, Accumulator offset, int column,
                                            Accumulator (&result)[kSize]) {
  if (weight == nullptr) {
#pragma unroll
    for (int i = 0; i < kSize; ++i) {
      result[i] = Accumulator(1);
    }
    return;
  }
  const Vector<Weight, kSize> vector = load<kSize>(weight + column);
#pragma unroll
  for (int i = 0; i < kSize; ++i) {
    result[i] = static_cast<Accumulator>(widen(vector.values[i])) + offset;
  }
}

template <int kSize, typename Scalar, typename Accumulator>
__device__ __forceinline__ Accumulator sum_of_squares(const Vector<Scalar, kSize>& vector) {
  Accumulator sum = 0;
#pragma unroll
  for (int i = 0; i < kSize; ++i) {
    const Accumulator value = widen(vector.values[i]);
    sum += value * value;
  }
  return sum;
}

template <int kSize, typename Scalar, typename Weight, typename Accumulator>
__device__ __forceinline__ void write_normalised(const ForwardArguments<Scalar, Weight, Accumulator>& arguments,
                                                 const Vector<Scalar, kSize>& x, Accumulator reciprocal, int column,
                                                 Scalar* y) {
  Accumulator weight[kSize];
  load_weight<kSize>(arguments.weight, arguments.weight_offset, column, weight);
  Vector<Scalar, kSize> result;
#pragma unroll
  for (int i = 0; i < kSize; ++i) {
    narrow(widen(x.values[i]) * reciprocal * weight[i], result.values[i]);
  }
  store<kSize>(y + column, result);
}

template <int kSize, typename Scalar, typename Weight, typename Accumulator>
__global__ void __launch_bounds__(kMaxThreads)
    forward_kernel(const ForwardArguments<Scalar, Weight, Accumulator> arguments, bool row_per_block) {
  __shared__ Accumulator scratch[2 * kMaxThreads / kWarp];
  const Group group = this_group(row_per_block);
  const int width = arguments.width;
  const int step = group.size * kSize;
  const int first = group.lane * kSize;
  int turn = 0;
  for (int64_t row = group.index; row < arguments.rows; row += group.count, ++turn) {
    const Scalar* x = arguments.x + row * arguments.x_stride;
    Scalar* y = arguments.y + row * arguments.width;
    Vector<Scalar, kSize> cached[kCached];
#pragma unroll
    for (int k = 0; k < kCached; ++k) {
      if (first + k * step < width) {
        cached[k] = load<kSize>(x + first + k * step);
      }
    }
    Accumulator sum = 0;
#pragma unroll
    for (int k = 0; k < kCached; ++k) {
      if (first + k * step < width) {
        sum += sum_of_squares<kSize, Scalar, Accumulator>(cached[k]);
      }
    }
#pragma unroll 1
    for (int column = first + kCached * step; column < width; column += step) {
      sum += sum_of_squares<kSize, Scalar, Accumulator>(load<kSize>(x + column));
    }
    const Accumulator mean = sum_over_group(sum, group, scratch, turn) * arguments.reciprocal_width;
    const Accumulator reciprocal = rsqrt(mean + arguments.epsilon);
    if (group.lane == 0) {
      arguments.reciprocal_rms[row] = reciprocal;
    }
    cuda::forget_conversions(cached);
#pragma unroll
    for (int k = 0; k < kCached; ++k) {
      if (first + k * step < width) {
        write_normalised<kSize>(arguments, cached[k], reciprocal, first + k * step, y);
      }
    }
#pragma unroll 1
    for (int column = first + kCached * step; column < width; column += step) {
      write_normalised<kSize>(arguments, load<kSize>(x + column), reciprocal, column, y);
    }
  }
}

template <int kSize, typename Scalar, typename Weight, typename Accumulator>
__device__ __forceinline__ Accumulator sum_of_products(const BackwardArguments<Scalar, Weight, Accumulator>& arguments,
                                                       const Vector<Scalar, kSize>& grad_output,
                                                       const Vector<Scalar, kSize>& x, int column) {
  Accumulator weight[kSize];
  load_weight<kSize>(arguments.weight, arguments.weight_offset, column, weight);
  Accumulator sum = 0;
#pragma unroll
  for (int i = 0; i < kSize; ++i) {
    sum += widen(grad_output.values[i]) * weight[i] * widen(x.values[i]);
  }
  return sum;
}

// Writes the input gradient of one vector and adds to the sums of its weight gradient.
template <int kSize, typename Scalar, typename Weight, typename Accumulator>
__device__ __forceinline__ void write_gradient(const BackwardArguments<Scalar, Weight, Accumulator>& arguments,
                                               const Vector<Scalar, kSize>& grad_output, const Vector<Scalar, kSize>& x,
                                               Accumulator reciprocal, Accumulator mean, int64_t row, int column,
                                               Accumulator (&weight_sums)[kSize]) {
  Accumulator weight[kSize];
  load_weight<kSize>(arguments.weight, arguments.weight_offset, column, weight);
  Accumulator gradient[kSize];
#pragma unroll
  for (int i = 0; i < kSize; ++i) {
    const Accumulator normalised = widen(x.values[i]) * reciprocal;
    const Accumulator grad = widen(grad_output.values[i]);
    gradient[i] = reciprocal * (grad * weight[i] - normalised * mean);
    weight_sums[i] += grad * normalised;
  }
  if (arguments.grad_residual != nullptr) {
    const Vector<Scalar, kSize> residual =
        load<kSize>(arguments.grad_residual + row * arguments.grad_residual_stride + column);
#pragma unroll
    for (int i = 0; i < kSize; ++i) {
      gradient[i] += widen(residual.values[i]);
    }
  }
  Vector<Scalar, kSize> result;
#pragma unroll
  for (int i = 0; i < kSize; ++i) {
    narrow(gradient[i], result.values[i]);
  }
  store<kSize>(arguments.grad_input + row * arguments.width + column, result);
}

// As many groups as the device holds at once, each with its own partial sums of the weight gradient: in registers for
// the cached part of a row, in its row of the workspace (which starts at zero) for the rest.
template <int kSize, typename Scalar, typename Weight, typename Accumulator>
__global__ void __launch_bounds__(kMaxThreads, 1)
    backward_kernel(const BackwardArguments<Scalar, Weight, Accumulator> arguments, bool row_per_block) {
  __shared__ Accumulator scratch[2 * kMaxThreads / kWarp];
  const Group group = this_group(row_per_block);
  const int width = arguments.width;
  const int step = group.size * kSize;
  const int first = group.lane * kSize;
  Accumulator* partial =
      arguments.partials == nullptr ? nullptr : arguments.partials + static_cast<int64_t>(group.index) * width;
  Vector<Accumulator, kSize> weight_sums[kCached] = {};
  int turn = 0;
  for (int64_t row = group.index; row < arguments.rows; row += group.count, ++turn) {
    const Scalar* grad_output = arguments.grad_output + row * arguments.grad_output_stride;
    const Scalar* x = arguments.x + row * arguments.x_stride;
    const Accumulator reciprocal = arguments.reciprocal_rms[row];
    Vector<Scalar, kSize> cached_x[kCached];
    Vector<Scalar, kSize> cached_grad[kCached];
#pragma unroll
    for (int k = 0; k < kCached; ++k) {
      if (first + k * step < width) {
        cached_x[k] = load<kSize>(x + first + k * step);
        cached_grad[k] = load<kSize>(grad_output + first + k * step);
      }
    }
    Accumulator sum = 0;
#pragma unroll
    for (int k = 0; k < kCached; ++k) {
      if (first + k * step < width) {
        sum += sum_of_products<kSize>(arguments, cached_grad[k], cached_x[k], first + k * step);
      }
    }
#pragma unroll 1
    for (int column = first + kCached * step; column < width; column += step) {
      sum += sum_of_products<kSize>(arguments, load<kSize>(grad_output + column), load<kSize>(x + column), column);
    }
    const Accumulator mean = sum_over_group(sum, group, scratch, turn) * reciprocal * arguments.reciprocal_width;
    cuda::forget_conversions(cached_x);
    cuda::forget_conversions(cached_grad);
#pragma unroll
    for (int k = 0; k < kCached; ++k) {
      if (first + k * step < width) {
        write_gradient<kSize>(arguments, cached_grad[k], cached_x[k], reciprocal, mean, row, first + k * step,
                              weight_sums[k].values);
      }
    }
#pragma unroll 1
    for (int column = first + kCached * step; column < width; column += step) {
      Vector<Accumulator, kSize> sums = {};
      if (partial != nullptr) {
        sums = load<kSize>(partial + column);
      }
      write_gradient<kSize>(arguments, load<kSize>(grad_output + column), load<kSize>(x + column), reciprocal, mean,
                            row, column, sums.values);
      if (partial != nullptr) {
        store<kSize>(partial + column, sums);
      }
    }
  }
  if (partial != nullptr) {
#pragma unroll
    for (int k = 0; k < kCached; ++k) {
      if (first + k * step < width) {
        store<kSize>(partial + first + k * step, weight_sums[k]);
      }
    }
  }
}

constexpr int kPartialLanes = 16;

// Column sums of the partials, in a fixed order: each thread its share of the rows, then the threads of a column one
// after the other.
template <typename Accumulator>
__global__ void sum_partials_kernel(const Accumulator* partials, int64_t count, int64_t width, Accumulator* result) {
  __shared__ Accumulator sums[kPartialLanes][kWarp];
  const int64_t column = static_cast<int64_t>(blockIdx.x) * kWarp + threadIdx.x;
  Accumulator sum = 0;
  if (column < width) {
    for (int64_t partial = threadIdx.y; partial < count; partial += kPartialLanes) {
      sum += partials[partial * width + column];
    }
  }
  sums[threadIdx.y][threadIdx.x] = sum;
  __syncthreads();
  if (threadIdx.y == 0 && column < width) {
    Accumulator total = 0;
#pragma unroll
    for (int lane = 0; lane < kPartialLanes; ++lane) {
      total += sums[lane][threadIdx.x];
    }
    result[column] = total;
  }
}

// Threads per block, and whether a block works on one row.
struct Shape {
  int threads;
  bool row_per_block;
  int64_t groups_per_block() const { return row_per_block ? 1 : threads / kWarp; }
};

Shape choose_shape(int64_t width, int vector_size) {
  const int64_t vectors = (width + vector_size - 1) / vector_size;
  const int64_t warps = (vectors + kWarp * kCached - 1) / (kWarp * kCached);
  if (warps <= 1) {
    return Shape{kWarpsPerBlockOfShortRows * kWarp, false};
  }
  return Shape{static_cast<int>(std::min<int64_t>(warps * kWarp, kMaxThreads)), true};
}

template <int kSize, typename Scalar, typename Weight, typename Accumulator>
void launch_forward(const ForwardArguments<Scalar, Weight, Accumulator>& arguments, cudaStream_t stream) {
  const Shape shape = choose_shape(arguments.width, kSize);
  const int64_t blocks = (arguments.rows + shape.groups_per_block() - 1) / shape.groups_per_block();
  // Groups are counted in 32 bits; each takes further rows in its turn.
  const int64_t grid = std::min<int64_t>(blocks, std::numeric_limits<int32_t>::max() / shape.groups_per_block());
  forward_kernel<kSize><<<static_cast<unsigned>(grid), shape.threads, 0, stream>>>(arguments, shape.row_per_block);
  cuda::check(cudaGetLastError(), "rms_norm_forward");
}

template <typename Scalar, typename Weight>
void run_forward(const Forward& call, double epsilon, double weight_offset) {
  using Accumulator = typename AccumulatorOf<Scalar>::type;
  const Rows& x = call.x;
  const ForwardArguments<Scalar, Weight, Accumulator> arguments{
      x.data<Scalar>(),
      x.stride,
      call.weight ? static_cast<const Weight*>(call.weight->const_data_ptr()) : nullptr,
      static_cast<Accumulator>(epsilon),
      static_cast<Accumulator>(weight_offset),
      x.count,
      static_cast<int>(x.width),
      Accumulator(1) / static_cast<Accumulator>(x.width),
      static_cast<Scalar*>(call.y.mutable_data_ptr()),
      static_cast<Accumulator*>(call.reciprocal_rms.mutable_data_ptr())};
  constexpr int kSize = 16 / sizeof(Scalar);
  const cudaStream_t stream = cuda::current_stream(x.tensor);
  const bool vectors = x.width % kSize == 0 && cuda::aligned(arguments.x, x.stride, x.count, sizeof(Scalar)) &&
                       cuda::aligned(arguments.y, x.width, x.count, sizeof(Scalar)) &&
                       cuda::aligned(arguments.weight, 0, 1, sizeof(Weight));
  if (vectors) {
    launch_forward<kSize>(arguments, stream);
  } else {
    launch_forward<1>(arguments, stream);
  }
}

// Groups that work on all rows together: what fits on the device at once, but no more than pays for its partial sums.
template <typename Kernel>
int64_t persistent_blocks(Kernel kernel, const Shape& shape, int64_t rows) {
  int device = 0;
  int processors = 0;
  int blocks_per_processor = 0;
  cuda::check(cudaGetDevice(&device), "rms_norm_backward");
  cuda::check(cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, device), "rms_norm_backward");
  cuda::check(cudaOccupancyMaxActiveBlocksPerMultiprocessor(&blocks_per_processor, kernel, shape.threads, 0),
              "rms_norm_backward");
  const int64_t resident = static_cast<int64_t>(processors) * std::max(1, blocks_per_processor);
  const int64_t rows_per_block = shape.groups_per_block() * kMinRowsPerPartial;
  const int64_t useful = std::max<int64_t>(processors, (rows + rows_per_block - 1) / rows_per_block);
  const int64_t needed = (rows + shape.groups_per_block() - 1) / shape.groups_per_block();
  return std::min({resident, useful, needed});
}

template <int kSize, typename Scalar, typename Weight, typename Accumulator>
void launch_backward(BackwardArguments<Scalar, Weight, Accumulator> arguments, const Tensor& grad_weight,
                     cudaStream_t stream) {
  const auto kernel = backward_kernel<kSize, Scalar, Weight, Accumulator>;
  const Shape shape = choose_shape(arguments.width, kSize);
  const int64_t blocks = persistent_blocks(kernel, shape, arguments.rows);
  const int64_t groups = blocks * shape.groups_per_block();
  std::optional<Tensor> workspace;
  if (arguments.weight != nullptr) {
    const bool whole_row_in_registers =
        arguments.width <= static_cast<int64_t>(shape.row_per_block ? shape.threads : kWarp) * kSize * kCached;
    const int64_t sizes[] = {groups, arguments.width};
    const torch::headeronly::IntHeaderOnlyArrayRef shape_of_partials(sizes, 2);
    workspace = torch::stable::new_empty(grad_weight, shape_of_partials);
    if (!whole_row_in_registers) {
      torch::stable::zero_(*workspace);
    }
    arguments.partials = static_cast<Accumulator*>(workspace->mutable_data_ptr());
  }
  kernel<<<static_cast<unsigned>(blocks), shape.threads, 0, stream>>>(arguments, shape.row_per_block);
  cuda::check(cudaGetLastError(), "rms_norm_backward");
  if (workspace) {
    const unsigned grid = static_cast<unsigned>((arguments.width + kWarp - 1) / kWarp);
    sum_partials_kernel<<<grid, dim3(kWarp, kPartialLanes), 0, stream>>>(
        arguments.partials, groups, arguments.width, static_cast<Accumulator*>(grad_weight.mutable_data_ptr()));
    cuda::check(cudaGetLastError(), "rms_norm_backward");
  }
}

template <typename Scalar, typename Weight>
void run_backward(const Backward& call, double weight_offset) {
  using Accumulator = typename AccumulatorOf<Scalar>::type;
  const int64_t rows = call.x.count;
  const int64_t width = call.x.width;
  const BackwardArguments<Scalar, Weight, Accumulator> arguments{
      call.grad_output.data<Scalar>(),
      call.grad_output.stride,
      call.x.data<Scalar>(),
      call.x.stride,
      call.grad_residual ? call.grad_residual->data<Scalar>() : nullptr,
      call.grad_residual ? call.grad_residual->stride : 0,
      call.weight ? static_cast<const Weight*>(call.weight->const_data_ptr()) : nullptr,
      static_cast<Accumulator>(weight_offset),
      static_cast<const Accumulator*>(call.reciprocal_rms.const_data_ptr()),
      rows,
      static_cast<int>(width),
      Accumulator(1) / static_cast<Accumulator>(width),
      static_cast<Scalar*>(call.grad_input.mutable_data_ptr()),
      nullptr};
  constexpr int kSize = 16 / sizeof(Scalar);
  const auto aligned = [&](const void* data, int64_t stride) {
    return cuda::aligned(data, stride, rows, sizeof(Scalar));
  };
  const bool vectors = width % kSize == 0 && aligned(arguments.grad_output, arguments.grad_output_stride) &&
                       aligned(arguments.x, arguments.x_stride) &&
                       aligned(arguments.grad_residual, arguments.grad_residual_stride) &&
                       aligned(arguments.grad_input, width) && cuda::aligned(arguments.weight, 0, 1, sizeof(Weight));
  const cudaStream_t stream = cuda::current_stream(call.x.tensor);
  if (vectors) {
    launch_backward<kSize>(arguments, call.grad_weight, stream);
  } else {
    launch_backward<1>(arguments, call.grad_weight, stream);
  }
}

// Calls `run` with values of the element type and the weight's type.
template <typename Run>
void dispatch(const Tensor& x, const std::optional<Tensor>& weight, const Run& run) {
  const bool float_weight = weight && weight->scalar_type() == ScalarType::Float;
  switch (x.scalar_type()) {
    case ScalarType::Float:
      return run(float(), float());
    case ScalarType::Double:
      return float_weight ? run(double(), float()) : run(double(), double());
    case ScalarType::BFloat16:
      return float_weight ? run(__nv_bfloat16(), float()) : run(__nv_bfloat16(), __nv_bfloat16());
    default:
      return float_weight ? run(__half(), float()) : run(__half(), __half());
  }
}

std::tuple<Tensor, Tensor> forward(const Tensor& x, const std::optional<Tensor>& weight, double epsilon,
                                   double weight_offset) {
  const torch::stable::accelerator::DeviceGuard guard(x.get_device_index());
  const Forward call = prepare_forward(x, weight);
  if (call.x.count > 0 && call.x.width > 0) {
    dispatch(x, weight, [&](auto scalar, auto weight_scalar) {
      run_forward<decltype(scalar), decltype(weight_scalar)>(call, epsilon, weight_offset);
    });
  }
  return {call.y, call.reciprocal_rms};
}

std::tuple<Tensor, Tensor> backward(const Tensor& grad_output, const Tensor& x, const std::optional<Tensor>& weight,
                                    const Tensor& reciprocal_rms, const std::optional<Tensor>& grad_residual,
                                    double weight_offset) {
  const torch::stable::accelerator::DeviceGuard guard(x.get_device_index());
  Backward call = prepare_backward(grad_output, x, weight, reciprocal_rms, grad_residual);
  if (call.x.count > 0 && call.x.width > 0) {
    dispatch(x, weight, [&](auto scalar, auto weight_scalar) {
      run_backward<decltype(scalar), decltype(weight_scalar)>(call, weight_offset);
    });
  } else {
    torch::stable::zero_(call.grad_weight);
  }
  return {call.grad_input, call.grad_weight};
}

}  // namespace
}  // namespace megallm::rms_norm

STABLE_TORCH_LIBRARY_IMPL(megallm, CUDA, library) {
  library.impl("rms_norm_forward", TORCH_BOX(&megallm::rms_norm::forward));
  library.impl("rms_norm_backward", TORCH_BOX(&megallm::rms_norm::backward));
}
