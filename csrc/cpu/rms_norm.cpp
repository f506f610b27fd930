// RMSNorm on the CPU.

#include "include/rms_norm.h"

#include <algorithm>
#include <cmath>
#include <vector>

#include "cpu/column_sums.h"
#include "cpu/simd.h"

namespace megallm::rms_norm {
namespace {

using simd::narrow;
using simd::widen;
using torch::headeronly::BFloat16;
using torch::headeronly::Half;
using torch::stable::parallel_for;

template <typename Scalar, typename Accumulator>
struct ForwardRows {
  const Scalar* x;
  int64_t x_stride;
  const Accumulator* weight;  // offset added
  Accumulator epsilon;
  int64_t width;
  Scalar* y;
  Accumulator* reciprocal_rms;
};

template <typename Scalar, typename Accumulator>
struct BackwardRows {
  const Scalar* grad_output;
  int64_t grad_output_stride;
  const Scalar* x;
  int64_t x_stride;
  const Scalar* grad_residual;  // or null
  int64_t grad_residual_stride;
  const Accumulator* weight;  // offset added
  const Accumulator* reciprocal_rms;
  int64_t width;
  Scalar* grad_input;
};

template <typename Scalar, typename Accumulator>
MEGALLM_INLINE void forward_row(const ForwardRows<Scalar, Accumulator>& rows, int64_t row) {
  const Scalar* x = rows.x + row * rows.x_stride;
  const Accumulator* weight = rows.weight;
  Scalar* y = rows.y + row * rows.width;
  const int64_t width = rows.width;
  const Accumulator sum = simd::sum_over_row<Accumulator>(width, [&](int64_t i) __attribute__((always_inline)) {
    const Accumulator value = widen(x[i]);
    return value * value;
  });
  const Accumulator mean = sum / static_cast<Accumulator>(width);
  const Accumulator reciprocal = Accumulator(1) / std::sqrt(mean + rows.epsilon);
  rows.reciprocal_rms[row] = reciprocal;
#pragma omp simd
  for (int64_t i = 0; i < width; ++i) {
    narrow(widen(x[i]) * reciprocal * weight[i], y[i]);
  }
}

// `grad_weight` is a partial sum that this row is added to, or null.
template <bool kHasResidual, bool kHasWeight, typename Scalar, typename Accumulator>
MEGALLM_INLINE void backward_row(const BackwardRows<Scalar, Accumulator>& rows, int64_t row,
                                 Accumulator* __restrict__ grad_weight) {
  const Scalar* grad_output = rows.grad_output + row * rows.grad_output_stride;
  const Scalar* x = rows.x + row * rows.x_stride;
  const Scalar* grad_residual = kHasResidual ? rows.grad_residual + row * rows.grad_residual_stride : nullptr;
  const Accumulator* weight = rows.weight;
  Scalar* __restrict__ grad_input = rows.grad_input + row * rows.width;
  const int64_t width = rows.width;
  const Accumulator reciprocal = rows.reciprocal_rms[row];
  const Accumulator sum = simd::sum_over_row<Accumulator>(
      width, [&](int64_t i) __attribute__((always_inline)) { return widen(grad_output[i]) * weight[i] * widen(x[i]); });
  const Accumulator mean = sum * reciprocal / static_cast<Accumulator>(width);
#pragma omp simd
  for (int64_t i = 0; i < width; ++i) {
    const Accumulator normalised = widen(x[i]) * reciprocal;
    const Accumulator grad = widen(grad_output[i]);
    Accumulator result = reciprocal * (grad * weight[i] - normalised * mean);
    if constexpr (kHasResidual) {
      result += widen(grad_residual[i]);
    }
    narrow(result, grad_input[i]);
    if constexpr (kHasWeight) {
      grad_weight[i] += grad * normalised;
    }
  }
}

template <typename Scalar, typename Accumulator>
MEGALLM_INLINE void forward_range(const ForwardRows<Scalar, Accumulator>& rows, int64_t begin, int64_t end) {
  for (int64_t row = begin; row < end; ++row) {
    forward_row(rows, row);
  }
}

template <typename Scalar, typename Accumulator>
MEGALLM_INLINE void backward_range(const BackwardRows<Scalar, Accumulator>& rows, int64_t begin, int64_t end,
                                   Accumulator* grad_weight) {
  for (int64_t row = begin; row < end; ++row) {
    if (rows.grad_residual != nullptr) {
      if (grad_weight != nullptr) {
        backward_row<true, true>(rows, row, grad_weight);
      } else {
        backward_row<true, false>(rows, row, grad_weight);
      }
    } else if (grad_weight != nullptr) {
      backward_row<false, true>(rows, row, grad_weight);
    } else {
      backward_row<false, false>(rows, row, grad_weight);
    }
  }
}

// Per-processor versions exist for plain functions only, not for templates.
#define MEGALLM_RMS_NORM_ROWS(Scalar, Accumulator)                                                             \
  MEGALLM_CLONES void forward_rows(const ForwardRows<Scalar, Accumulator>& rows, int64_t begin, int64_t end) { \
    forward_range(rows, begin, end);                                                                           \
  }                                                                                                            \
  MEGALLM_CLONES void backward_rows(const BackwardRows<Scalar, Accumulator>& rows, int64_t begin, int64_t end, \
                                    Accumulator* grad_weight) {                                                \
    backward_range(rows, begin, end, grad_weight);                                                             \
  }

MEGALLM_RMS_NORM_ROWS(float, float)
MEGALLM_RMS_NORM_ROWS(double, double)
MEGALLM_RMS_NORM_ROWS(BFloat16, float)
MEGALLM_RMS_NORM_ROWS(Half, float)
#undef MEGALLM_RMS_NORM_ROWS

template <typename Accumulator, typename Weight>
std::vector<Accumulator> widen_weight(const Tensor& weight, double offset) {
  const Weight* data = static_cast<const Weight*>(weight.const_data_ptr());
  std::vector<Accumulator> result(weight.size(0));
  for (size_t i = 0; i < result.size(); ++i) {
    result[i] = static_cast<Accumulator>(widen(data[i])) + static_cast<Accumulator>(offset);
  }
  return result;
}

// One row in the accumulation type, so that the loops over rows know one type of weight; ones when there is none.
template <typename Scalar, typename Accumulator>
std::vector<Accumulator> effective_weight(const std::optional<Tensor>& weight, double offset, int64_t width) {
  if (!weight) {
    return std::vector<Accumulator>(width, Accumulator(1));
  }
  if (weight->scalar_type() == ScalarType::Float) {
    return widen_weight<Accumulator, float>(*weight, offset);
  }
  return widen_weight<Accumulator, Scalar>(*weight, offset);
}

template <typename Scalar, typename Accumulator>
void run_forward(const Forward& call, double epsilon, double weight_offset) {
  const std::vector<Accumulator> weight =
      effective_weight<Scalar, Accumulator>(call.weight, weight_offset, call.x.width);
  const ForwardRows<Scalar, Accumulator> rows{call.x.data<Scalar>(),
                                              call.x.stride,
                                              weight.data(),
                                              static_cast<Accumulator>(epsilon),
                                              call.x.width,
                                              static_cast<Scalar*>(call.y.mutable_data_ptr()),
                                              static_cast<Accumulator*>(call.reciprocal_rms.mutable_data_ptr())};
  const int64_t grain = std::max<int64_t>(1, kGrain / std::max<int64_t>(1, call.x.width));
  parallel_for(0, call.x.count, grain, [&](int64_t begin, int64_t end) { forward_rows(rows, begin, end); });
}

template <typename Scalar, typename Accumulator>
void run_backward(const Backward& call, double weight_offset) {
  const int64_t width = call.x.width;
  const std::vector<Accumulator> weight = effective_weight<Scalar, Accumulator>(call.weight, weight_offset, width);
  const BackwardRows<Scalar, Accumulator> rows{call.grad_output.data<Scalar>(),
                                               call.grad_output.stride,
                                               call.x.data<Scalar>(),
                                               call.x.stride,
                                               call.grad_residual ? call.grad_residual->data<Scalar>() : nullptr,
                                               call.grad_residual ? call.grad_residual->stride : 0,
                                               weight.data(),
                                               static_cast<const Accumulator*>(call.reciprocal_rms.const_data_ptr()),
                                               width,
                                               static_cast<Scalar*>(call.grad_input.mutable_data_ptr())};
  const Tensor* grad_weight = call.weight ? &call.grad_weight : nullptr;
  for_blocks_of_rows<Accumulator>(
      call.x.count, width, grad_weight,
      [&](int64_t begin, int64_t end, Accumulator* partial) { backward_rows(rows, begin, end, partial); });
}

std::tuple<Tensor, Tensor> forward(const Tensor& x, const std::optional<Tensor>& weight, double epsilon,
                                   double weight_offset) {
  const Forward call = prepare_forward(x, weight);
  switch (x.scalar_type()) {
    case ScalarType::Float:
      run_forward<float, float>(call, epsilon, weight_offset);
      break;
    case ScalarType::Double:
      run_forward<double, double>(call, epsilon, weight_offset);
      break;
    case ScalarType::BFloat16:
      run_forward<BFloat16, float>(call, epsilon, weight_offset);
      break;
    default:
      run_forward<Half, float>(call, epsilon, weight_offset);
  }
  return {call.y, call.reciprocal_rms};
}

std::tuple<Tensor, Tensor> backward(const Tensor& grad_output, const Tensor& x, const std::optional<Tensor>& weight,
                                    const Tensor& reciprocal_rms, const std::optional<Tensor>& grad_residual,
                                    double weight_offset) {
  const Backward call = prepare_backward(grad_output, x, weight, reciprocal_rms, grad_residual);
  switch (x.scalar_type()) {
    case ScalarType::Float:
      run_backward<float, float>(call, weight_offset);
      break;
    case ScalarType::Double:
      run_backward<double, double>(call, weight_offset);
      break;
    case ScalarType::BFloat16:
      run_backward<BFloat16, float>(call, weight_offset);
      break;
    default:
      run_backward<Half, float>(call, weight_offset);
  }
  return {call.grad_input, call.grad_weight};
}

}  // namespace
}  // namespace megallm::rms_norm

STABLE_TORCH_LIBRARY_FRAGMENT(megallm, library) {
  library.def(
      "rms_norm_forward(Tensor x, Tensor? weight, float epsilon, float weight_offset) -> (Tensor y, Tensor "
      "reciprocal_rms)");
  library.def(
      "rms_norm_backward(Tensor grad_output, Tensor x, Tensor? weight, Tensor reciprocal_rms, Tensor? grad_residual, "
      "float weight_offset) -> (Tensor grad_input, Tensor grad_weight)");
}

STABLE_TORCH_LIBRARY_IMPL(megallm, CPU, library) {
  library.impl("rms_norm_forward", TORCH_BOX(&megallm::rms_norm::forward));
  library.impl("rms_norm_backward", TORCH_BOX(&megallm::rms_norm::backward));
}
