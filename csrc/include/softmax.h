// What the CPU and CUDA versions of the softmax of attention scores share: checks of the arguments and allocation of
// the results.
//
//   z = scale * scores + bias, or -inf where masked or later than a causal query may see
//   probabilities = exp(z - m) / sum of exp(z - m), m the largest of the row; all 0 in a row that has nothing but -inf
//   y = probabilities * f                                      f as in dropout.h
//   gradient of z: p * (grad_output * f - sum of grad_output * f * p), and `scale` times that for the scores
//
// Scores [..., queries, keys] have up to two dims before these. Of as many keys as there are, query i sees those up to
// i + keys - queries. A NaN that is not masked is in its row's sum.

#pragma once

#include <string>
#include <tuple>

#include "include/dropout.h"
#include "include/rows.h"

namespace megallm::softmax {

// A mask or a bias of the shape of the scores: where in its memory the row beside a row of the scores begins. Dims
// that it was stretched along have stride 0, so that nothing is copied.
struct Beside {
  const void* data;   // or null
  uint32_t sizes[2];  // of the second and the third of three leading dims
  int64_t strides[3];

  MEGALLM_HOST_DEVICE int64_t offset(uint32_t row) const {
    const uint32_t outer = row / sizes[1];
    return outer / sizes[0] * strides[0] + outer % sizes[0] * strides[1] + row % sizes[1] * strides[2];
  }
};

struct Forward {
  Rows scores;
  Beside mask;  // bool, true where masked
  Beside bias;  // scores' type
  double scale;
  bool causal;
  int64_t queries;
  std::optional<dropout::Mask> dropout;
  Tensor probabilities;  // like scores, contiguous
  Tensor y;              // the same with dropout; [0] without it
};

struct Backward {
  Rows grad_output;
  Tensor probabilities;  // contiguous
  double scale;
  bool causal;
  int64_t queries;
  std::optional<dropout::Mask> dropout;
  Tensor grad_scores;  // like grad_output, contiguous
};

// Keys that the query of a row sees. Rows are counted in 32 bits, in which a GPU divides faster.
MEGALLM_HOST_DEVICE inline int64_t visible_keys(int64_t row, int64_t queries, int64_t keys, bool causal) {
  const int64_t query = static_cast<uint32_t>(row) % static_cast<uint32_t>(queries);
  const int64_t visible = causal ? query + keys - queries + 1 : keys;
  return visible < 0 ? 0 : visible;
}

inline Beside prepare_beside(const std::optional<Tensor>& tensor, const Tensor& scores, ScalarType type,
                             const char* name) {
  if (!tensor) {
    return Beside{};
  }
  const int64_t dims = scores.dim();
  STD_TORCH_CHECK(same_shape(*tensor, scores) && tensor->scalar_type() == type && tensor->device() == scores.device(),
                  "softmax: the ", name, " must be stretched to the shape of the scores, beside them");
  STD_TORCH_CHECK(tensor->size(dims - 1) <= 1 || tensor->stride(dims - 1) == 1, "softmax: the ", name,
                  " must have its keys next to each other");
  Beside beside{tensor->const_data_ptr(), {1, 1}, {0, 0, 0}};
  for (int64_t dim = 0; dim < dims - 1; ++dim) {
    const int64_t place = dim + 4 - dims;
    beside.strides[place] = tensor->stride(dim);
    if (place > 0) {
      beside.sizes[place - 1] = static_cast<uint32_t>(tensor->size(dim));
    }
  }
  return beside;
}

inline void check_scores(const Tensor& scores, const Rows& rows) {
  check_floating(scores, "softmax");
  STD_TORCH_CHECK(scores.dim() >= 2 && scores.dim() <= 4, "softmax: scores must have 2 to 4 dims");
  STD_TORCH_CHECK(rows.count < (int64_t{1} << 31), "softmax: there must be fewer than 2^31 rows");
}

inline std::optional<dropout::Mask> prepare_dropout(const std::optional<Tensor>& key, const std::optional<Tensor>& step,
                                                    const std::optional<Tensor>& rows, double drop,
                                                    const Rows& beside) {
  STD_TORCH_CHECK(key.has_value() == step.has_value() && key.has_value() == rows.has_value(),
                  "softmax: key, step and rows of dropout go together");
  return key ? std::optional(dropout::prepare_mask(*key, *step, *rows, drop, beside)) : std::nullopt;
}

inline Forward prepare_forward(const Tensor& scores, const std::optional<Tensor>& mask,
                               const std::optional<Tensor>& bias, double scale, bool causal,
                               const std::optional<Tensor>& key, const std::optional<Tensor>& step,
                               const std::optional<Tensor>& rows, double drop) {
  const Rows values = as_rows(scores);
  check_scores(scores, values);
  return Forward{values,
                 prepare_beside(mask, scores, ScalarType::Bool, "mask"),
                 prepare_beside(bias, scores, scores.scalar_type(), "bias"),
                 scale,
                 causal,
                 scores.size(scores.dim() - 2),
                 prepare_dropout(key, step, rows, drop, values),
                 torch::stable::new_empty(scores, scores.sizes()),
                 key ? torch::stable::new_empty(scores, scores.sizes()) : torch::stable::new_empty(scores, {0})};
}

inline Backward prepare_backward(const Tensor& grad_output, const Tensor& probabilities, double scale, bool causal,
                                 const std::optional<Tensor>& key, const std::optional<Tensor>& step,
                                 const std::optional<Tensor>& rows, double drop) {
  const Rows values = as_rows(grad_output);
  check_scores(grad_output, values);
  STD_TORCH_CHECK(same_shape(probabilities, grad_output) && probabilities.is_contiguous() &&
                      probabilities.scalar_type() == grad_output.scalar_type() &&
                      probabilities.device() == grad_output.device(),
                  "softmax: the probabilities must be contiguous, and have shape, type and device of the gradient");
  return Backward{values,
                  probabilities,
                  scale,
                  causal,
                  grad_output.size(grad_output.dim() - 2),
                  prepare_dropout(key, step, rows, drop, values),
                  torch::stable::new_empty(grad_output, grad_output.sizes())};
}

}  // namespace megallm::softmax
