// Softmax of attention scores on CUDA devices.
//
// A row belongs to a warp when it is short and to a block otherwise. The first vectors of each thread are read once and
// kept in registers; whatever a very long row has beyond them is read again, from the cache as a rule. Of what a causal
// query does not see nothing is read.

#include "include/dropout.cuh"
#include "include/groups.cuh"
#include "include/softmax.h"

namespace megallm::softmax {
namespace {

using cuda::AccumulatorOf;
using cuda::DropoutArguments;
using cuda::exponential;
using cuda::kMaxGroupThreads;
using cuda::kWarp;
using cuda::load;
using cuda::minus_infinity;
using cuda::narrow;
using cuda::store;
using cuda::Vector;
using cuda::widen;

// Vectors of one thread that are kept in registers. The words of dropout need some of them.
template <bool kDropped>
constexpr int kCachedVectors = kDropped ? 2 : 4;

template <typename Scalar, typename Accumulator>
struct ForwardArguments {
  const Scalar* scores;
  int64_t stride;
  Beside mask;
  Beside bias;
  Accumulator scale;
  int64_t queries;
  int64_t rows;
  int width;
  bool causal;
  DropoutArguments<Accumulator> dropout;
  Scalar* probabilities;
  Scalar* y;  // with dropout
};

template <typename Scalar, typename Accumulator>
struct BackwardArguments {
  const Scalar* grad_output;
  int64_t stride;
  const Scalar* probabilities;
  Accumulator scale;
  int64_t queries;
  int64_t rows;
  int width;
  bool causal;
  DropoutArguments<Accumulator> dropout;
  Scalar* grad_scores;
};

// Where a row is read.
template <typename Scalar>
struct RowOf {
  const Scalar* scores;
  const bool* mask;    // or null
  const Scalar* bias;  // or null
  int visible;
};

// z of one vector, -inf where there is nothing to see.
template <int kSize, typename Scalar, typename Accumulator>
__device__ __forceinline__ void load_scaled(const RowOf<Scalar>& row, Accumulator scale, int column,
                                            Accumulator (&z)[kSize]) {
  const Vector<Scalar, kSize> scores = load<kSize>(row.scores + column);
#pragma unroll
  for (int i = 0; i < kSize; ++i) {
    z[i] = widen(scores.values[i]) * scale;
  }
  if (row.bias != nullptr) {
    const Vector<Scalar, kSize> bias = load<kSize>(row.bias + column);
#pragma unroll
    for (int i = 0; i < kSize; ++i) {
      z[i] += widen(bias.values[i]);
    }
  }
  if (row.mask != nullptr) {
    const Vector<bool, kSize> mask = load<kSize>(row.mask + column);
#pragma unroll
    for (int i = 0; i < kSize; ++i) {
      z[i] = mask.values[i] ? minus_infinity(z[i]) : z[i];
    }
  }
#pragma unroll
  for (int i = 0; i < kSize; ++i) {
    z[i] = column + i < row.visible ? z[i] : minus_infinity(z[i]);
  }
}

// Stores probabilities, and with dropout what it leaves of them.
template <bool kDropped, int kSize, typename Scalar, typename Accumulator>
__device__ __forceinline__ void store_row(const ForwardArguments<Scalar, Accumulator>& arguments,
                                          const philox::Key& generator, int64_t number, int64_t row, int column,
                                          Accumulator (&values)[kSize]) {
  Vector<Scalar, kSize> result;
#pragma unroll
  for (int i = 0; i < kSize; ++i) {
    narrow(values[i], result.values[i]);
  }
  const int64_t place = row * arguments.width + column;
  store<kSize>(arguments.probabilities + place, result);
  if constexpr (kDropped) {
    cuda::drop<kSize>(arguments.dropout, generator, number, column, values);
#pragma unroll
    for (int i = 0; i < kSize; ++i) {
      narrow(values[i], result.values[i]);
    }
    store<kSize>(arguments.y + place, result);
  }
}

// Turns z into exponentials, and returns their sum.
template <int kSize, typename Scalar, typename Accumulator>
__device__ __forceinline__ Accumulator exponentiate(Accumulator (&z)[kSize], Accumulator shift) {
  Accumulator sum = 0;
#pragma unroll
  for (int i = 0; i < kSize; ++i) {
    z[i] = exponential<Scalar>(z[i] - shift);
    sum += z[i];
  }
  return sum;
}

template <bool kDropped, int kSize, typename Scalar, typename Accumulator>
__global__ void __launch_bounds__(kMaxGroupThreads, 1)
    forward_kernel(const ForwardArguments<Scalar, Accumulator> arguments, bool row_per_block) {
  constexpr int kCached = kCachedVectors<kDropped>;
  __shared__ Accumulator scratch[2 * kMaxGroupThreads / kWarp];
  const cuda::Group group = cuda::this_group(row_per_block);
  const int width = arguments.width;
  const int step = group.size * kSize;
  const int first = group.lane * kSize;
  const philox::Key generator = kDropped ? arguments.dropout.generator() : philox::Key{};
  int turn = 0;
  for (int64_t row = group.index; row < arguments.rows; row += group.count) {
    const uint32_t index = static_cast<uint32_t>(row);
    const RowOf<Scalar> from{
        arguments.scores + row * arguments.stride,
        arguments.mask.data == nullptr ? nullptr
                                       : static_cast<const bool*>(arguments.mask.data) + arguments.mask.offset(index),
        arguments.bias.data == nullptr ? nullptr
                                       : static_cast<const Scalar*>(arguments.bias.data) + arguments.bias.offset(index),
        static_cast<int>(visible_keys(row, arguments.queries, width, arguments.causal))};
    const int64_t number = kDropped ? arguments.dropout.rows[row] : 0;
    Accumulator z[kCached][kSize];
    Accumulator largest = minus_infinity(Accumulator());
    const auto enlarge = [&](const Accumulator(&values)[kSize]) {
#pragma unroll
      for (int i = 0; i < kSize; ++i) {
        largest = values[i] > largest ? values[i] : largest;
      }
    };
#pragma unroll
    for (int k = 0; k < kCached; ++k) {
      if (first + k * step < from.visible) {
        load_scaled<kSize>(from, arguments.scale, first + k * step, z[k]);
        enlarge(z[k]);
      }
    }
#pragma unroll 1
    for (int column = first + kCached * step; column < from.visible; column += step) {
      Accumulator values[kSize];
      load_scaled<kSize>(from, arguments.scale, column, values);
      enlarge(values);
    }
    largest = cuda::largest_over_group(largest, group, scratch, turn);
    // While all is -inf there is nothing to subtract.
    const Accumulator shift = largest == minus_infinity(largest) ? Accumulator(0) : largest;
    Accumulator sum = 0;
#pragma unroll
    for (int k = 0; k < kCached; ++k) {
      if (first + k * step < from.visible) {
        sum += exponentiate<kSize, Scalar>(z[k], shift);
      }
    }
#pragma unroll 1
    for (int column = first + kCached * step; column < from.visible; column += step) {
      Accumulator values[kSize];
      load_scaled<kSize>(from, arguments.scale, column, values);
      sum += exponentiate<kSize, Scalar>(values, shift);
    }
    sum = cuda::sum_over_group(sum, group, scratch, turn);
    // A row of which nothing is left is 0; a NaN stays one.
    const Accumulator factor = sum == Accumulator(0) ? Accumulator(0) : Accumulator(1) / sum;
#pragma unroll
    for (int k = 0; k < kCached; ++k) {
      const int column = first + k * step;
      if (column < width) {
#pragma unroll
        for (int i = 0; i < kSize; ++i) {
          z[k][i] = column < from.visible ? z[k][i] * factor : Accumulator(0);
        }
        store_row<kDropped, kSize>(arguments, generator, number, row, column, z[k]);
      }
    }
#pragma unroll 1
    for (int column = first + kCached * step; column < width; column += step) {
      Accumulator values[kSize] = {};
      if (column < from.visible) {
        load_scaled<kSize>(from, arguments.scale, column, values);
        exponentiate<kSize, Scalar>(values, shift);
      }
#pragma unroll
      for (int i = 0; i < kSize; ++i) {
        values[i] *= factor;
      }
      store_row<kDropped, kSize>(arguments, generator, number, row, column, values);
    }
  }
}

// The gradient of what the probabilities were before dropout, and them, of one vector.
template <bool kDropped, int kSize, typename Scalar, typename Accumulator>
__device__ __forceinline__ void load_gradient(const BackwardArguments<Scalar, Accumulator>& arguments,
                                              const philox::Key& generator, int64_t number, int64_t row, int column,
                                              Accumulator (&grad)[kSize], Vector<Scalar, kSize>& probabilities) {
  const Vector<Scalar, kSize> loaded = load<kSize>(arguments.grad_output + row * arguments.stride + column);
  probabilities = load<kSize>(arguments.probabilities + row * arguments.width + column);
#pragma unroll
  for (int i = 0; i < kSize; ++i) {
    grad[i] = widen(loaded.values[i]);
  }
  if constexpr (kDropped) {
    cuda::drop<kSize>(arguments.dropout, generator, number, column, grad);
  }
}

template <int kSize, typename Scalar, typename Accumulator>
__device__ __forceinline__ Accumulator sum_of_products(const Accumulator (&grad)[kSize],
                                                       const Vector<Scalar, kSize>& probabilities, int seen) {
  Accumulator sum = 0;
#pragma unroll
  for (int i = 0; i < kSize; ++i) {
    // What lies beyond the seen keys was not meant, whatever its gradient is.
    sum += i < seen ? grad[i] * widen(probabilities.values[i]) : Accumulator(0);
  }
  return sum;
}

template <int kSize, typename Scalar, typename Accumulator>
__device__ __forceinline__ void store_gradient(const BackwardArguments<Scalar, Accumulator>& arguments, int64_t row,
                                               int column, const Accumulator (&grad)[kSize],
                                               const Vector<Scalar, kSize>& probabilities, Accumulator sum, int seen) {
  Vector<Scalar, kSize> result;
#pragma unroll
  for (int i = 0; i < kSize; ++i) {
    const Accumulator value = arguments.scale * (widen(probabilities.values[i]) * (grad[i] - sum));
    narrow(i < seen ? value : Accumulator(0), result.values[i]);
  }
  store<kSize>(arguments.grad_scores + row * arguments.width + column, result);
}

template <bool kDropped, int kSize, typename Scalar, typename Accumulator>
__global__ void __launch_bounds__(kMaxGroupThreads, 1)
    backward_kernel(const BackwardArguments<Scalar, Accumulator> arguments, bool row_per_block) {
  constexpr int kCached = kCachedVectors<kDropped>;
  __shared__ Accumulator scratch[2 * kMaxGroupThreads / kWarp];
  const cuda::Group group = cuda::this_group(row_per_block);
  const int width = arguments.width;
  const int step = group.size * kSize;
  const int first = group.lane * kSize;
  const philox::Key generator = kDropped ? arguments.dropout.generator() : philox::Key{};
  int turn = 0;
  for (int64_t row = group.index; row < arguments.rows; row += group.count) {
    const int visible = static_cast<int>(visible_keys(row, arguments.queries, width, arguments.causal));
    const int64_t number = kDropped ? arguments.dropout.rows[row] : 0;
    Accumulator grad[kCached][kSize];
    Vector<Scalar, kSize> probabilities[kCached];
    Accumulator sum = 0;
#pragma unroll
    for (int k = 0; k < kCached; ++k) {
      const int column = first + k * step;
      if (column < visible) {
        load_gradient<kDropped, kSize>(arguments, generator, number, row, column, grad[k], probabilities[k]);
        sum += sum_of_products<kSize, Scalar>(grad[k], probabilities[k], visible - column);
      }
    }
#pragma unroll 1
    for (int column = first + kCached * step; column < visible; column += step) {
      Accumulator values[kSize];
      Vector<Scalar, kSize> beside;
      load_gradient<kDropped, kSize>(arguments, generator, number, row, column, values, beside);
      sum += sum_of_products<kSize, Scalar>(values, beside, visible - column);
    }
    sum = cuda::sum_over_group(sum, group, scratch, turn);
#pragma unroll
    for (int k = 0; k < kCached; ++k) {
      const int column = first + k * step;
      if (column < visible) {
        store_gradient<kSize>(arguments, row, column, grad[k], probabilities[k], sum, visible - column);
      } else if (column < width) {
        store<kSize>(arguments.grad_scores + row * width + column, Vector<Scalar, kSize>{});
      }
    }
#pragma unroll 1
    for (int column = first + kCached * step; column < width; column += step) {
      Accumulator values[kSize] = {};
      Vector<Scalar, kSize> beside = {};
      if (column < visible) {
        load_gradient<kDropped, kSize>(arguments, generator, number, row, column, values, beside);
      }
      store_gradient<kSize>(arguments, row, column, values, beside, sum, visible - column);
    }
  }
}

// Whether the vectors of what stands beside the scores begin at multiples of their size.
bool vectors_of(const Beside& beside, int64_t element_size, int vector_size) {
  if (reinterpret_cast<uintptr_t>(beside.data) % (vector_size * element_size) != 0) {
    return false;
  }
  return std::all_of(beside.strides, beside.strides + 3, [&](int64_t stride) { return stride % vector_size == 0; });
}

// Calls `launch` with whether there is dropout, and with the elements of an access, as constants of the compiler.
template <int kSize, typename Launch>
void with_constants(bool dropped, bool vectors, const Launch& launch) {
  constexpr std::integral_constant<int, kSize> wide;
  constexpr std::integral_constant<int, 1> narrow;
  if (dropped) {
    vectors ? launch(std::true_type(), wide) : launch(std::true_type(), narrow);
  } else {
    vectors ? launch(std::false_type(), wide) : launch(std::false_type(), narrow);
  }
}

template <typename Scalar>
void run_forward(const Forward& call) {
  using Accumulator = typename AccumulatorOf<Scalar>::type;
  constexpr int kSize = cuda::kVector<Scalar>;
  const Rows& scores = call.scores;
  const ForwardArguments<Scalar, Accumulator> arguments{
      scores.data<Scalar>(),
      scores.stride,
      call.mask,
      call.bias,
      static_cast<Accumulator>(call.scale),
      call.queries,
      scores.count,
      static_cast<int>(scores.width),
      call.causal,
      call.dropout ? cuda::dropout_arguments<Accumulator>(*call.dropout) : DropoutArguments<Accumulator>{},
      static_cast<Scalar*>(call.probabilities.mutable_data_ptr()),
      static_cast<Scalar*>(call.y.mutable_data_ptr())};
  const bool vectors = scores.width % kSize == 0 &&
                       cuda::aligned(arguments.scores, scores.stride, scores.count, sizeof(Scalar)) &&
                       cuda::aligned(arguments.probabilities, 0, 1, 1) && cuda::aligned(arguments.y, 0, 1, 1) &&
                       vectors_of(call.mask, 1, kSize) && vectors_of(call.bias, sizeof(Scalar), kSize);
  const cudaStream_t stream = cuda::current_stream(scores.tensor);
  with_constants<kSize>(call.dropout.has_value(), vectors, [&](auto dropped, auto size) {
    const cuda::GroupShape shape = cuda::choose_group_shape(arguments.width, size, kCachedVectors<dropped>);
    forward_kernel<dropped, size>
        <<<cuda::grid_for_groups(arguments.rows, shape), shape.threads, 0, stream>>>(arguments, shape.row_per_block);
  });
  cuda::check(cudaGetLastError(), "softmax_forward");
}

template <typename Scalar>
void run_backward(const Backward& call) {
  using Accumulator = typename AccumulatorOf<Scalar>::type;
  constexpr int kSize = cuda::kVector<Scalar>;
  const Rows& grad = call.grad_output;
  const BackwardArguments<Scalar, Accumulator> arguments{
      grad.data<Scalar>(),
      grad.stride,
      static_cast<const Scalar*>(call.probabilities.const_data_ptr()),
      static_cast<Accumulator>(call.scale),
      call.queries,
      grad.count,
      static_cast<int>(grad.width),
      call.causal,
      call.dropout ? cuda::dropout_arguments<Accumulator>(*call.dropout) : DropoutArguments<Accumulator>{},
      static_cast<Scalar*>(call.grad_scores.mutable_data_ptr())};
  const bool vectors = grad.width % kSize == 0 &&
                       cuda::aligned(arguments.grad_output, grad.stride, grad.count, sizeof(Scalar)) &&
                       cuda::aligned(arguments.probabilities, 0, 1, 1) && cuda::aligned(arguments.grad_scores, 0, 1, 1);
  const cudaStream_t stream = cuda::current_stream(grad.tensor);
  with_constants<kSize>(call.dropout.has_value(), vectors, [&](auto dropped, auto size) {
    const cuda::GroupShape shape = cuda::choose_group_shape(arguments.width, size, kCachedVectors<dropped>);
    backward_kernel<dropped, size>
        <<<cuda::grid_for_groups(arguments.rows, shape), shape.threads, 0, stream>>>(arguments, shape.row_per_block);
  });
  cuda::check(cudaGetLastError(), "softmax_backward");
}

std::tuple<Tensor, Tensor> forward(const Tensor& scores, const std::optional<Tensor>& mask,
                                   const std::optional<Tensor>& bias, double scale, bool causal,
                                   const std::optional<Tensor>& key, const std::optional<Tensor>& step,
                                   const std::optional<Tensor>& rows, double drop) {
  const torch::stable::accelerator::DeviceGuard guard(scores.get_device_index());
  const Forward call = prepare_forward(scores, mask, bias, scale, causal, key, step, rows, drop);
  if (scores.numel() > 0) {
    cuda::dispatch(scores, [&](auto scalar) { run_forward<decltype(scalar)>(call); });
  }
  return {call.probabilities, call.y};
}

Tensor backward(const Tensor& grad_output, const Tensor& probabilities, double scale, bool causal,
                const std::optional<Tensor>& key, const std::optional<Tensor>& step, const std::optional<Tensor>& rows,
                double drop) {
  const torch::stable::accelerator::DeviceGuard guard(grad_output.get_device_index());
  const Backward call = prepare_backward(grad_output, probabilities, scale, causal, key, step, rows, drop);
  if (grad_output.numel() > 0) {
    cuda::dispatch(grad_output, [&](auto scalar) { run_backward<decltype(scalar)>(call); });
  }
  return call.grad_scores;
}

}  // namespace
}  // namespace megallm::softmax

STABLE_TORCH_LIBRARY_IMPL(megallm, CUDA, library) {
  library.impl("softmax_forward", TORCH_BOX(&megallm::softmax::forward));
  library.impl("softmax_backward", TORCH_BOX(&megallm::softmax::backward));
}
