// What the CPU and CUDA versions of cross-entropy share.
//
// Logits [..., columns] are the columns [first, first + columns) of a vocabulary of `vocab_size` words; what lies
// beyond is padding, is not read, and gets gradient zero. With m the largest logit of a row, over all ranks, and S the
// sum of exp(x - m):
//
//   loss = (1 - smoothing) (log S + m - x[target]) + smoothing (log S + m - mean of x) + z_loss (log S + m)^2
//   gradient = grad_loss ((1 + 2 z_loss (log S + m)) exp(x - m) / S - smoothing / vocab_size - (1 - smoothing)
//   [target])

#pragma once

#include "include/rows.h"

namespace megallm::cross_entropy {

// Columns of a row that are words, and the target among them.
struct Vocabulary {
  int64_t first;
  int64_t columns;  // that are words

  // The column of a target, or -1 where another rank has it.
  MEGALLM_HOST_DEVICE int64_t column_of(int64_t target) const {
    const int64_t column = target - first;
    return column >= 0 && column < columns ? column : -1;
  }
};

struct Statistics {
  Rows logits;
  Tensor targets;  // int64 [rows]
  Vocabulary vocabulary;
  Tensor largest;  // [rows], accumulation type
  Tensor sums;     // [3, rows]: of exp(x - largest), of the target's logit, of all logits
};

struct Gradient {
  Tensor logits;  // overwritten
  int64_t rows;
  int64_t width;
  int64_t stride;
  Tensor targets;
  Vocabulary vocabulary;
  Tensor largest;
  Tensor sums;         // [rows] of exp(x - largest), over all ranks
  Tensor grad_losses;  // [rows]
};

inline Vocabulary vocabulary_of(const Tensor& logits, int64_t first, int64_t vocab_size) {
  const int64_t width = logits.size(logits.dim() - 1);
  const int64_t words = vocab_size - first;
  return Vocabulary{first, words < 0 ? 0 : (words < width ? words : width)};
}

inline void check_logits(const Tensor& logits, const Tensor& targets) {
  const ScalarType type = logits.scalar_type();
  STD_TORCH_CHECK(logits.dim() >= 1 && logits.size(logits.dim() - 1) < (int64_t{1} << 30),
                  "cross_entropy: logits must have a last dimension below 2^30");  // columns are 32-bit on CUDA
  STD_TORCH_CHECK(type == ScalarType::Float || type == ScalarType::BFloat16 || type == ScalarType::Half ||
                      type == ScalarType::Double,
                  "cross_entropy: logits must be float32, bfloat16, float16 or float64");
  STD_TORCH_CHECK(targets.scalar_type() == ScalarType::Long && targets.device() == logits.device(),
                  "cross_entropy: targets must be int64, on the device of the logits");
}

inline Statistics prepare_statistics(const Tensor& logits, const Tensor& targets, int64_t first, int64_t vocab_size) {
  check_logits(logits, targets);
  const Rows rows = as_rows(logits);
  const ScalarType type = accumulation_type(logits.scalar_type());
  STD_TORCH_CHECK(targets.numel() == rows.count, "cross_entropy: there must be one target for each row of logits");
  return Statistics{rows, torch::stable::contiguous(targets), vocabulary_of(logits, first, vocab_size),
                    torch::stable::new_empty(logits, {rows.count}, type),
                    torch::stable::new_empty(logits, {3, rows.count}, type)};
}

inline Gradient prepare_gradient(const Tensor& logits, const Tensor& targets, const Tensor& largest, const Tensor& sums,
                                 const Tensor& grad_losses, int64_t first, int64_t vocab_size) {
  check_logits(logits, targets);
  const int64_t width = logits.size(logits.dim() - 1);
  const int64_t count = width == 0 ? 0 : logits.numel() / width;
  const std::optional<int64_t> stride = count == 0 ? width : row_stride(logits, width);
  STD_TORCH_CHECK(stride.has_value(), "cross_entropy: logits that are overwritten must consist of regular rows");
  const ScalarType type = accumulation_type(logits.scalar_type());
  for (const Tensor* tensor : {&largest, &sums, &grad_losses}) {
    STD_TORCH_CHECK(tensor->numel() == count && tensor->scalar_type() == type && tensor->device() == logits.device(),
                    "cross_entropy: there must be one statistic and one gradient for each row of logits");
  }
  STD_TORCH_CHECK(targets.numel() == count, "cross_entropy: there must be one target for each row of logits");
  return Gradient{logits,
                  count,
                  width,
                  *stride,
                  torch::stable::contiguous(targets),
                  vocabulary_of(logits, first, vocab_size),
                  torch::stable::contiguous(largest),
                  torch::stable::contiguous(sums),
                  torch::stable::contiguous(grad_losses)};
}

}  // namespace megallm::cross_entropy
