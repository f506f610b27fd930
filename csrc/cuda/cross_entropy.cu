// Cross-entropy on CUDA devices: a block for each row of logits.
//
// The statistics take one reading pass: each thread carries the largest value that it has seen and the sum of
// exponentials under it, scales the sum down when a larger one comes, and pairs are merged at the end. The gradient is
// a second pass, written over the logits.

#include <algorithm>

#include "include/cross_entropy.h"
#include "include/cuda_support.cuh"

namespace megallm::cross_entropy {
namespace {

using cuda::AccumulatorOf;
using cuda::exponential;
using cuda::kWarp;
using cuda::load;
using cuda::minus_infinity;
using cuda::narrow;
using cuda::store;
using cuda::Vector;
using cuda::widen;

constexpr int kMaxThreads = 512;
constexpr int kMaxWarps = kMaxThreads / kWarp;

// The largest of some values, the sum of exp(value - largest), and the sum of the values.
template <typename Accumulator>
struct Sums {
  Accumulator largest;
  Accumulator exponentials;
  Accumulator all;
};

// The sum of exponentials under `from`, told under `to`, which is at least as large. While both are -inf the difference
// is not a number, and the sum is 0 anyway.
template <typename Scalar, typename Accumulator>
__device__ __forceinline__ Accumulator rescaled(Accumulator sum, Accumulator from, Accumulator to) {
  return from == to ? sum : sum * exponential<Scalar>(from - to);
}

template <typename Scalar, typename Accumulator>
__device__ __forceinline__ Sums<Accumulator> merged(const Sums<Accumulator>& left, const Sums<Accumulator>& right) {
  const Accumulator largest = left.largest > right.largest ? left.largest : right.largest;
  return Sums<Accumulator>{largest,
                           rescaled<Scalar>(left.exponentials, left.largest, largest) +
                               rescaled<Scalar>(right.exponentials, right.largest, largest),
                           left.all + right.all};
}

// A NaN is not the largest of anything, but it is in the sums.
template <int kSize, typename Scalar, typename Accumulator>
__device__ __forceinline__ void take(const Vector<Scalar, kSize>& vector, Sums<Accumulator>& sums) {
  Accumulator largest = sums.largest;
#pragma unroll
  for (int i = 0; i < kSize; ++i) {
    const Accumulator value = widen(vector.values[i]);
    largest = value > largest ? value : largest;
  }
  sums.exponentials = rescaled<Scalar>(sums.exponentials, sums.largest, largest);
  sums.largest = largest;
  const Accumulator shift = largest == minus_infinity(largest) ? Accumulator(0) : largest;
#pragma unroll
  for (int i = 0; i < kSize; ++i) {
    const Accumulator value = widen(vector.values[i]);
    sums.exponentials += exponential<Scalar>(value - shift);
    sums.all += value;
  }
}

template <typename Scalar, typename Accumulator>
__device__ __forceinline__ Sums<Accumulator> merged_over_warp(Sums<Accumulator> sums) {
#pragma unroll
  for (int distance = kWarp / 2; distance > 0; distance /= 2) {
    const Sums<Accumulator> other{__shfl_xor_sync(0xffffffffu, sums.largest, distance),
                                  __shfl_xor_sync(0xffffffffu, sums.exponentials, distance),
                                  __shfl_xor_sync(0xffffffffu, sums.all, distance)};
    sums = merged<Scalar>(sums, other);
  }
  return sums;
}

template <typename Scalar, typename Accumulator>
struct StatisticsArguments {
  const Scalar* logits;
  int64_t stride;
  int64_t rows;
  const int64_t* targets;
  Vocabulary vocabulary;
  Accumulator* largest;
  Accumulator* sums;
};

template <int kSize, typename Scalar, typename Accumulator>
__global__ void __launch_bounds__(kMaxThreads)
    statistics_kernel(const StatisticsArguments<Scalar, Accumulator> arguments) {
  __shared__ Accumulator largest[kMaxWarps], exponentials[kMaxWarps], all[kMaxWarps];
  const int columns = static_cast<int>(arguments.vocabulary.columns);
  const int whole = columns / kSize * kSize;
  const int step = static_cast<int>(blockDim.x) * kSize;
  for (int64_t row = blockIdx.x; row < arguments.rows; row += gridDim.x) {
    const Scalar* x = arguments.logits + row * arguments.stride;
    Sums<Accumulator> sums{minus_infinity(Accumulator()), 0, 0};
#pragma unroll 4
    for (int column = static_cast<int>(threadIdx.x) * kSize; column < whole; column += step) {
      take<kSize, Scalar>(load<kSize>(x + column), sums);
    }
    if (kSize > 1 && whole + static_cast<int>(threadIdx.x) < columns) {
      take<1, Scalar>(load<1>(x + whole + threadIdx.x), sums);
    }
    sums = merged_over_warp<Scalar>(sums);
    const int warps = static_cast<int>(blockDim.x) / kWarp;
    if (threadIdx.x % kWarp == 0) {
      largest[threadIdx.x / kWarp] = sums.largest;
      exponentials[threadIdx.x / kWarp] = sums.exponentials;
      all[threadIdx.x / kWarp] = sums.all;
    }
    __syncthreads();
    if (threadIdx.x == 0) {
      for (int warp = 1; warp < warps; ++warp) {
        sums = merged<Scalar>(sums, Sums<Accumulator>{largest[warp], exponentials[warp], all[warp]});
      }
      const int64_t column = arguments.vocabulary.column_of(arguments.targets[row]);
      arguments.largest[row] = sums.largest;
      arguments.sums[row] = sums.exponentials;
      arguments.sums[arguments.rows + row] = column < 0 ? Accumulator(0) : static_cast<Accumulator>(widen(x[column]));
      arguments.sums[2 * arguments.rows + row] = sums.all;
    }
    __syncthreads();
  }
}

template <typename Scalar, typename Accumulator>
struct GradientArguments {
  Scalar* logits;
  int64_t stride;
  int64_t rows;
  int width;
  const int64_t* targets;
  Vocabulary vocabulary;
  const Accumulator* largest;
  const Accumulator* sums;
  const Accumulator* grad_losses;
  Accumulator spread;  // smoothing / vocab_size
  Accumulator kept;    // 1 - smoothing
  Accumulator double_z;
  int64_t ignore_index;
};

// What the elements of a row need. `words` ends the columns that have a gradient, `column` is the target's or -1.
template <typename Accumulator>
struct RowFactors {
  Accumulator largest;
  Accumulator factor;
  Accumulator subtracted;
  Accumulator at_target;
  int words;
  int column;
};

template <int kSize, typename Scalar, typename Accumulator>
__device__ __forceinline__ void write_gradient(Scalar* x, int column, const RowFactors<Accumulator>& row) {
  const Vector<Scalar, kSize> logits = load<kSize>(x + column);
  Vector<Scalar, kSize> result;
#pragma unroll
  for (int i = 0; i < kSize; ++i) {
    const Accumulator value = widen(logits.values[i]);
    Accumulator gradient = exponential<Scalar>(value - row.largest) * row.factor - row.subtracted;
    gradient = column + i == row.column ? gradient - row.at_target : gradient;
    narrow(column + i < row.words ? gradient : Accumulator(0), result.values[i]);
  }
  store<kSize>(x + column, result);
}

template <int kSize, typename Scalar, typename Accumulator>
__global__ void __launch_bounds__(kMaxThreads) gradient_kernel(const GradientArguments<Scalar, Accumulator> arguments) {
  const int step = static_cast<int>(blockDim.x) * kSize;
  for (int64_t row = blockIdx.x; row < arguments.rows; row += gridDim.x) {
    Scalar* x = arguments.logits + row * arguments.stride;
    const int64_t target = arguments.targets[row];
    const Accumulator grad = arguments.grad_losses[row];
    const Accumulator sum = arguments.sums[row];
    const Accumulator largest = arguments.largest[row];
    const Accumulator log_sum = log(sum) + largest;
    const RowFactors<Accumulator> factors{
        largest,
        grad * (1 + arguments.double_z * log_sum) / sum,
        grad * arguments.spread,
        grad * arguments.kept,
        target == arguments.ignore_index ? 0 : static_cast<int>(arguments.vocabulary.columns),
        static_cast<int>(arguments.vocabulary.column_of(target))};
#pragma unroll 2
    for (int column = static_cast<int>(threadIdx.x) * kSize; column < arguments.width; column += step) {
      write_gradient<kSize>(x, column, factors);
    }
  }
}

// Enough threads for a short row, and as many as give each several vectors of a long one.
int threads_for(int64_t width, int vector_size) {
  const int64_t vectors = (width + vector_size - 1) / vector_size;
  const int64_t warps = (vectors + kWarp - 1) / kWarp;
  return static_cast<int>(std::min<int64_t>(std::max<int64_t>(warps, 1), kMaxWarps)) * kWarp;
}

// A single row may begin at a multiple of 16 bytes where one of many does not. So that a row's sums have the same order
// whatever the batch around it, its width decides too.
bool can_use_vectors(const void* logits, int64_t stride, int64_t rows, int64_t width, int vector_size,
                     int64_t element_size) {
  return width % vector_size == 0 && cuda::aligned(logits, stride, rows, element_size);
}

unsigned grid_for(int64_t rows) { return static_cast<unsigned>(std::min<int64_t>(rows, int64_t{1} << 30)); }

template <typename Accumulator>
Accumulator* data(const Tensor& tensor) {
  return static_cast<Accumulator*>(tensor.mutable_data_ptr());
}

template <typename Scalar>
void run_statistics(const Statistics& call) {
  using Accumulator = typename AccumulatorOf<Scalar>::type;
  constexpr int kSize = 16 / sizeof(Scalar);
  const Rows& logits = call.logits;
  const StatisticsArguments<Scalar, Accumulator> arguments{logits.data<Scalar>(),
                                                           logits.stride,
                                                           logits.count,
                                                           static_cast<const int64_t*>(call.targets.const_data_ptr()),
                                                           call.vocabulary,
                                                           data<Accumulator>(call.largest),
                                                           data<Accumulator>(call.sums)};
  const cudaStream_t stream = cuda::current_stream(logits.tensor);
  const unsigned grid = grid_for(logits.count);
  if (can_use_vectors(arguments.logits, logits.stride, logits.count, logits.width, kSize, sizeof(Scalar))) {
    statistics_kernel<kSize><<<grid, threads_for(logits.width, kSize), 0, stream>>>(arguments);
  } else {
    statistics_kernel<1><<<grid, threads_for(logits.width, 1), 0, stream>>>(arguments);
  }
  cuda::check(cudaGetLastError(), "cross_entropy_statistics");
}

template <typename Scalar>
void run_gradient(const Gradient& call, int64_t vocab_size, double smoothing, double z_loss, int64_t ignore_index) {
  using Accumulator = typename AccumulatorOf<Scalar>::type;
  constexpr int kSize = 16 / sizeof(Scalar);
  const GradientArguments<Scalar, Accumulator> arguments{
      data<Scalar>(call.logits),
      call.stride,
      call.rows,
      static_cast<int>(call.width),
      static_cast<const int64_t*>(call.targets.const_data_ptr()),
      call.vocabulary,
      data<Accumulator>(call.largest),
      data<Accumulator>(call.sums),
      data<Accumulator>(call.grad_losses),
      static_cast<Accumulator>(smoothing / static_cast<double>(vocab_size)),
      static_cast<Accumulator>(1.0 - smoothing),
      static_cast<Accumulator>(2.0 * z_loss),
      ignore_index};
  const cudaStream_t stream = cuda::current_stream(call.logits);
  const unsigned grid = grid_for(call.rows);
  if (can_use_vectors(arguments.logits, call.stride, call.rows, call.width, kSize, sizeof(Scalar))) {
    gradient_kernel<kSize><<<grid, threads_for(call.width, kSize), 0, stream>>>(arguments);
  } else {
    gradient_kernel<1><<<grid, threads_for(call.width, 1), 0, stream>>>(arguments);
  }
  cuda::check(cudaGetLastError(), "cross_entropy_backward_");
}

std::tuple<Tensor, Tensor> statistics(const Tensor& logits, const Tensor& targets, int64_t first, int64_t vocab_size) {
  const torch::stable::accelerator::DeviceGuard guard(logits.get_device_index());
  const Statistics call = prepare_statistics(logits, targets, first, vocab_size);
  if (call.logits.count > 0) {
    cuda::dispatch(logits, [&](auto scalar) { run_statistics<decltype(scalar)>(call); });
  }
  return {call.largest, call.sums};
}

void backward(const Tensor& logits, const Tensor& targets, const Tensor& largest, const Tensor& sums,
              const Tensor& grad_losses, int64_t first, int64_t vocab_size, double smoothing, double z_loss,
              int64_t ignore_index) {
  const torch::stable::accelerator::DeviceGuard guard(logits.get_device_index());
  const Gradient call = prepare_gradient(logits, targets, largest, sums, grad_losses, first, vocab_size);
  if (call.rows > 0 && call.width > 0) {
    cuda::dispatch(logits, [&](auto scalar) {
      run_gradient<decltype(scalar)>(call, vocab_size, smoothing, z_loss, ignore_index);
    });
  }
}

}  // namespace
}  // namespace megallm::cross_entropy

STABLE_TORCH_LIBRARY_IMPL(megallm, CUDA, library) {
  library.impl("cross_entropy_statistics", TORCH_BOX(&megallm::cross_entropy::statistics));
  library.impl("cross_entropy_backward_", TORCH_BOX(&megallm::cross_entropy::backward));
}
