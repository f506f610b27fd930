// Initial values on CUDA devices: normal and uniform numbers of a slice of a tensor, each a function of the element's
// place. The bits are the CPU's.

#include "include/initial.h"

#include "include/cuda_support.cuh"
#include "include/strips.cuh"

namespace megallm::initial {
namespace {

// Each block of the generator is the work of a thread: four columns, of which the first and the last of a row may lie
// outside of what is asked for. `column` counts from the first block's first.
template <bool kNormal>
struct Work {
  static constexpr int kSize = 4;
  static constexpr int kSums = 0;
  using Accumulator = float;

  struct Columns {
    philox::Key generator;
  };
  struct Loaded {
    int64_t number;
  };

  const int64_t* key;
  const int64_t* rows;
  uint32_t first_block;
  int before;       // columns of the first block that are not asked for
  int num_columns;  // that are
  bool vectors;     // whether every block is asked for as a whole and can be stored at once
  float* values;    // [rows, num_columns]

  __device__ __forceinline__ void begin(int, Columns& columns) const {
    columns.generator = philox::Key{{static_cast<uint32_t>(key[0]), static_cast<uint32_t>(key[1])}, 0};
  }

  __device__ __forceinline__ void load(int64_t row, int, Loaded& loaded) const { loaded.number = rows[row]; }

  __device__ __forceinline__ void store(int64_t row, int column, const Loaded& loaded, Columns& columns) const {
    uint32_t words[kSize];
    philox::generate(columns.generator, static_cast<uint64_t>(loaded.number), first_block + column / kSize, words[0],
                     words[1], words[2], words[3]);
    cuda::Vector<float, kSize> made;
#pragma unroll
    for (int i = 0; i < kSize; i += 2) {
      if constexpr (kNormal) {
        normal_pair(words[i], words[i + 1], made.values[i], made.values[i + 1]);
      } else {
        made.values[i] = uniform_value(words[i]);
        made.values[i + 1] = uniform_value(words[i + 1]);
      }
    }
    float* target = values + row * num_columns;
    if (vectors) {
      cuda::store<kSize>(target + column, made);
      return;
    }
#pragma unroll
    for (int i = 0; i < kSize; ++i) {
      const int place = column + i - before;
      if (place >= 0 && place < num_columns) {
        target[place] = made.values[i];
      }
    }
  }
};

template <bool kNormal>
void fill(const Tensor& key, const Tensor& rows, int64_t start, const Tensor& values) {
  const int64_t before = start % 4;
  const int64_t num_columns = values.size(1);
  float* data = static_cast<float*>(values.mutable_data_ptr());
  const Work<kNormal> work{static_cast<const int64_t*>(key.const_data_ptr()),
                           static_cast<const int64_t*>(rows.const_data_ptr()),
                           static_cast<uint32_t>(start / 4),
                           static_cast<int>(before),
                           static_cast<int>(num_columns),
                           before == 0 && num_columns % 4 == 0 && cuda::aligned(data, 0, 1, sizeof(float)),
                           data};
  const int64_t width = before + num_columns;
  const cuda::Strips strips = cuda::choose_strips(rows.size(0), width, Work<kNormal>::kSize, false);
  cuda::launch_strips(work, strips, rows.size(0), width, cuda::current_stream(rows), "initial_rows");
}

Tensor rows_of(const Tensor& key, const Tensor& rows, int64_t start, int64_t num_columns, bool normal) {
  const torch::stable::accelerator::DeviceGuard guard(rows.get_device_index());
  check(key, rows, start, num_columns);
  STD_TORCH_CHECK(num_columns < (int64_t{1} << 30), "initial: there must be fewer than 2^30 columns");
  const Tensor result = torch::stable::new_empty(rows, {rows.size(0), num_columns}, ScalarType::Float);
  if (result.numel() > 0) {
    const Tensor keys = torch::stable::contiguous(key);
    const Tensor numbers = torch::stable::contiguous(rows);
    normal ? fill<true>(keys, numbers, start, result) : fill<false>(keys, numbers, start, result);
  }
  return result;
}

}  // namespace
}  // namespace megallm::initial

STABLE_TORCH_LIBRARY_IMPL(megallm, CUDA, library) {
  library.impl("initial_rows", TORCH_BOX(&megallm::initial::rows_of));
}
