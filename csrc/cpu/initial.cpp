// Initial values on the CPU: normal and uniform numbers of a slice of a tensor, each a function of the element's place.

#if defined(__GNUC__) && !defined(__clang__)
// The arithmetic of include/initial.h rounds after every operation.
#pragma GCC optimize("fp-contract=off")
#elif defined(__clang__)
#pragma clang fp contract(off)
#endif

#include <torch/csrc/stable/library.h>

#include <algorithm>

#include "cpu/column_sums.h"
#include "cpu/philox.h"
#include "cpu/simd.h"
#include "include/initial.h"

namespace megallm::initial {
namespace {

// Words at once; a multiple of four.
constexpr int64_t kWords = 1024;

MEGALLM_CLONES void normal_values(const uint32_t* words, int64_t count, float* __restrict__ values) {
#pragma omp simd
  for (int64_t i = 0; i < count / 2; ++i) {
    normal_pair(words[2 * i], words[2 * i + 1], values[2 * i], values[2 * i + 1]);
  }
}

MEGALLM_CLONES void uniform_values(const uint32_t* words, int64_t count, float* __restrict__ values) {
#pragma omp simd
  for (int64_t i = 0; i < count; ++i) {
    values[i] = uniform_value(words[i]);
  }
}

// Columns [start, start + num_columns) of the rows numbered `rows`, under `key`: float32 [rows, num_columns].
Tensor rows_of(const Tensor& key, const Tensor& rows, int64_t start, int64_t num_columns, bool normal) {
  check(key, rows, start, num_columns);
  const Tensor keys = torch::stable::contiguous(key);
  const Tensor numbers = torch::stable::contiguous(rows);
  const philox::Key generator = philox::key_of(keys, 0);
  const int64_t* row_numbers = static_cast<const int64_t*>(numbers.const_data_ptr());
  Tensor result = torch::stable::new_empty(rows, {rows.size(0), num_columns}, ScalarType::Float);
  float* values = static_cast<float*>(result.mutable_data_ptr());
  const int64_t first = start / 4 * 4;
  const int64_t stop = start + num_columns;
  torch::stable::parallel_for(0, rows.size(0), std::max<int64_t>(1, kGrain / std::max<int64_t>(1, num_columns)),
                              [&](int64_t begin, int64_t end) {
                                uint32_t words[kWords];
                                float made[kWords];
                                for (int64_t row = begin; row < end; ++row) {
                                  float* target = values + row * num_columns;
                                  for (int64_t column = first; column < stop; column += kWords) {
                                    const int64_t count = std::min(kWords, (stop - column + 3) / 4 * 4);
                                    philox::row_words(generator, static_cast<uint64_t>(row_numbers[row]),
                                                      static_cast<uint32_t>(column / 4), count / 4, words);
                                    normal ? normal_values(words, count, made) : uniform_values(words, count, made);
                                    const int64_t from = std::max(start, column);
                                    const int64_t to = std::min(stop, column + count);
                                    std::copy(made + (from - column), made + (to - column), target + (from - start));
                                  }
                                }
                              });
  return result;
}

}  // namespace
}  // namespace megallm::initial

STABLE_TORCH_LIBRARY_FRAGMENT(megallm, library) {
  library.def("initial_rows(Tensor key, Tensor rows, int start, int num_columns, bool normal) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(megallm, CPU, library) {
  library.impl("initial_rows", TORCH_BOX(&megallm::initial::rows_of));
}
