// The second half of a sum over rows: partial sums [count, width] to their sum, in a fixed order.

#pragma once

#include "include/cuda_support.cuh"

namespace megallm::cuda {

constexpr int kPartialLanes = 16;

// Each thread adds its share of the rows, then the threads of a column are added one after the other.
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

template <typename Accumulator>
void sum_partials(const Accumulator* partials, int64_t count, int64_t width, Accumulator* result, cudaStream_t stream) {
  const unsigned grid = static_cast<unsigned>((width + kWarp - 1) / kWarp);
  sum_partials_kernel<<<grid, dim3(kWarp, kPartialLanes), 0, stream>>>(partials, count, width, result);
  check(cudaGetLastError(), "sum_partials");
}

}  // namespace megallm::cuda
