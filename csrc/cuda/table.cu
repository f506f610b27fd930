// Rows of a table on CUDA devices.

#include <algorithm>

#include "include/cuda_support.cuh"
#include "include/table.h"

namespace megallm::table {
namespace {

using cuda::load;
using cuda::narrow;
using cuda::store;
using cuda::Vector;
using cuda::widen;

constexpr int kThreads = 256;

template <typename Scalar>
struct AccumulatorOf {
  using type = float;
};
template <>
struct AccumulatorOf<double> {
  using type = double;
};

template <typename Scalar>
struct AdditionArguments {
  const Scalar* x;
  int64_t x_stride;
  const Scalar* table;
  const int64_t* rows;
  int64_t entries;
  int64_t count;
  int width;
  Scalar* y;
};

template <int kSize, typename Scalar>
__global__ void __launch_bounds__(kThreads) add_rows_kernel(const AdditionArguments<Scalar> arguments) {
  using Accumulator = typename AccumulatorOf<Scalar>::type;
  for (int64_t row = blockIdx.x; row < arguments.count; row += gridDim.x) {
    const int64_t entry = arguments.rows[row];
    if (entry < 0 || entry >= arguments.entries) {
      __trap();
    }
    const Scalar* x = arguments.x + row * arguments.x_stride;
    const Scalar* added = arguments.table + entry * arguments.width;
    Scalar* y = arguments.y + row * arguments.width;
    for (int column = static_cast<int>(threadIdx.x) * kSize; column < arguments.width; column += kThreads * kSize) {
      const Vector<Scalar, kSize> left = load<kSize>(x + column);
      const Vector<Scalar, kSize> right = load<kSize>(added + column);
      Vector<Scalar, kSize> sum;
#pragma unroll
      for (int i = 0; i < kSize; ++i) {
        narrow(static_cast<Accumulator>(widen(left.values[i])) + widen(right.values[i]), sum.values[i]);
      }
      store<kSize>(y + column, sum);
    }
  }
}

template <typename Scalar>
struct GradientArguments {
  typename AccumulatorOf<Scalar>::type* target;
  int64_t entries;
  const Scalar* gradient;
  int64_t gradient_stride;
  const int64_t* rows;
  const int64_t* order;  // sorts the rows, equal ones in their order
  int64_t count;
  int width;
};

// The block of the first of equal rows adds all of them, in their order; the others have nothing to do.
template <int kSize, typename Scalar>
__global__ void __launch_bounds__(kThreads) embedding_gradient_kernel(const GradientArguments<Scalar> arguments) {
  using Accumulator = typename AccumulatorOf<Scalar>::type;
  const int column = (static_cast<int>(blockIdx.y) * kThreads + static_cast<int>(threadIdx.x)) * kSize;
  if (column >= arguments.width) {
    return;
  }
  for (int64_t start = blockIdx.x; start < arguments.count; start += gridDim.x) {
    const int64_t entry = arguments.rows[arguments.order[start]];
    if (entry < 0 || (start > 0 && arguments.rows[arguments.order[start - 1]] == entry)) {
      continue;
    }
    if (entry >= arguments.entries) {
      __trap();
    }
    Accumulator* target = arguments.target + entry * arguments.width + column;
    Vector<Accumulator, kSize> sum = load<kSize>(target);
#pragma unroll 2
    for (int64_t place = start; place < arguments.count; ++place) {
      const int64_t index = arguments.order[place];
      if (arguments.rows[index] != entry) {
        break;
      }
      const Vector<Scalar, kSize> added = load<kSize>(arguments.gradient + index * arguments.gradient_stride + column);
#pragma unroll
      for (int i = 0; i < kSize; ++i) {
        sum.values[i] += widen(added.values[i]);
      }
    }
    store<kSize>(target, sum);
  }
}

unsigned grid_for(int64_t rows) { return static_cast<unsigned>(std::min<int64_t>(rows, int64_t{1} << 30)); }

template <typename Scalar>
void run_addition(const Addition& call) {
  constexpr int kSize = 16 / sizeof(Scalar);
  const AdditionArguments<Scalar> arguments{call.x.data<Scalar>(),
                                            call.x.stride,
                                            static_cast<const Scalar*>(call.table.const_data_ptr()),
                                            static_cast<const int64_t*>(call.rows.const_data_ptr()),
                                            call.table.size(0),
                                            call.x.count,
                                            static_cast<int>(call.x.width),
                                            static_cast<Scalar*>(call.y.mutable_data_ptr())};
  const cudaStream_t stream = cuda::current_stream(call.x.tensor);
  const bool vectors = call.x.width % kSize == 0 &&
                       cuda::aligned(arguments.x, call.x.stride, call.x.count, sizeof(Scalar)) &&
                       cuda::aligned(arguments.table, 0, 1, 1) && cuda::aligned(arguments.y, 0, 1, 1);
  if (vectors) {
    add_rows_kernel<kSize><<<grid_for(call.x.count), kThreads, 0, stream>>>(arguments);
  } else {
    add_rows_kernel<1><<<grid_for(call.x.count), kThreads, 0, stream>>>(arguments);
  }
  cuda::check(cudaGetLastError(), "add_rows");
}

template <int kSize, typename Scalar>
void launch_gradient(const GradientArguments<Scalar>& arguments, cudaStream_t stream) {
  constexpr int kColumns = kThreads * kSize;
  const unsigned columns = static_cast<unsigned>((arguments.width + kColumns - 1) / kColumns);
  embedding_gradient_kernel<kSize><<<dim3(grid_for(arguments.count), columns), kThreads, 0, stream>>>(arguments);
  cuda::check(cudaGetLastError(), "embedding_gradient_");
}

template <typename Scalar>
void run_gradient(const Gradient& call, const Tensor& order) {
  using Accumulator = typename AccumulatorOf<Scalar>::type;
  constexpr int kSize = 16 / sizeof(Scalar);
  const Rows& gradient = call.gradient;
  const GradientArguments<Scalar> arguments{static_cast<Accumulator*>(call.target.mutable_data_ptr()),
                                            call.target.size(0),
                                            gradient.data<Scalar>(),
                                            gradient.stride,
                                            static_cast<const int64_t*>(call.rows.const_data_ptr()),
                                            static_cast<const int64_t*>(order.const_data_ptr()),
                                            gradient.count,
                                            static_cast<int>(gradient.width)};
  const cudaStream_t stream = cuda::current_stream(gradient.tensor);
  const bool vectors = gradient.width % kSize == 0 &&
                       cuda::aligned(arguments.gradient, gradient.stride, gradient.count, sizeof(Scalar)) &&
                       cuda::aligned(arguments.target, 0, 1, 1);
  if (vectors) {
    launch_gradient<kSize>(arguments, stream);
  } else {
    launch_gradient<1>(arguments, stream);
  }
}

void check_width(const Rows& rows) {
  // Columns are counted in 32 bits, in blocks of the grid's second dimension.
  STD_TORCH_CHECK(rows.width < (int64_t{1} << 24), "rows of a table must be shorter than 2^24");
}

// Calls `run` with a value of the element type.
template <typename Run>
void dispatch(const Tensor& tensor, const Run& run) {
  switch (tensor.scalar_type()) {
    case ScalarType::Float:
      return run(float());
    case ScalarType::Double:
      return run(double());
    case ScalarType::BFloat16:
      return run(__nv_bfloat16());
    default:
      return run(__half());
  }
}

Tensor add_rows(const Tensor& x, const Tensor& table, const Tensor& rows) {
  const torch::stable::accelerator::DeviceGuard guard(x.get_device_index());
  const Addition call = prepare_addition(x, table, rows);
  check_width(call.x);
  if (call.x.count > 0 && call.x.width > 0) {
    dispatch(x, [&](auto scalar) { run_addition<decltype(scalar)>(call); });
  }
  return call.y;
}

void embedding_gradient(const Tensor& target, const Tensor& gradient, const Tensor& rows,
                        const std::optional<Tensor>& order) {
  const torch::stable::accelerator::DeviceGuard guard(target.get_device_index());
  const Gradient call = prepare_gradient(target, gradient, rows);
  check_width(call.gradient);
  STD_TORCH_CHECK(order.has_value() && order->scalar_type() == ScalarType::Long &&
                      order->numel() == call.gradient.count && order->is_contiguous() &&
                      order->device() == target.device(),
                  "embedding_gradient: on a GPU the order that sorts the rows must be given");
  if (call.gradient.count > 0 && call.gradient.width > 0) {
    dispatch(gradient, [&](auto scalar) { run_gradient<decltype(scalar)>(call, *order); });
  }
}

}  // namespace
}  // namespace megallm::table

STABLE_TORCH_LIBRARY_IMPL(megallm, CUDA, library) {
  library.impl("add_rows", TORCH_BOX(&megallm::table::add_rows));
  library.impl("embedding_gradient_", TORCH_BOX(&megallm::table::embedding_gradient));
}
