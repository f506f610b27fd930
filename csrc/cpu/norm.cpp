// LayerNorm and RMSNorm on the CPU.

#include "include/norm.h"

#include <algorithm>
#include <cmath>
#include <vector>

#include "cpu/column_sums.h"
#include "cpu/pieces.h"
#include "cpu/simd.h"

namespace megallm::norm {
namespace {

using simd::narrow;
using simd::widen;
using torch::headeronly::BFloat16;
using torch::headeronly::Half;

template <typename Scalar, typename Accumulator>
struct ForwardRows {
  const Scalar* x;
  int64_t x_stride;
  const Scalar* residual;  // or null
  int64_t residual_stride;
  const Accumulator* weight;
  const Accumulator* bias;  // zeros without one
  Accumulator epsilon;
  int64_t width;
  pieces::Target<Scalar> sum;  // x itself is read without a residual
  pieces::Target<Scalar> y;
  Accumulator* mean;
  Accumulator* reciprocal;
};

template <typename Scalar, typename Accumulator>
struct BackwardRows {
  const Scalar* grad_output;
  int64_t grad_output_stride;
  const Scalar* sum;
  int64_t sum_stride;
  const Scalar* grad_sum;  // or null
  int64_t grad_sum_stride;
  const Accumulator* weight;
  const Accumulator* mean;
  const Accumulator* reciprocal;
  int64_t width;
  pieces::Target<Scalar> grad_input;
};

// `kept` has place for a row where the sum is streamed, since it is read again.
template <bool kCentred, typename Scalar, typename Accumulator>
MEGALLM_INLINE void forward_row(const ForwardRows<Scalar, Accumulator>& rows, int64_t row, Scalar* kept) {
  const Scalar* x = rows.x + row * rows.x_stride;
  const int64_t width = rows.width;
  if (rows.residual != nullptr) {
    const Scalar* residual = rows.residual + row * rows.residual_stride;
    Scalar* const target = rows.sum.data + row * width;
    Scalar* __restrict__ sum = rows.sum.streamed ? kept : target;
    pieces::for_pieces(width, [&](int64_t column, int64_t count) __attribute__((always_inline)) {
      stream::fetch_ahead(x + column, count);
      stream::fetch_ahead(residual + column, count);
#pragma omp simd
      for (int64_t i = column; i < column + count; ++i) {
        narrow(widen(x[i]) + widen(residual[i]), sum[i]);
      }
      if (rows.sum.streamed) {
        stream::write(target + column, sum + column, count * static_cast<int64_t>(sizeof(Scalar)));
      }
    });
    x = sum;
  }
  Accumulator mean = 0;
  if constexpr (kCentred) {
    mean = simd::sum_over_row<Accumulator>(
               width, [&](int64_t i) __attribute__((always_inline)) { return static_cast<Accumulator>(widen(x[i])); }) /
           static_cast<Accumulator>(width);
    rows.mean[row] = mean;
  }
  const Accumulator squares = simd::sum_over_row<Accumulator>(width, [&](int64_t i) __attribute__((always_inline)) {
    const Accumulator value = widen(x[i]) - mean;
    return value * value;
  });
  const Accumulator reciprocal = Accumulator(1) / std::sqrt(squares / static_cast<Accumulator>(width) + rows.epsilon);
  rows.reciprocal[row] = reciprocal;
  const Accumulator* weight = rows.weight;
  const Accumulator* bias = rows.bias;
  const auto value = [&](int64_t i) __attribute__((always_inline)) {
    if constexpr (kCentred) {
      return (widen(x[i]) - mean) * reciprocal * weight[i] + bias[i];
    } else {
      return widen(x[i]) * reciprocal * weight[i];
    }
  };
  pieces::write_row(rows.y, row * width, width, value,
                    [&](int64_t column, int64_t count) __attribute__((always_inline)) {
                      if (rows.residual == nullptr) {
                        stream::fetch(x + rows.x_stride + column, count);
                      }
                    });
}

// What the elements of a row's gradient need of the whole row.
template <typename Accumulator>
struct RowMeans {
  Accumulator mean;
  Accumulator reciprocal;
  Accumulator product;  // of the gradient and the normalised row
  Accumulator grad;     // when centred
};

template <bool kCentred, typename Scalar, typename Accumulator>
MEGALLM_INLINE RowMeans<Accumulator> row_means(const BackwardRows<Scalar, Accumulator>& rows, int64_t row) {
  const Scalar* grad_output = rows.grad_output + row * rows.grad_output_stride;
  const Scalar* x = rows.sum + row * rows.sum_stride;
  const Accumulator* weight = rows.weight;
  const Accumulator width = static_cast<Accumulator>(rows.width);
  RowMeans<Accumulator> means{kCentred ? rows.mean[row] : Accumulator(0), rows.reciprocal[row], 0, 0};
  const Accumulator mean = means.mean;
  if constexpr (kCentred) {
    simd::two_sums_over_row<Accumulator>(
        rows.width,
        [&](int64_t i)
            __attribute__((always_inline)) { return widen(grad_output[i]) * weight[i] * (widen(x[i]) - mean); },
        [&](int64_t i) __attribute__((always_inline)) { return widen(grad_output[i]) * weight[i]; }, means.product,
        means.grad, [](int64_t, int64_t) __attribute__((always_inline)) {});
    means.grad /= width;
  } else {
    means.product = simd::sum_over_row<Accumulator>(rows.width, [&](int64_t i) __attribute__((always_inline)) {
      return widen(grad_output[i]) * weight[i] * widen(x[i]);
    });
  }
  means.product *= means.reciprocal / width;
  return means;
}

template <bool kCentred, bool kGradSum, typename Scalar, typename Accumulator>
MEGALLM_INLINE void input_gradient(const BackwardRows<Scalar, Accumulator>& rows, int64_t row,
                                   const RowMeans<Accumulator>& means) {
  const Scalar* grad_output = rows.grad_output + row * rows.grad_output_stride;
  const Scalar* x = rows.sum + row * rows.sum_stride;
  const Scalar* grad_sum = kGradSum ? rows.grad_sum + row * rows.grad_sum_stride : nullptr;
  const Accumulator* weight = rows.weight;
  const auto value = [&](int64_t i) __attribute__((always_inline)) {
    const Accumulator normalised = (widen(x[i]) - means.mean) * means.reciprocal;
    Accumulator result =
        means.reciprocal * (widen(grad_output[i]) * weight[i] - means.grad - normalised * means.product);
    if constexpr (kGradSum) {
      result += widen(grad_sum[i]);
    }
    return result;
  };
  pieces::write_row(rows.grad_input, row * rows.width, rows.width, value,
                    [&](int64_t column, int64_t count) __attribute__((always_inline)) {
                      stream::fetch(grad_output + rows.grad_output_stride + column, count);
                      stream::fetch(x + rows.sum_stride + column, count);
                      if constexpr (kGradSum) {
                        stream::fetch_ahead(grad_sum + column, count);
                      }
                    });
}

// Adds the rows to the sums in `partial`: of the weight's gradient, then of the bias's. Several rows at once read and
// write the sums once; the gradients of the input are not computed here, since a compiler may round the arithmetic of
// one row and of several differently, and a row's gradient must not depend on its place.
template <bool kCentred, int kRows, typename Scalar, typename Accumulator>
MEGALLM_INLINE void add_parameter_gradients(const BackwardRows<Scalar, Accumulator>& rows, int64_t first,
                                            const RowMeans<Accumulator>* means, Accumulator* __restrict__ partial) {
  const Scalar* grad_output = rows.grad_output + first * rows.grad_output_stride;
  const Scalar* x = rows.sum + first * rows.sum_stride;
  const int64_t width = rows.width;
#pragma omp simd
  for (int64_t i = 0; i < width; ++i) {
    Accumulator grad_weight = partial[i];
    Accumulator grad_bias = kCentred ? partial[width + i] : Accumulator(0);
    for (int row = 0; row < kRows; ++row) {
      const Accumulator grad = widen(grad_output[row * rows.grad_output_stride + i]);
      grad_weight += grad * ((widen(x[row * rows.sum_stride + i]) - means[row].mean) * means[row].reciprocal);
      grad_bias += grad;
    }
    partial[i] = grad_weight;
    if constexpr (kCentred) {
      partial[width + i] = grad_bias;
    }
  }
}

template <bool kCentred, typename Scalar, typename Accumulator>
MEGALLM_INLINE void forward_range(const ForwardRows<Scalar, Accumulator>& rows, int64_t begin, int64_t end,
                                  Scalar* kept) {
  for (int64_t row = begin; row < end; ++row) {
    forward_row<kCentred>(rows, row, kept);
  }
}

template <bool kCentred, bool kGradSum, typename Scalar, typename Accumulator>
MEGALLM_INLINE void backward_range(const BackwardRows<Scalar, Accumulator>& rows, int64_t begin, int64_t end,
                                   Accumulator* partial) {
  constexpr int64_t kTogether = 4;
  for (int64_t first = begin; first < end; first += kTogether) {
    const int64_t count = std::min(kTogether, end - first);
    RowMeans<Accumulator> means[kTogether];
    for (int64_t row = 0; row < count; ++row) {
      means[row] = row_means<kCentred>(rows, first + row);
      input_gradient<kCentred, kGradSum>(rows, first + row, means[row]);
    }
    if (count == kTogether) {
      add_parameter_gradients<kCentred, kTogether>(rows, first, means, partial);
      continue;
    }
    for (int64_t row = 0; row < count; ++row) {
      add_parameter_gradients<kCentred, 1>(rows, first + row, means + row, partial);
    }
  }
}

// Per-processor versions exist for plain functions only, not for templates.
#define MEGALLM_NORM_ROWS(Scalar, Accumulator, name, kCentred)                                                        \
  MEGALLM_CLONES void name##_forward_rows(const ForwardRows<Scalar, Accumulator>& rows, int64_t begin, int64_t end,   \
                                          Scalar* kept) {                                                             \
    forward_range<kCentred>(rows, begin, end, kept);                                                                  \
  }                                                                                                                   \
  MEGALLM_CLONES void name##_backward_rows(const BackwardRows<Scalar, Accumulator>& rows, int64_t begin, int64_t end, \
                                           Accumulator* partial) {                                                    \
    rows.grad_sum == nullptr ? backward_range<kCentred, false>(rows, begin, end, partial)                             \
                             : backward_range<kCentred, true>(rows, begin, end, partial);                             \
  }

MEGALLM_NORM_ROWS(float, float, centred, true)
MEGALLM_NORM_ROWS(double, double, centred, true)
MEGALLM_NORM_ROWS(BFloat16, float, centred, true)
MEGALLM_NORM_ROWS(Half, float, centred, true)
MEGALLM_NORM_ROWS(float, float, plain, false)
MEGALLM_NORM_ROWS(double, double, plain, false)
MEGALLM_NORM_ROWS(BFloat16, float, plain, false)
MEGALLM_NORM_ROWS(Half, float, plain, false)
#undef MEGALLM_NORM_ROWS

template <typename Scalar, typename Accumulator>
std::vector<Accumulator> widened(const Tensor& parameter) {
  std::vector<Accumulator> result(parameter.size(0));
  const bool is_float = parameter.scalar_type() == ScalarType::Float;
  const void* data = parameter.const_data_ptr();
  for (size_t i = 0; i < result.size(); ++i) {
    result[i] = is_float ? static_cast<Accumulator>(static_cast<const float*>(data)[i])
                         : static_cast<Accumulator>(widen(static_cast<const Scalar*>(data)[i]));
  }
  return result;
}

template <typename Scalar, typename Accumulator = simd::Accumulation<Scalar>>
void run_forward(const Forward& call, double epsilon) {
  const int64_t width = call.x.width;
  const std::vector<Accumulator> weight = widened<Scalar, Accumulator>(call.weight);
  const std::vector<Accumulator> bias =
      call.bias ? widened<Scalar, Accumulator>(*call.bias) : std::vector<Accumulator>(call.centred ? width : 0);
  const ForwardRows<Scalar, Accumulator> rows{call.x.data<Scalar>(),
                                              call.x.stride,
                                              call.residual ? call.residual->data<Scalar>() : nullptr,
                                              call.residual ? call.residual->stride : 0,
                                              weight.data(),
                                              bias.data(),
                                              static_cast<Accumulator>(epsilon),
                                              width,
                                              pieces::target<Scalar>(call.sum, width),
                                              pieces::target<Scalar>(call.y, width),
                                              static_cast<Accumulator*>(call.mean.mutable_data_ptr()),
                                              static_cast<Accumulator*>(call.reciprocal.mutable_data_ptr())};
  const int64_t grain = std::max<int64_t>(1, kGrain / std::max<int64_t>(1, width));
  torch::stable::parallel_for(0, call.x.count, grain, [&](int64_t begin, int64_t end) {
    using Line = tiles::Buffer<Scalar, stream::kLine / sizeof(Scalar)>;
    std::vector<Line> lines(rows.sum.streamed ? width * sizeof(Scalar) / stream::kLine : 0);
    Scalar* kept = reinterpret_cast<Scalar*>(lines.data());
    call.centred ? centred_forward_rows(rows, begin, end, kept) : plain_forward_rows(rows, begin, end, kept);
    stream::finish();
  });
}

template <typename Scalar, typename Accumulator = simd::Accumulation<Scalar>>
void run_backward(const Backward& call) {
  const int64_t width = call.sum.width;
  const std::vector<Accumulator> weight = widened<Scalar, Accumulator>(call.weight);
  const BackwardRows<Scalar, Accumulator> rows{call.grad_output.data<Scalar>(),
                                               call.grad_output.stride,
                                               call.sum.data<Scalar>(),
                                               call.sum.stride,
                                               call.grad_sum ? call.grad_sum->data<Scalar>() : nullptr,
                                               call.grad_sum ? call.grad_sum->stride : 0,
                                               weight.data(),
                                               static_cast<const Accumulator*>(call.mean.const_data_ptr()),
                                               static_cast<const Accumulator*>(call.reciprocal.const_data_ptr()),
                                               width,
                                               pieces::target<Scalar>(call.grad_input, width)};
  for_blocks_of_rows<Accumulator>(call.sum.count, call.grad_parameters.numel(), &call.grad_parameters,
                                  [&](int64_t begin, int64_t end, Accumulator* partial) {
                                    call.centred ? centred_backward_rows(rows, begin, end, partial)
                                                 : plain_backward_rows(rows, begin, end, partial);
                                    stream::finish();
                                  });
}

std::tuple<Tensor, Tensor, Tensor, Tensor> forward(const Tensor& x, const std::optional<Tensor>& residual,
                                                   const Tensor& weight, const std::optional<Tensor>& bias,
                                                   double epsilon, bool centred) {
  const Forward call = prepare_forward(x, residual, weight, bias, centred);
  simd::dispatch(x.scalar_type(), [&](auto scalar) { run_forward<decltype(scalar)>(call, epsilon); });
  return {call.y, call.sum, call.mean, call.reciprocal};
}

std::tuple<Tensor, Tensor> backward(const Tensor& grad_output, const Tensor& sum, const Tensor& weight,
                                    const Tensor& mean, const Tensor& reciprocal, const std::optional<Tensor>& grad_sum,
                                    bool centred) {
  const Backward call = prepare_backward(grad_output, sum, weight, mean, reciprocal, grad_sum, centred);
  simd::dispatch(sum.scalar_type(), [&](auto scalar) { run_backward<decltype(scalar)>(call); });
  return {call.grad_input, call.grad_parameters};
}

}  // namespace
}  // namespace megallm::norm

STABLE_TORCH_LIBRARY_FRAGMENT(megallm, library) {
  library.def(
      "norm_forward(Tensor x, Tensor? residual, Tensor weight, Tensor? bias, float epsilon, bool centred) -> (Tensor "
      "y, Tensor sum, Tensor mean, Tensor reciprocal)");
  library.def(
      "norm_backward(Tensor grad_output, Tensor sum, Tensor weight, Tensor mean, Tensor reciprocal, Tensor? grad_sum, "
      "bool centred) -> (Tensor grad_input, Tensor grad_parameters)");
}

STABLE_TORCH_LIBRARY_IMPL(megallm, CPU, library) {
  library.impl("norm_forward", TORCH_BOX(&megallm::norm::forward));
  library.impl("norm_backward", TORCH_BOX(&megallm::norm::backward));
}
