// Sums over all rows, for gradients of what belongs to all of them: partial sums over blocks of rows, then the sum of
// these, all in an order that depends on the number of rows alone.

#pragma once

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <cstdint>

#include "cpu/simd.h"
#include "cpu/tiles.h"
#include "include/rows.h"

namespace megallm {

// Elements that a thread should have at least, below which waking it costs more than it saves.
constexpr int64_t kGrain = 32768;

// Rows to a partial sum; at most 512 partial sums, which bounds their memory.
inline int64_t rows_per_partial(int64_t rows) { return std::max<int64_t>(64, (rows + 511) / 512); }
inline int64_t partial_count(int64_t rows) { return (rows + rows_per_partial(rows) - 1) / rows_per_partial(rows); }

// Adds the partial sums in their order.
template <typename Accumulator>
void sum_partials(const Accumulator* partials, int64_t count, int64_t width, Accumulator* result) {
  using simd::kLanes;
  torch::stable::parallel_for(0, width, std::max<int64_t>(kLanes, kGrain / std::max<int64_t>(1, count)),
                              [&](int64_t begin, int64_t end) {
                                for (int64_t start = begin; start < end; start += kLanes) {
                                  const int64_t columns = std::min<int64_t>(kLanes, end - start);
                                  double sums[kLanes] = {};
                                  for (int64_t partial = 0; partial < count; ++partial) {
                                    tiles::accumulate(partials + partial * width + start, columns, sums);
                                  }
                                  for (int64_t column = 0; column < columns; ++column) {
                                    result[start + column] = static_cast<Accumulator>(sums[column]);
                                  }
                                }
                              });
}

// Calls run(first row, row after the last, partial sums) for each block of rows, on several threads, and adds up the
// partial sums [width] into `result`. Without a `result` there are none, and `run` gets a null pointer.
template <typename Accumulator, typename Run>
void for_blocks_of_rows(int64_t rows, int64_t width, const Tensor* result, const Run& run) {
  const int64_t block = rows_per_partial(rows);
  const int64_t blocks = partial_count(rows);
  const int64_t grain = std::max<int64_t>(1, kGrain / std::max<int64_t>(1, width * block));
  std::optional<Tensor> workspace;
  if (result != nullptr) {
    workspace = torch::stable::new_zeros(*result, {blocks, width});
  }
  Accumulator* partials = workspace ? static_cast<Accumulator*>(workspace->mutable_data_ptr()) : nullptr;
  torch::stable::parallel_for(0, blocks, grain, [&](int64_t begin, int64_t end) {
    for (int64_t index = begin; index < end; ++index) {
      Accumulator* partial = partials == nullptr ? nullptr : partials + index * width;
      run(index * block, std::min(rows, (index + 1) * block), partial);
    }
  });
  if (result != nullptr) {
    sum_partials(partials, blocks, width, static_cast<Accumulator*>(result->mutable_data_ptr()));
  }
}

}  // namespace megallm
