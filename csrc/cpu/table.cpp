// Rows of a table on the CPU.

#include "include/table.h"

#include <algorithm>
#include <limits>

#include "cpu/simd.h"

namespace megallm::table {
namespace {

using simd::narrow;
using simd::widen;
using torch::headeronly::BFloat16;
using torch::headeronly::Half;
using torch::stable::parallel_for;

constexpr int64_t kGrain = 32768;
// Columns that a thread has at least: whole lines of the cache.
constexpr int64_t kColumns = 64;

template <typename Scalar, typename Accumulator>
MEGALLM_INLINE void sum_elements(const Scalar* x, const Scalar* added, Scalar* __restrict__ y, int64_t width) {
#pragma omp simd
  for (int64_t i = 0; i < width; ++i) {
    narrow(static_cast<Accumulator>(widen(x[i])) + widen(added[i]), y[i]);
  }
}

template <typename Target, typename Scalar>
MEGALLM_INLINE void add_elements(Target* __restrict__ target, const Scalar* added, int64_t width) {
#pragma omp simd
  for (int64_t i = 0; i < width; ++i) {
    target[i] += widen(added[i]);
  }
}

// Per-processor versions exist for plain functions only, not for templates.
#define MEGALLM_TABLE_ROW(Scalar, Accumulator)                                                  \
  MEGALLM_CLONES void sum_row(const Scalar* x, const Scalar* added, Scalar* y, int64_t width) { \
    sum_elements<Scalar, Accumulator>(x, added, y, width);                                      \
  }                                                                                             \
  MEGALLM_CLONES void add_row(Accumulator* target, const Scalar* added, int64_t width) {        \
    add_elements(target, added, width);                                                         \
  }

MEGALLM_TABLE_ROW(float, float)
MEGALLM_TABLE_ROW(double, double)
MEGALLM_TABLE_ROW(BFloat16, float)
MEGALLM_TABLE_ROW(Half, float)
#undef MEGALLM_TABLE_ROW

const int64_t* row_numbers(const Tensor& rows) { return static_cast<const int64_t*>(rows.const_data_ptr()); }

// Before the work is shared out: what is thrown by one of several threads loses its words.
void check_numbers(const int64_t* rows, int64_t count, int64_t lowest, int64_t entries, const char* operator_name) {
  for (int64_t i = 0; i < count; ++i) {
    STD_TORCH_CHECK(rows[i] >= lowest && rows[i] < entries, operator_name, ": the table has no row ", rows[i]);
  }
}

template <typename Scalar>
void run_addition(const Addition& call) {
  const Scalar* x = call.x.data<Scalar>();
  const Scalar* table = static_cast<const Scalar*>(call.table.const_data_ptr());
  const int64_t* rows = row_numbers(call.rows);
  Scalar* y = static_cast<Scalar*>(call.y.mutable_data_ptr());
  const int64_t width = call.x.width;
  check_numbers(rows, call.x.count, 0, call.table.size(0), "add_rows");
  parallel_for(0, call.x.count, std::max<int64_t>(1, kGrain / std::max<int64_t>(1, width)),
               [&](int64_t begin, int64_t end) {
                 for (int64_t row = begin; row < end; ++row) {
                   sum_row(x + row * call.x.stride, table + rows[row] * width, y + row * width, width);
                 }
               });
}

// Each thread goes through all rows in their order, in columns of its own.
template <typename Scalar, typename Target = simd::Accumulation<Scalar>>
void run_gradient(const Gradient& call) {
  Target* target = static_cast<Target*>(call.target.mutable_data_ptr());
  const Scalar* gradient = call.gradient.data<Scalar>();
  const int64_t* rows = row_numbers(call.rows);
  const int64_t count = call.gradient.count;
  const int64_t width = call.gradient.width;
  check_numbers(rows, count, std::numeric_limits<int64_t>::min(), call.target.size(0), "embedding_gradient");
  const int64_t chunks = (width + kColumns - 1) / kColumns;
  const int64_t grain = std::max<int64_t>(1, kGrain / std::max<int64_t>(1, count * kColumns));
  parallel_for(0, chunks, grain, [&](int64_t begin, int64_t end) {
    const int64_t first = begin * kColumns;
    const int64_t columns = std::min(width, end * kColumns) - first;
    for (int64_t i = 0; i < count; ++i) {
      if (rows[i] >= 0) {
        add_row(target + rows[i] * width + first, gradient + i * call.gradient.stride + first, columns);
      }
    }
  });
}

Tensor add_rows(const Tensor& x, const Tensor& table, const Tensor& rows) {
  const Addition call = prepare_addition(x, table, rows);
  simd::dispatch(x.scalar_type(), [&](auto scalar) { run_addition<decltype(scalar)>(call); });
  return call.y;
}

void embedding_gradient(const Tensor& target, const Tensor& gradient, const Tensor& rows,
                        const std::optional<Tensor>& order) {
  const Gradient call = prepare_gradient(target, gradient, rows);
  simd::dispatch(gradient.scalar_type(), [&](auto scalar) { run_gradient<decltype(scalar)>(call); });
}

}  // namespace
}  // namespace megallm::table

STABLE_TORCH_LIBRARY_FRAGMENT(megallm, library) {
  library.def("add_rows(Tensor x, Tensor table, Tensor rows) -> Tensor");
  library.def("embedding_gradient_(Tensor(a!) target, Tensor gradient, Tensor rows, Tensor? order) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(megallm, CPU, library) {
  library.impl("add_rows", TORCH_BOX(&megallm::table::add_rows));
  library.impl("embedding_gradient_", TORCH_BOX(&megallm::table::embedding_gradient));
}
