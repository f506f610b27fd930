// The threads that share a row: a warp when it is short, a block otherwise.

#pragma once

#include <algorithm>
#include <limits>

#include "include/cuda_support.cuh"

namespace megallm::cuda {

// With more threads a backward pass would have too few registers for what it keeps of a row.
constexpr int kMaxGroupThreads = 512;
constexpr int kWarpsPerBlockOfShortRows = 4;

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

// `turn` counts the sums: consecutive ones alternate between two halves of the scratch memory.
template <typename Accumulator>
__device__ __forceinline__ Accumulator sum_over_group(Accumulator value, const Group& group, Accumulator* scratch,
                                                      int& turn) {
  const int half = turn++ & 1;
  return group.is_block ? sum_over_block(value, scratch + half * (kMaxGroupThreads / kWarp)) : sum_over_warp(value);
}

// The largest over a group, with the same scratch memory and turns.
template <typename Accumulator>
__device__ __forceinline__ Accumulator largest_over_group(Accumulator value, const Group& group, Accumulator* scratch,
                                                          int& turn) {
  const int half = turn++ & 1;
  return group.is_block ? largest_over_block(value, scratch + half * (kMaxGroupThreads / kWarp))
                        : largest_over_warp(value);
}

// Threads per block, and whether a block works on one row.
struct GroupShape {
  int threads;
  bool row_per_block;
  int64_t groups_per_block() const { return row_per_block ? 1 : threads / kWarp; }
};

inline GroupShape choose_group_shape(int64_t width, int vector_size, int cached) {
  const int64_t vectors = (width + vector_size - 1) / vector_size;
  const int64_t warps = (vectors + kWarp * cached - 1) / (kWarp * cached);
  if (warps <= 1) {
    return GroupShape{kWarpsPerBlockOfShortRows * kWarp, false};
  }
  return GroupShape{static_cast<int>(std::min<int64_t>(warps * kWarp, kMaxGroupThreads)), true};
}

// Blocks for so many rows. Groups are counted in 32 bits; each takes further rows in its turn.
inline unsigned grid_for_groups(int64_t rows, const GroupShape& shape) {
  const int64_t blocks = (rows + shape.groups_per_block() - 1) / shape.groups_per_block();
  return static_cast<unsigned>(
      std::min<int64_t>(blocks, std::numeric_limits<int32_t>::max() / shape.groups_per_block()));
}

}  // namespace megallm::cuda
