// Dropout of a piece of a row on the CPU.

#pragma once

#include "cpu/philox.h"
#include "include/dropout.h"

namespace megallm::dropout {

// The values where their words are large enough, scaled, and 0 elsewhere; a NaN stays one. May be done in place.
MEGALLM_CLONES static void keep(const float* values, const uint32_t* words, uint32_t threshold, float scale,
                                int64_t count, float* result) {
#pragma omp simd
  for (int64_t i = 0; i < count; ++i) {
    result[i] = values[i] * (words[i] < threshold ? 0.0f : scale);
  }
}

inline void keep(const double* values, const uint32_t* words, uint32_t threshold, double scale, int64_t count,
                 double* result) {
  for (int64_t i = 0; i < count; ++i) {
    result[i] = values[i] * (words[i] < threshold ? 0.0 : scale);
  }
}

// The mask of the rows that one thread works on, a piece at a time.
class Pieces {
 public:
  explicit Pieces(const Mask& mask)
      : key_(philox::key_of(mask.key, *Mask::words(mask.step))),
        rows_(Mask::words(mask.rows)),
        threshold_(mask.threshold),
        scale_(mask.scale) {}

  // `count` elements of a row from `column` on, which is a multiple of four.
  template <typename A>
  void apply(int64_t row, int64_t column, const A* values, int64_t count, A* result) const {
    for (int64_t start = 0; start < count; start += tiles::kTile) {
      const int64_t size = std::min(tiles::kTile, count - start);
      uint32_t words[tiles::kTile];
      philox::row_words(key_, static_cast<uint64_t>(rows_[row]), static_cast<uint32_t>((column + start) / 4),
                        (size + 3) / 4, words);
      keep(values + start, words, threshold_, static_cast<A>(scale_), size, result + start);
    }
  }

 private:
  philox::Key key_;
  const int64_t* rows_;
  uint32_t threshold_;
  double scale_;
};

}  // namespace megallm::dropout
