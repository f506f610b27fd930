// Cross-entropy on the CPU.

#include "include/cross_entropy.h"

#include <algorithm>
#include <cmath>
#include <limits>

#include "cpu/pieces.h"
#include "cpu/simd.h"
#include "cpu/vector_math.h"

namespace megallm::cross_entropy {
namespace {

using simd::exponential;
using simd::narrow;
using simd::widen;
using torch::headeronly::BFloat16;
using torch::headeronly::Half;
using torch::stable::parallel_for;

// Elements that a thread should have at least, below which waking it costs more than it saves.
constexpr int64_t kGrain = 16384;
// Columns that are gone over twice, for their largest value and for the exponentials: they stay in the nearest cache.
constexpr int64_t kBlock = 4096;

template <typename Accumulator>
struct RowStatistics {
  Accumulator largest;
  Accumulator exponentials;
  Accumulator all;
};

// A NaN is not the largest of anything, but it is in the sum.
template <typename Scalar, typename Accumulator>
MEGALLM_INLINE void row_statistics(const Scalar* x, int64_t width, RowStatistics<Accumulator>& result) {
  constexpr Accumulator kNothing = -std::numeric_limits<Accumulator>::infinity();
  Accumulator largest = kNothing;
  double exponentials = 0;
  double all = 0;
  for (int64_t begin = 0; begin < width; begin += kBlock) {
    const Scalar* block = x + begin;
    const int64_t size = std::min(kBlock, width - begin);
    const Accumulator before = largest;
    largest =
        std::max(largest, simd::largest_over_row<Accumulator>(size, [&](int64_t i) __attribute__((always_inline)) {
                   return static_cast<Accumulator>(widen(block[i]));
                 }));
    // While all is -inf there is nothing to subtract.
    const Accumulator shift = largest == kNothing ? Accumulator(0) : largest;
    exponentials *= begin == 0 || before == kNothing ? 1.0 : std::exp(static_cast<double>(before) - shift);
    Accumulator block_exponentials, block_all;
    simd::two_sums_over_row<Accumulator>(
        size,
        [&](int64_t i)
            __attribute__((always_inline)) { return exponential(static_cast<Accumulator>(widen(block[i]) - shift)); },
        [&](int64_t i) __attribute__((always_inline)) { return static_cast<Accumulator>(widen(block[i])); },
        block_exponentials, block_all,
        // The next block or row, which is gone over for its largest value first.
        [&](int64_t i, int64_t count) __attribute__((always_inline)) { stream::fetch(block + size + i, count); });
    exponentials += block_exponentials;
    all += block_all;
  }
  result = {largest, static_cast<Accumulator>(exponentials), static_cast<Accumulator>(all)};
}

template <typename Scalar, typename Accumulator>
MEGALLM_INLINE void row_gradient(Scalar* x, int64_t width, Accumulator largest, Accumulator factor,
                                 Accumulator subtracted) {
  pieces::for_pieces(width, [&](int64_t column, int64_t count) __attribute__((always_inline)) {
    stream::fetch_ahead(x + column, count);
#pragma omp simd
    for (int64_t i = column; i < column + count; ++i) {
      narrow(exponential(static_cast<Accumulator>(widen(x[i]) - largest)) * factor - subtracted, x[i]);
    }
  });
}

// Per-processor versions exist for plain functions only, not for templates.
#define MEGALLM_CROSS_ENTROPY_ROW(Scalar, Accumulator)                                                    \
  MEGALLM_CLONES void statistics_of(const Scalar* x, int64_t width, RowStatistics<Accumulator>& result) { \
    row_statistics(x, width, result);                                                                     \
  }                                                                                                       \
  MEGALLM_CLONES void write_gradient(Scalar* x, int64_t width, Accumulator largest, Accumulator factor,   \
                                     Accumulator subtracted) {                                            \
    row_gradient(x, width, largest, factor, subtracted);                                                  \
  }

MEGALLM_CROSS_ENTROPY_ROW(float, float)
MEGALLM_CROSS_ENTROPY_ROW(double, double)
MEGALLM_CROSS_ENTROPY_ROW(BFloat16, float)
MEGALLM_CROSS_ENTROPY_ROW(Half, float)
#undef MEGALLM_CROSS_ENTROPY_ROW

template <typename Accumulator>
Accumulator* data(const Tensor& tensor) {
  return static_cast<Accumulator*>(tensor.mutable_data_ptr());
}

int64_t rows_per_thread(int64_t width) { return std::max<int64_t>(1, kGrain / std::max<int64_t>(1, width)); }

template <typename Scalar, typename Accumulator = simd::Accumulation<Scalar>>
void run_statistics(const Statistics& call) {
  const Scalar* logits = call.logits.data<Scalar>();
  const int64_t* targets = static_cast<const int64_t*>(call.targets.const_data_ptr());
  const int64_t rows = call.logits.count;
  Accumulator* largest = data<Accumulator>(call.largest);
  Accumulator* sums = data<Accumulator>(call.sums);
  parallel_for(0, rows, rows_per_thread(call.logits.width), [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) {
      const Scalar* x = logits + row * call.logits.stride;
      RowStatistics<Accumulator> found{};
      statistics_of(x, call.vocabulary.columns, found);
      const int64_t column = call.vocabulary.column_of(targets[row]);
      largest[row] = found.largest;
      sums[row] = found.exponentials;
      sums[rows + row] = column < 0 ? Accumulator(0) : static_cast<Accumulator>(widen(x[column]));
      sums[2 * rows + row] = found.all;
    }
  });
}

template <typename Scalar, typename Accumulator = simd::Accumulation<Scalar>>
void run_gradient(const Gradient& call, int64_t vocab_size, double smoothing, double z_loss, int64_t ignore_index) {
  Scalar* logits = data<Scalar>(call.logits);
  const int64_t* targets = static_cast<const int64_t*>(call.targets.const_data_ptr());
  const Accumulator* largest = data<Accumulator>(call.largest);
  const Accumulator* sums = data<Accumulator>(call.sums);
  const Accumulator* grad_losses = data<Accumulator>(call.grad_losses);
  const Accumulator spread = static_cast<Accumulator>(smoothing / static_cast<double>(vocab_size));
  const Accumulator kept = static_cast<Accumulator>(1.0 - smoothing);
  const Accumulator double_z = static_cast<Accumulator>(2.0 * z_loss);
  parallel_for(0, call.rows, rows_per_thread(call.width), [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) {
      Scalar* x = logits + row * call.stride;
      const int64_t words = targets[row] == ignore_index ? 0 : call.vocabulary.columns;
      const Accumulator grad = grad_losses[row];
      const Accumulator log_sum = std::log(sums[row]) + largest[row];
      const Accumulator factor = grad * (1 + double_z * log_sum) / sums[row];
      const int64_t column = call.vocabulary.column_of(targets[row]);
      Accumulator at_target = 0;
      if (words > 0 && column >= 0) {
        at_target =
            exponential(static_cast<Accumulator>(widen(x[column]) - largest[row])) * factor - grad * (spread + kept);
      }
      write_gradient(x, words, largest[row], factor, grad * spread);
      if (words > 0 && column >= 0) {
        narrow(at_target, x[column]);
      }
      std::fill(x + words, x + call.width, Scalar(0));
    }
  });
}

std::tuple<Tensor, Tensor> statistics(const Tensor& logits, const Tensor& targets, int64_t first, int64_t vocab_size) {
  const Statistics call = prepare_statistics(logits, targets, first, vocab_size);
  simd::dispatch(logits.scalar_type(), [&](auto scalar) { run_statistics<decltype(scalar)>(call); });
  return {call.largest, call.sums};
}

void backward(const Tensor& logits, const Tensor& targets, const Tensor& largest, const Tensor& sums,
              const Tensor& grad_losses, int64_t first, int64_t vocab_size, double smoothing, double z_loss,
              int64_t ignore_index) {
  const Gradient call = prepare_gradient(logits, targets, largest, sums, grad_losses, first, vocab_size);
  simd::dispatch(logits.scalar_type(), [&](auto scalar) {
    run_gradient<decltype(scalar)>(call, vocab_size, smoothing, z_loss, ignore_index);
  });
}

}  // namespace
}  // namespace megallm::cross_entropy

STABLE_TORCH_LIBRARY_FRAGMENT(megallm, library) {
  library.def(
      "cross_entropy_statistics(Tensor logits, Tensor targets, int first, int vocab_size) -> (Tensor largest, Tensor "
      "sums)");
  library.def(
      "cross_entropy_backward_(Tensor(a!) logits, Tensor targets, Tensor largest, Tensor sums, Tensor grad_losses, int "
      "first, int vocab_size, float label_smoothing, float z_loss, int ignore_index) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(megallm, CPU, library) {
  library.impl("cross_entropy_statistics", TORCH_BOX(&megallm::cross_entropy::statistics));
  library.impl("cross_entropy_backward_", TORCH_BOX(&megallm::cross_entropy::backward));
}
