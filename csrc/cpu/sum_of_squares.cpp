// Sum of squares of a list of tensors on the CPU.

#include <vector>

#include "cpu/simd.h"
#include "cpu/stream.h"
#include "include/flat.h"

namespace megallm::sum_of_squares {
namespace {

// Elements whose squares are added one after the other, in float64. A constant, so that the order of additions is the
// same for any number of threads.
constexpr int64_t kBlock = 16384;
constexpr int kDoubles = 32;

// Squares of float32 in float64 neither overflow nor lose anything: the sum is finite exactly if every element is.
template <typename Scalar>
MEGALLM_INLINE double block_sum(const Scalar* values, int64_t count) {
  double lanes[kDoubles] = {};
  int64_t start = 0;
  for (; start + kDoubles <= count; start += kDoubles) {
    stream::fetch_ahead(values + start, kDoubles);
#pragma omp simd
    for (int lane = 0; lane < kDoubles; ++lane) {
      const double value = values[start + lane];
      lanes[lane] += value * value;
    }
  }
  for (int64_t i = start; i < count; ++i) {
    const double value = values[i];
    lanes[i - start] += value * value;
  }
  double total = 0;
  for (int lane = 0; lane < kDoubles; ++lane) {
    total += lanes[lane];
  }
  return total;
}

MEGALLM_CLONES double sum_block(const float* values, int64_t count) { return block_sum(values, count); }
MEGALLM_CLONES double sum_block(const double* values, int64_t count) { return block_sum(values, count); }

template <typename Scalar>
double sum(const Tensor& tensor) {
  const Scalar* values = static_cast<const Scalar*>(tensor.const_data_ptr());
  const int64_t count = tensor.numel();
  const int64_t blocks = (count + kBlock - 1) / kBlock;
  std::vector<double> partials(blocks);
  torch::stable::parallel_for(0, blocks, 4, [&](int64_t begin, int64_t end) {
    for (int64_t block = begin; block < end; ++block) {
      partials[block] = sum_block(values + block * kBlock, std::min(kBlock, count - block * kBlock));
    }
  });
  double total = 0;
  for (const double partial : partials) {
    total += partial;
  }
  return total;
}

Tensor sum_of_squares(const std::vector<Tensor>& tensors) {
  STD_TORCH_CHECK(!tensors.empty(), "sum_of_squares: there is no tensor");
  double total = 0;
  for (const Tensor& tensor : tensors) {
    check_summand(tensor, tensors[0]);
    total += tensor.scalar_type() == ScalarType::Double ? sum<double>(tensor) : sum<float>(tensor);
  }
  const Tensor result = torch::stable::new_empty(tensors[0], {}, ScalarType::Double);
  *static_cast<double*>(result.mutable_data_ptr()) = total;
  return result;
}

}  // namespace
}  // namespace megallm::sum_of_squares

STABLE_TORCH_LIBRARY_FRAGMENT(megallm, library) { library.def("sum_of_squares(Tensor[] tensors) -> Tensor"); }

STABLE_TORCH_LIBRARY_IMPL(megallm, CPU, library) {
  library.impl("sum_of_squares", TORCH_BOX(&megallm::sum_of_squares::sum_of_squares));
}
