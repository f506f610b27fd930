// Which elements dropout keeps, on CUDA devices.

#pragma once

#include "include/cuda_support.cuh"
#include "include/dropout.h"

namespace megallm::cuda {

// What `dropout::Mask` holds, for a kernel: key and step are read on the device, so that a captured graph sees their
// changes.
template <typename Accumulator>
struct DropoutArguments {
  const int64_t* key;
  const int64_t* step;
  const int64_t* rows;
  uint32_t threshold;
  Accumulator scale;

  __device__ __forceinline__ philox::Key generator() const {
    return philox::Key{{static_cast<uint32_t>(key[0]), static_cast<uint32_t>(key[1])}, static_cast<uint32_t>(*step)};
  }
};

template <typename Accumulator>
DropoutArguments<Accumulator> dropout_arguments(const dropout::Mask& mask) {
  return DropoutArguments<Accumulator>{dropout::Mask::words(mask.key), dropout::Mask::words(mask.step),
                                       dropout::Mask::words(mask.rows), mask.threshold,
                                       static_cast<Accumulator>(mask.scale)};
}

// Multiplies the elements of the row with that global number, from `column` on, which is a multiple of kSize, by what
// dropout makes of them: the scale, or 0.
template <int kSize, typename Accumulator>
__device__ __forceinline__ void drop(const DropoutArguments<Accumulator>& arguments, const philox::Key& generator,
                                     int64_t number, int column, Accumulator (&values)[kSize]) {
  static_assert(kSize == 1 || kSize % 4 == 0, "a block of the generator serves four columns");
  const uint64_t row = static_cast<uint64_t>(number);
  const uint32_t block = static_cast<uint32_t>(column) / 4;
  const auto factor = [&](uint32_t word) { return word < arguments.threshold ? Accumulator(0) : arguments.scale; };
  uint32_t w0, w1, w2, w3;
  if constexpr (kSize == 1) {
    philox::generate(generator, row, block, w0, w1, w2, w3);
    const int place = column % 4;
    values[0] *= factor(place == 0 ? w0 : place == 1 ? w1 : place == 2 ? w2 : w3);
  } else {
#pragma unroll
    for (int i = 0; i < kSize; i += 4) {
      philox::generate(generator, row, block + i / 4, w0, w1, w2, w3);
      values[i] *= factor(w0);
      values[i + 1] *= factor(w1);
      values[i + 2] *= factor(w2);
      values[i + 3] *= factor(w3);
    }
  }
}

}  // namespace megallm::cuda
