// Sums of squares and accumulation over flat tensors on CUDA devices.

#include <algorithm>

#include <vector>

#include "include/cuda_support.cuh"
#include "include/flat.h"

namespace megallm {
namespace {

using cuda::kWarp;
using cuda::load;
using cuda::store;
using cuda::Vector;
using cuda::widen;

constexpr int kThreads = 256;
// Partial sums of one tensor at most: enough blocks to fill any device.
constexpr int64_t kMaxPartials = 2048;

// Squares of float32 in float64 neither overflow nor lose anything: the sum is finite exactly if every element is. Each
// thread adds its elements in order, four sums beside one another so that the additions do not wait for each other.
template <int kSize, typename Scalar>
__global__ void __launch_bounds__(kThreads) squares_kernel(const Scalar* values, int64_t count, double* partials) {
  __shared__ double scratch[kThreads / kWarp];
  const int64_t thread = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  const int64_t threads = static_cast<int64_t>(gridDim.x) * kThreads;
  const int64_t vectors = count / kSize;
  double sums[kSize] = {};
#pragma unroll 4
  for (int64_t vector = thread; vector < vectors; vector += threads) {
    const Vector<Scalar, kSize> loaded = load<kSize>(values + vector * kSize);
#pragma unroll
    for (int i = 0; i < kSize; ++i) {
      const double value = loaded.values[i];
      sums[i] += value * value;
    }
  }
  const int64_t index = vectors * kSize + thread;
  if (index < count) {
    const double value = values[index];
    sums[0] += value * value;
  }
  double sum = 0;
#pragma unroll
  for (int i = 0; i < kSize; ++i) {
    sum += sums[i];
  }
  sum = cuda::sum_over_block(sum, scratch);
  if (threadIdx.x == 0) {
    partials[blockIdx.x] = sum;
  }
}

__global__ void __launch_bounds__(kThreads) sum_kernel(const double* partials, int64_t count, double* result) {
  __shared__ double scratch[kThreads / kWarp];
  double sum = 0;
  for (int64_t index = threadIdx.x; index < count; index += kThreads) {
    sum += partials[index];
  }
  sum = cuda::sum_over_block(sum, scratch);
  if (threadIdx.x == 0) {
    *result = sum;
  }
}

// A function of the length alone, so that the order of additions is.
int64_t partials_of(const Tensor& tensor) {
  constexpr int64_t kElementsPerBlock = kThreads * 16;
  return std::min(kMaxPartials, (tensor.numel() + kElementsPerBlock - 1) / kElementsPerBlock);
}

template <typename Scalar>
void launch_squares(const Tensor& tensor, double* partials, cudaStream_t stream) {
  constexpr int kSize = 16 / sizeof(Scalar);
  const Scalar* values = static_cast<const Scalar*>(tensor.const_data_ptr());
  const unsigned blocks = static_cast<unsigned>(partials_of(tensor));
  if (cuda::aligned(values, 0, 1, sizeof(Scalar))) {
    squares_kernel<kSize><<<blocks, kThreads, 0, stream>>>(values, tensor.numel(), partials);
  } else {
    squares_kernel<1><<<blocks, kThreads, 0, stream>>>(values, tensor.numel(), partials);
  }
  cuda::check(cudaGetLastError(), "sum_of_squares");
}

Tensor sum_of_squares(const std::vector<Tensor>& tensors) {
  STD_TORCH_CHECK(!tensors.empty(), "sum_of_squares: there is no tensor");
  const torch::stable::accelerator::DeviceGuard guard(tensors[0].get_device_index());
  int64_t total = 0;
  for (const Tensor& tensor : tensors) {
    check_summand(tensor, tensors[0]);
    total += partials_of(tensor);
  }
  const cudaStream_t stream = cuda::current_stream(tensors[0]);
  const int64_t sizes[] = {total};
  const Tensor workspace =
      torch::stable::new_empty(tensors[0], torch::headeronly::IntHeaderOnlyArrayRef(sizes, 1), ScalarType::Double);
  double* const partials = static_cast<double*>(workspace.mutable_data_ptr());
  int64_t first = 0;
  for (const Tensor& tensor : tensors) {
    if (tensor.numel() == 0) {
      continue;
    }
    if (tensor.scalar_type() == ScalarType::Double) {
      launch_squares<double>(tensor, partials + first, stream);
    } else {
      launch_squares<float>(tensor, partials + first, stream);
    }
    first += partials_of(tensor);
  }
  const Tensor result = torch::stable::new_empty(tensors[0], {}, ScalarType::Double);
  sum_kernel<<<1, kThreads, 0, stream>>>(partials, total, static_cast<double*>(result.mutable_data_ptr()));
  cuda::check(cudaGetLastError(), "sum_of_squares");
  return result;
}

template <int kSize, typename Target, typename Source>
__device__ __forceinline__ void add(Target* target, const Source* source, Target scale, int64_t index) {
  Vector<Target, kSize> sum = load<kSize>(target + index);
  const Vector<Source, kSize> added = load<kSize>(source + index);
#pragma unroll
  for (int i = 0; i < kSize; ++i) {
    sum.values[i] += scale * widen(added.values[i]);
  }
  store<kSize>(target + index, sum);
}

template <int kSize, typename Target, typename Source>
__global__ void __launch_bounds__(kThreads)
    accumulate_kernel(Target* target, const Source* source, Target scale, int64_t count) {
  const int64_t thread = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  const int64_t threads = static_cast<int64_t>(gridDim.x) * kThreads;
  const int64_t vectors = count / kSize;
  for (int64_t vector = thread; vector < vectors; vector += threads) {
    add<kSize>(target, source, scale, vector * kSize);
  }
  const int64_t index = vectors * kSize + thread;
  if (index < count) {
    add<1>(target, source, scale, index);
  }
}

template <typename Target, typename Source>
void run_accumulate(const Tensor& target, const Tensor& source, double scale, cudaStream_t stream) {
  // 16 bytes of the source, which for 16-bit sources are two accesses of 16 bytes to the target.
  constexpr int kSize = 16 / sizeof(Source);
  constexpr int64_t kMaxBlocks = int64_t{1} << 30;
  Target* to = static_cast<Target*>(target.mutable_data_ptr());
  const Source* from = static_cast<const Source*>(source.const_data_ptr());
  const int64_t count = target.numel();
  const bool vectors = cuda::aligned(to, 0, 1, sizeof(Target)) && cuda::aligned(from, 0, 1, sizeof(Source));
  const int64_t items = vectors ? count / kSize : count;
  const unsigned blocks =
      static_cast<unsigned>(std::min(kMaxBlocks, std::max<int64_t>(1, (items + kThreads - 1) / kThreads)));
  if (vectors) {
    accumulate_kernel<kSize><<<blocks, kThreads, 0, stream>>>(to, from, static_cast<Target>(scale), count);
  } else {
    accumulate_kernel<1><<<blocks, kThreads, 0, stream>>>(to, from, static_cast<Target>(scale), count);
  }
  cuda::check(cudaGetLastError(), "accumulate_");
}

void accumulate(const Tensor& target, const Tensor& source, double scale) {
  const torch::stable::accelerator::DeviceGuard guard(target.get_device_index());
  check_accumulation(target, source);
  if (target.numel() == 0) {
    return;
  }
  const cudaStream_t stream = cuda::current_stream(target);
  switch (source.scalar_type()) {
    case ScalarType::Float:
      return run_accumulate<float, float>(target, source, scale, stream);
    case ScalarType::Double:
      return run_accumulate<double, double>(target, source, scale, stream);
    case ScalarType::BFloat16:
      return run_accumulate<float, __nv_bfloat16>(target, source, scale, stream);
    default:
      return run_accumulate<float, __half>(target, source, scale, stream);
  }
}

}  // namespace
}  // namespace megallm

STABLE_TORCH_LIBRARY_IMPL(megallm, CUDA, library) {
  library.impl("sum_of_squares", TORCH_BOX(&megallm::sum_of_squares));
  library.impl("accumulate_", TORCH_BOX(&megallm::accumulate));
}
