// Rows of a table: their addition to a tensor, and the gradient of having looked them up.

#pragma once

#include "include/rows.h"

namespace megallm::table {

// y = x + table[rows], computed in the accumulation type and rounded once.
struct Addition {
  Rows x;
  Tensor table;  // [entries, width], contiguous, x's type
  Tensor rows;   // int64, one for each row of x
  Tensor y;      // like x, contiguous
};

// target[rows[i]] += gradient[i] for every i, in an order that depends on the rows alone. Rows below 0 are left out.
struct Gradient {
  Tensor target;  // [entries, width], contiguous, float32 or float64
  Rows gradient;  // 16-bit or like the target
  Tensor rows;
};

inline void check_rows(const Tensor& rows, const Rows& beside) {
  STD_TORCH_CHECK(
      rows.scalar_type() == ScalarType::Long && rows.numel() == beside.count && rows.device() == beside.tensor.device(),
      "table: there must be one int64 row number for each row");
}

inline Addition prepare_addition(const Tensor& x, const Tensor& table, const Tensor& rows) {
  const ScalarType type = x.scalar_type();
  STD_TORCH_CHECK(type == ScalarType::Float || type == ScalarType::BFloat16 || type == ScalarType::Half ||
                      type == ScalarType::Double,
                  "add_rows: x must be float32, bfloat16, float16 or float64");
  const Rows values = as_rows(x);
  STD_TORCH_CHECK(
      table.dim() == 2 && table.size(1) == values.width && table.scalar_type() == type && table.device() == x.device(),
      "add_rows: the table must have the type of x and rows of its width");
  check_rows(rows, values);
  return Addition{values, torch::stable::contiguous(table), torch::stable::contiguous(rows),
                  torch::stable::new_empty(x, x.sizes())};
}

inline Gradient prepare_gradient(const Tensor& target, const Tensor& gradient, const Tensor& rows) {
  const ScalarType type = gradient.scalar_type();
  const ScalarType wide = target.scalar_type();
  STD_TORCH_CHECK(target.dim() == 2 && target.is_contiguous() && target.device() == gradient.device(),
                  "embedding_gradient: the target must be contiguous, beside the gradient");
  STD_TORCH_CHECK((wide == ScalarType::Float &&
                   (type == ScalarType::Float || type == ScalarType::BFloat16 || type == ScalarType::Half)) ||
                      (wide == ScalarType::Double && type == ScalarType::Double),
                  "embedding_gradient: the target must be float32, or float64 for float64");
  const Rows values = as_rows(gradient);
  STD_TORCH_CHECK(values.width == target.size(1), "embedding_gradient: the target must have rows like the gradient's");
  check_rows(rows, values);
  return Gradient{target, values, torch::stable::contiguous(rows)};
}

}  // namespace megallm::table
