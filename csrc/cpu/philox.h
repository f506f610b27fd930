// Random words of a piece of a row on the CPU.

#pragma once

#include "cpu/simd.h"
#include "cpu/tiles.h"
#include "include/philox.h"

namespace megallm::philox {

// Words 4 * first_block to 4 * (first_block + blocks) of a row.
MEGALLM_CLONES static void row_words(const Key& key, uint64_t row, uint32_t first_block, int64_t blocks,
                                     uint32_t* __restrict__ words) {
#pragma omp simd
  for (int64_t i = 0; i < blocks; ++i) {
    uint32_t w0, w1, w2, w3;
    generate(key, row, first_block + static_cast<uint32_t>(i), w0, w1, w2, w3);
    words[4 * i] = w0;
    words[4 * i + 1] = w1;
    words[4 * i + 2] = w2;
    words[4 * i + 3] = w3;
  }
}

// The key of a CPU tensor int64 [2] and of the step.
inline Key key_of(const Tensor& key, int64_t step) {
  const int64_t* words = static_cast<const int64_t*>(key.const_data_ptr());
  return Key{{static_cast<uint32_t>(words[0]), static_cast<uint32_t>(words[1])}, static_cast<uint32_t>(step)};
}

}  // namespace megallm::philox
