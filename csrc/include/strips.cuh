// Element-wise work on rows: the loop that activations and dropout share.
//
// A block takes a strip of columns through a chunk of rows. Threads next to each other have vectors next to each other,
// and what belongs to a column (a bias, a sum over rows) stays in a thread's registers. Two rows are under way at once.

#pragma once

#include <algorithm>

#include "include/cuda_support.cuh"

namespace megallm::cuda {

constexpr int kStripThreads = 256;
// Rows to a chunk at least, where sums over rows are kept: fewer, and writing the partial sums would cost more.
constexpr int64_t kMinRowsPerPartial = 32;

// blockDim.x threads beside each other, blockDim.y rows at once.
struct Strips {
  dim3 threads;
  int64_t strips;  // to a row
  int64_t chunks;
  int64_t rows_per_chunk;
  unsigned blocks() const { return static_cast<unsigned>(strips * chunks); }
};

// Enough chunks to occupy the device; at most as many as `sums` of them pay for.
inline Strips choose_strips(int64_t rows, int64_t width, int vector_size, bool sums) {
  const int64_t vectors = (width + vector_size - 1) / vector_size;
  int across = 32;
  while (across < 128 && across < vectors) {
    across *= 2;
  }
  const int down = kStripThreads / across;
  int device = 0;
  int processors = 0;
  check(cudaGetDevice(&device), "choose_strips");
  check(cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, device), "choose_strips");
  const int64_t strips = (vectors + across - 1) / across;
  // With sums a few waves of blocks, otherwise blocks so small that the last wave costs nothing.
  const int64_t wanted = sums ? std::max<int64_t>(1, 16 * processors / strips) : rows;
  const int64_t smallest = sums ? std::max<int64_t>(kMinRowsPerPartial, 2 * down) : 4 * down;
  const int64_t rows_per_chunk = std::max((rows + wanted - 1) / wanted, smallest);
  const int64_t chunks = (rows + rows_per_chunk - 1) / rows_per_chunk;
  return Strips{dim3(across, down), strips, chunks, rows_per_chunk};
}

// Adds up what the threads of a column summed, top to bottom, and writes it to the chunk's row of the partial sums.
template <typename Work>
__device__ __forceinline__ void finish_sums(const Work& work, const typename Work::Columns& columns, int column,
                                            int width, int64_t chunk) {
  using Accumulator = typename Work::Accumulator;
  __shared__ Accumulator scratch[kStripThreads];
#pragma unroll
  for (int i = 0; i < Work::kSums; ++i) {
    __syncthreads();
    scratch[threadIdx.y * blockDim.x + threadIdx.x] = column < width ? columns.sums[i] : Accumulator(0);
    __syncthreads();
    if (threadIdx.y == 0 && column < width) {
      Accumulator total = 0;
      for (int y = 0; y < static_cast<int>(blockDim.y); ++y) {
        total += scratch[y * blockDim.x + threadIdx.x];
      }
      work.partials[chunk * work.partials_width + work.sum_column(column, i)] = total;
    }
  }
}

// `Work` has: Columns (what a thread keeps for its columns), Loaded (what it reads of a row), and
//   void begin(int column, Columns&)                      once, for the columns from `column` on
//   void load(int64_t row, int column, Loaded&)
//   void store(int64_t row, int column, const Loaded&, Columns&)
// With kSums > 0, columns.sums of that many are added up over the rows of a chunk, into row `chunk` of work.partials.
template <typename Work>
__global__ void __launch_bounds__(kStripThreads, 2)
    strip_kernel(const Work work, int64_t rows, int width, int64_t strips, int64_t rows_per_chunk) {
  constexpr int kSize = Work::kSize;
  const int64_t block = blockIdx.x;
  const int64_t chunk = block / strips;
  const int column = (static_cast<int>(block % strips) * static_cast<int>(blockDim.x) + threadIdx.x) * kSize;
  typename Work::Columns columns;
  if (column < width) {
    work.begin(column, columns);
    const int64_t stop = min(rows, (chunk + 1) * rows_per_chunk);
    const int64_t step = blockDim.y;
    int64_t row = chunk * rows_per_chunk + threadIdx.y;
#pragma unroll 1
    for (; row + step < stop; row += 2 * step) {
      typename Work::Loaded first, second;
      work.load(row, column, first);
      work.load(row + step, column, second);
      work.store(row, column, first, columns);
      work.store(row + step, column, second, columns);
    }
    if (row < stop) {
      typename Work::Loaded last;
      work.load(row, column, last);
      work.store(row, column, last, columns);
    }
  }
  if constexpr (Work::kSums > 0) {
    finish_sums(work, columns, column, width, chunk);
  }
}

template <typename Work>
void launch_strips(const Work& work, const Strips& strips, int64_t rows, int64_t width, cudaStream_t stream,
                   const char* what) {
  STD_TORCH_CHECK(strips.strips * strips.chunks <= 0x7fffffff, what, ": too many rows");
  strip_kernel<Work><<<strips.blocks(), strips.threads, 0, stream>>>(work, rows, static_cast<int>(width), strips.strips,
                                                                     strips.rows_per_chunk);
  check(cudaGetLastError(), what);
}

}  // namespace megallm::cuda
