// Softmax of attention scores on the CPU: a row at a time, in a buffer of the accumulation type.

#include "include/softmax.h"

#include <algorithm>
#include <limits>
#include <vector>

#include "cpu/column_sums.h"
#include "cpu/dropout.h"
#include "cpu/tiles.h"
#include "cpu/vector_math.h"

namespace megallm::softmax {
namespace {

template <typename A>
constexpr A kNothing = -std::numeric_limits<A>::infinity();

// Writes z, and returns the largest. A NaN is not the largest of anything. `mask` and `bias` may be null.
template <typename A>
MEGALLM_INLINE A scale_row(const A* scores, const bool* mask, const A* bias, A scale, int64_t count, A* z) {
  if (bias != nullptr) {
#pragma omp simd
    for (int64_t i = 0; i < count; ++i) {
      z[i] = scores[i] * scale + bias[i];
    }
  } else {
#pragma omp simd
    for (int64_t i = 0; i < count; ++i) {
      z[i] = scores[i] * scale;
    }
  }
  if (mask != nullptr) {
#pragma omp simd
    for (int64_t i = 0; i < count; ++i) {
      z[i] = mask[i] ? kNothing<A> : z[i];
    }
  }
  return simd::largest_over_row<A>(count, [&](int64_t i) __attribute__((always_inline)) { return z[i]; });
}

// Turns z into exp(z - largest), and returns the sum.
template <typename A>
MEGALLM_INLINE A exponentiate_row(A* z, A largest, int64_t count) {
  // While all is -inf there is nothing to subtract.
  const A shift = largest == kNothing<A> ? A(0) : largest;
  return simd::sum_over_row<A>(count, [&](int64_t i) __attribute__((always_inline)) {
    z[i] = simd::exponential(z[i] - shift);
    return z[i];
  });
}

template <typename A>
MEGALLM_INLINE void multiply_row(const A* values, A factor, int64_t count, A* result) {
#pragma omp simd
  for (int64_t i = 0; i < count; ++i) {
    result[i] = values[i] * factor;
  }
}

template <typename A>
MEGALLM_INLINE A sum_of_products(const A* left, const A* right, int64_t count) {
  return simd::sum_over_row<A>(count, [&](int64_t i) __attribute__((always_inline)) { return left[i] * right[i]; });
}

template <typename A>
MEGALLM_INLINE void gradient_row(const A* grad, const A* probabilities, A sum, A scale, int64_t count, A* result) {
#pragma omp simd
  for (int64_t i = 0; i < count; ++i) {
    result[i] = scale * (probabilities[i] * (grad[i] - sum));
  }
}

// Per-processor versions exist for plain functions only, not for templates.
#define MEGALLM_SOFTMAX_ROW(A, CLONES)                                                                            \
  CLONES A scale_into(const A* scores, const bool* mask, const A* bias, A scale, int64_t count, A* z) {           \
    return scale_row(scores, mask, bias, scale, count, z);                                                        \
  }                                                                                                               \
  CLONES A exponentiate(A* z, A largest, int64_t count) { return exponentiate_row(z, largest, count); }           \
  CLONES void multiply(const A* values, A factor, int64_t count, A* result) {                                     \
    multiply_row(values, factor, count, result);                                                                  \
  }                                                                                                               \
  CLONES A products(const A* left, const A* right, int64_t count) { return sum_of_products(left, right, count); } \
  CLONES void gradient(const A* grad, const A* probabilities, A sum, A scale, int64_t count, A* result) {         \
    gradient_row(grad, probabilities, sum, scale, count, result);                                                 \
  }

MEGALLM_SOFTMAX_ROW(float, MEGALLM_CLONES)
MEGALLM_SOFTMAX_ROW(double, )
#undef MEGALLM_SOFTMAX_ROW

// What a row has beyond the keys that its query sees.
void write_zeros(const Tensor& tensor, int64_t offset, int64_t count) {
  const int64_t size = tensor.element_size();
  std::fill_n(static_cast<char*>(tensor.mutable_data_ptr()) + offset * size, count * size, char(0));
}

template <typename A>
class ForwardRows {
 public:
  explicit ForwardRows(const Forward& call) : call_(call), z_(width()), read_(width()), written_(width()) {
    if (call.dropout) {
      pieces_.emplace(*call.dropout);
    }
  }

  void run(int64_t row) {
    const int64_t offset = row * width();
    const int64_t count = visible_keys(row, call_.queries, width(), call_.causal);
    const A sum = exponentiate(z_.data(), scale(row, count), count);
    // A row of which nothing is left is 0; a NaN stays one.
    const A factor = sum == A(0) ? A(0) : A(1) / sum;
    if (pieces_) {
      multiply(z_.data(), factor, count, z_.data());
      write(call_.probabilities, offset, count, [&](A* target) { std::copy_n(z_.data(), count, target); });
      write(call_.y, offset, count, [&](A* target) { pieces_->apply(row, 0, z_.data(), count, target); });
    } else {
      write(call_.probabilities, offset, count, [&](A* target) { multiply(z_.data(), factor, count, target); });
    }
  }

 private:
  int64_t width() const { return call_.scores.width; }

  A scale(int64_t row, int64_t count) {
    const uint32_t index = static_cast<uint32_t>(row);
    const A* scores = tiles::source(call_.scores).read(row * call_.scores.stride, count, read_.data());
    const bool* mask =
        call_.mask.data == nullptr ? nullptr : static_cast<const bool*>(call_.mask.data) + call_.mask.offset(index);
    const A* bias = nullptr;
    if (call_.bias.data != nullptr) {
      const tiles::Source source{call_.bias.data, call_.scores.tensor.scalar_type()};
      bias = source.read(call_.bias.offset(index), count, written_.data());
    }
    return scale_into(scores, mask, bias, static_cast<A>(call_.scale), count, z_.data());
  }

  template <typename Fill>
  void write(const Tensor& tensor, int64_t offset, int64_t count, const Fill& fill) {
    const tiles::Target target = tiles::target(tensor);
    A* values = target.begin(offset, written_.data());
    fill(values);
    target.end(offset, count, values);
    write_zeros(tensor, offset + count, width() - count);
  }

  const Forward& call_;
  std::vector<A> z_, read_, written_;
  std::optional<dropout::Pieces> pieces_;
};

template <typename A>
class BackwardRows {
 public:
  explicit BackwardRows(const Backward& call) : call_(call), grad_(width()), read_(width()), written_(width()) {
    if (call.dropout) {
      pieces_.emplace(*call.dropout);
    }
  }

  void run(int64_t row) {
    const int64_t offset = row * width();
    const int64_t count = visible_keys(row, call_.queries, width(), call_.causal);
    const A* grad = tiles::source(call_.grad_output).read(row * call_.grad_output.stride, count, grad_.data());
    if (pieces_) {
      pieces_->apply(row, 0, grad, count, grad_.data());
      grad = grad_.data();
    }
    const A* probabilities = tiles::source(call_.probabilities).read(offset, count, read_.data());
    const A sum = products(grad, probabilities, count);
    const tiles::Target target = tiles::target(call_.grad_scores);
    A* result = target.begin(offset, written_.data());
    gradient(grad, probabilities, sum, static_cast<A>(call_.scale), count, result);
    target.end(offset, count, result);
    write_zeros(call_.grad_scores, offset + count, width() - count);
  }

 private:
  int64_t width() const { return call_.grad_output.width; }

  const Backward& call_;
  std::vector<A> grad_, read_, written_;
  std::optional<dropout::Pieces> pieces_;
};

// Calls `run` of a `RowsOf<A>` for every row, on several threads.
template <typename RowsOf, typename Call>
void for_rows(const Call& call, int64_t rows, int64_t width) {
  torch::stable::parallel_for(0, rows, std::max<int64_t>(1, kGrain / std::max<int64_t>(1, width)),
                              [&](int64_t begin, int64_t end) {
                                RowsOf own(call);
                                for (int64_t row = begin; row < end; ++row) {
                                  own.run(row);
                                }
                              });
}

std::tuple<Tensor, Tensor> forward(const Tensor& scores, const std::optional<Tensor>& mask,
                                   const std::optional<Tensor>& bias, double scale, bool causal,
                                   const std::optional<Tensor>& key, const std::optional<Tensor>& step,
                                   const std::optional<Tensor>& rows, double drop) {
  const Forward call = prepare_forward(scores, mask, bias, scale, causal, key, step, rows, drop);
  scores.scalar_type() == ScalarType::Double ? for_rows<ForwardRows<double>>(call, call.scores.count, call.scores.width)
                                             : for_rows<ForwardRows<float>>(call, call.scores.count, call.scores.width);
  return {call.probabilities, call.y};
}

Tensor backward(const Tensor& grad_output, const Tensor& probabilities, double scale, bool causal,
                const std::optional<Tensor>& key, const std::optional<Tensor>& step, const std::optional<Tensor>& rows,
                double drop) {
  const Backward call = prepare_backward(grad_output, probabilities, scale, causal, key, step, rows, drop);
  grad_output.scalar_type() == ScalarType::Double
      ? for_rows<BackwardRows<double>>(call, call.grad_output.count, call.grad_output.width)
      : for_rows<BackwardRows<float>>(call, call.grad_output.count, call.grad_output.width);
  return call.grad_scores;
}

}  // namespace
}  // namespace megallm::softmax

STABLE_TORCH_LIBRARY_FRAGMENT(megallm, library) {
  library.def(
      "softmax_forward(Tensor scores, Tensor? mask, Tensor? bias, float scale, bool causal, Tensor? key, Tensor? step, "
      "Tensor? rows, float drop) -> (Tensor probabilities, Tensor y)");
  library.def(
      "softmax_backward(Tensor grad_output, Tensor probabilities, float scale, bool causal, Tensor? key, Tensor? step, "
      "Tensor? rows, float drop) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(megallm, CPU, library) {
  library.impl("softmax_forward", TORCH_BOX(&megallm::softmax::forward));
  library.impl("softmax_backward", TORCH_BOX(&megallm::softmax::backward));
}
