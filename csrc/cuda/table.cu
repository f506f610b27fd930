// Rows of a table on CUDA devices.

#include <algorithm>

#include "include/cuda_support.cuh"
#include "include/table.h"

namespace megallm::table {
namespace {

using cuda::AccumulatorOf;
using cuda::load;
using cuda::narrow;
using cuda::store;
using cuda::Vector;
using cuda::widen;

constexpr int kThreads = 256;
// Places in the order that one block adds up at most.
constexpr int64_t kPlaces = 128;

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
  typename AccumulatorOf<Scalar>::type* partials;  // [multiples of kPlaces, width], or null where there are none

  __device__ __forceinline__ int64_t entry_at(int64_t place) const { return rows[order[place]]; }
};

// Adds up a run of equal rows, in their order: the block of its first place what lies before the next multiple of
// kPlaces, into the target, and the block of every such multiple what lies behind it, into its row of `partials`. So a
// row that all tokens use is the work of many blocks, and the order of additions is the same each time. Where the run
// ends is found first, by a thread for each place, so that what is added can be read well ahead.
template <int kSize, typename Scalar>
__global__ void __launch_bounds__(kThreads) embedding_gradient_kernel(const GradientArguments<Scalar> arguments) {
  static_assert(kPlaces <= kThreads, "a thread for each place");
  using Accumulator = typename AccumulatorOf<Scalar>::type;
  const int column = (static_cast<int>(blockIdx.y) * kThreads + static_cast<int>(threadIdx.x)) * kSize;
  for (int64_t start = blockIdx.x; start < arguments.count; start += gridDim.x) {
    // All threads of a block decide alike up to the last barrier.
    const int64_t entry = arguments.entry_at(start);
    const bool goes_on = start > 0 && arguments.entry_at(start - 1) == entry;
    if (entry < 0 || (goes_on && start % kPlaces != 0)) {
      continue;
    }
    if (entry >= arguments.entries) {
      __trap();
    }
    const int64_t stop = min(arguments.count, (start / kPlaces + 1) * kPlaces);
    int length = 1;
    if (start + 1 < stop && arguments.entry_at(start + 1) == entry) {
      const int64_t place = start + threadIdx.x;
      length = __syncthreads_count(place < stop && arguments.entry_at(place) == entry);
    }
    if (column >= arguments.width) {
      continue;
    }
    Accumulator* target = goes_on ? arguments.partials + start / kPlaces * arguments.width + column
                                  : arguments.target + entry * arguments.width + column;
    Vector<Accumulator, kSize> sum = {};
    if (!goes_on) {
      sum = load<kSize>(target);
    }
    const int64_t* order = arguments.order + start;
#pragma unroll 4
    for (int i = 0; i < length; ++i) {
      const Vector<Scalar, kSize> added =
          load<kSize>(arguments.gradient + order[i] * arguments.gradient_stride + column);
#pragma unroll
      for (int k = 0; k < kSize; ++k) {
        sum.values[k] += widen(added.values[k]);
      }
    }
    store<kSize>(target, sum);
  }
}

// Adds the partial sums of a run that goes on over a multiple of kPlaces, one after the other: the block of the first
// of them does.
template <int kSize, typename Scalar>
__global__ void __launch_bounds__(kThreads) add_partials_kernel(const GradientArguments<Scalar> arguments) {
  using Accumulator = typename AccumulatorOf<Scalar>::type;
  const int column = (static_cast<int>(blockIdx.y) * kThreads + static_cast<int>(threadIdx.x)) * kSize;
  for (int64_t first = (static_cast<int64_t>(blockIdx.x) + 1) * kPlaces; first < arguments.count;
       first += static_cast<int64_t>(gridDim.x) * kPlaces) {
    const int64_t entry = arguments.entry_at(first);
    const bool goes_on = arguments.entry_at(first - 1) == entry;
    const bool went_on_before = first > kPlaces && arguments.entry_at(first - kPlaces - 1) == entry;
    if (entry < 0 || !goes_on || went_on_before) {
      continue;
    }
    // As many of the following multiples as the run reaches, a thread for each.
    int64_t count = 0;
    int found;
    do {
      const int64_t place = first + (count + threadIdx.x) * kPlaces;
      found = __syncthreads_count(place < arguments.count && arguments.entry_at(place) == entry);
      count += found;
    } while (found == kThreads);
    if (column >= arguments.width) {
      continue;
    }
    Accumulator* target = arguments.target + entry * arguments.width + column;
    Vector<Accumulator, kSize> sum = load<kSize>(target);
    const Accumulator* partial = arguments.partials + first / kPlaces * arguments.width + column;
#pragma unroll 4
    for (int64_t i = 0; i < count; ++i) {
      const Vector<Accumulator, kSize> added = load<kSize>(partial + i * arguments.width);
#pragma unroll
      for (int k = 0; k < kSize; ++k) {
        sum.values[k] += added.values[k];
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
  if (arguments.partials != nullptr) {
    const unsigned multiples = grid_for((arguments.count - 1) / kPlaces);
    add_partials_kernel<kSize><<<dim3(multiples, columns), kThreads, 0, stream>>>(arguments);
    cuda::check(cudaGetLastError(), "embedding_gradient_");
  }
}

template <typename Scalar>
void run_gradient(const Gradient& call, const Tensor& order) {
  using Accumulator = typename AccumulatorOf<Scalar>::type;
  constexpr int kSize = 16 / sizeof(Scalar);
  const Rows& gradient = call.gradient;
  std::optional<Tensor> workspace;
  if (gradient.count > kPlaces) {
    const int64_t sizes[] = {(gradient.count + kPlaces - 1) / kPlaces, gradient.width};
    workspace = torch::stable::new_empty(call.target, torch::headeronly::IntHeaderOnlyArrayRef(sizes, 2));
  }
  const GradientArguments<Scalar> arguments{
      static_cast<Accumulator*>(call.target.mutable_data_ptr()),
      call.target.size(0),
      gradient.data<Scalar>(),
      gradient.stride,
      static_cast<const int64_t*>(call.rows.const_data_ptr()),
      static_cast<const int64_t*>(order.const_data_ptr()),
      gradient.count,
      static_cast<int>(gradient.width),
      workspace ? static_cast<Accumulator*>(workspace->mutable_data_ptr()) : nullptr};
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
  // Columns are counted in blocks of the grid's second dimension.
  constexpr int64_t kMaxWidth = int64_t{65535} * kThreads;
  STD_TORCH_CHECK(rows.width <= kMaxWidth, "rows of a table may have ", kMaxWidth, " columns at most");
}

Tensor add_rows(const Tensor& x, const Tensor& table, const Tensor& rows) {
  const torch::stable::accelerator::DeviceGuard guard(x.get_device_index());
  const Addition call = prepare_addition(x, table, rows);
  check_width(call.x);
  if (call.x.count > 0 && call.x.width > 0) {
    cuda::dispatch(x, [&](auto scalar) { run_addition<decltype(scalar)>(call); });
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
    cuda::dispatch(gradient, [&](auto scalar) { run_gradient<decltype(scalar)>(call, *order); });
  }
}

}  // namespace
}  // namespace megallm::table

STABLE_TORCH_LIBRARY_IMPL(megallm, CUDA, library) {
  library.impl("add_rows", TORCH_BOX(&megallm::table::add_rows));
  library.impl("embedding_gradient_", TORCH_BOX(&megallm::table::embedding_gradient));
}
