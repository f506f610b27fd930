// Activations on the CPU.

#include "include/activation.h"

#include <algorithm>
#include <vector>

#include "cpu/column_sums.h"
#include "cpu/tiles.h"
#include "cpu/vector_math.h"

namespace megallm::activation {
namespace {

using tiles::kPiece;
using tiles::kTile;

// Each activation's value, and its value and slope, at x.
struct Silu {
  template <typename A>
  static MEGALLM_INLINE A value(A x) {
    return simd::times_sigmoid(x, x);
  }
  template <typename A>
  static MEGALLM_INLINE A value_and_slope(A x, A& slope) {
    A rest;
    const A gate = simd::sigmoid_and_rest(x, rest);
    slope = gate * (A(1) + x * rest);
    return x * gate;
  }
};

struct Gelu {
  template <typename A>
  static MEGALLM_INLINE A value(A x) {
    return x * simd::normal_distribution(x, simd::bell(x));
  }
  template <typename A>
  static MEGALLM_INLINE A value_and_slope(A x, A& slope) {
    const A bell = simd::bell(x);
    const A probability = simd::normal_distribution(x, bell);
    slope = probability + x * (bell * A(0.39894228040143267794));
    return x * probability;
  }
};

// (1 + tanh z) / 2 is the sigmoid of 2 z.
struct GeluTanh {
  template <typename A>
  static MEGALLM_INLINE A value(A x) {
    return simd::times_sigmoid(x, x * (A(1.5957691216057308) + A(0.07135481627260025) * x * x));
  }
  template <typename A>
  static MEGALLM_INLINE A value_and_slope(A x, A& slope) {
    const A squared = x * x;
    A rest;
    const A gate = simd::sigmoid_and_rest(x * (A(1.5957691216057308) + A(0.07135481627260025) * squared), rest);
    slope = gate + x * gate * rest * (A(1.5957691216057308) + A(0.21406444881780076) * squared);
    return x * gate;
  }
};

struct Relu {
  template <typename A>
  static MEGALLM_INLINE A value(A x) {
    return x <= A(0) ? A(0) : x;  // a NaN stays one
  }
  template <typename A>
  static MEGALLM_INLINE A value_and_slope(A x, A& slope) {
    slope = x <= A(0) ? A(0) : A(1);
    return value(x);
  }
};

struct SquaredRelu {
  template <typename A>
  static MEGALLM_INLINE A value(A x) {
    return Relu::value(x) * Relu::value(x);
  }
  template <typename A>
  static MEGALLM_INLINE A value_and_slope(A x, A& slope) {
    slope = A(2) * Relu::value(x);
    return value(x);
  }
};

// Without a gate there is no up projection.
struct ForwardRows {
  tiles::Source x;
  int64_t stride;
  const void* bias;  // in the accumulation type, with a piece more behind it; or null
  int64_t width;     // of the result
  bool gated;
  tiles::Target y;
};

struct BackwardRows {
  tiles::Source grad_output;
  int64_t grad_output_stride;
  tiles::Source x;
  int64_t stride;
  const void* bias;
  int64_t width;
  bool gated;
  tiles::Target grad_input;
};

// Columns `begin` to `end` of a row.
template <typename Activation, typename A>
MEGALLM_INLINE void forward_row(const ForwardRows& rows, int64_t row, int64_t begin, int64_t end) {
  tiles::Piece<A> x_buffer, up_buffer, y_buffer;
  for (int64_t column = begin; column < end; column += kPiece) {
    const int64_t count = std::min(kPiece, end - column);
    const int64_t to = row * rows.width + column;
    const A* x = tiles::read_biased_piece(rows.x, row * rows.stride, column, count, rows.bias, x_buffer);
    A* __restrict__ y = tiles::place_of_piece(rows.y, to, count, y_buffer);
    if (rows.gated) {
      const A* up =
          tiles::read_biased_piece(rows.x, row * rows.stride, rows.width + column, count, rows.bias, up_buffer);
#pragma omp simd
      for (int64_t i = 0; i < kPiece; ++i) {
        y[i] = Activation::value(x[i]) * up[i];
      }
    } else {
#pragma omp simd
      for (int64_t i = 0; i < kPiece; ++i) {
        y[i] = Activation::value(x[i]);
      }
    }
    tiles::write_piece(rows.y, to, count, y);
  }
}

// The gradients of one row; `partial` takes up the bias's, or is null.
template <typename Activation, typename A>
MEGALLM_INLINE void backward_row(const BackwardRows& rows, int64_t row, A* partial) {
  const int64_t width = rows.width;
  const int64_t row_start = row * rows.stride;
  tiles::Piece<A> x_buffer, up_buffer, grad_buffer, grad_x_buffer, grad_up_buffer;
  for (int64_t column = 0; column < width; column += kPiece) {
    const int64_t count = std::min(kPiece, width - column);
    const int64_t to = row * width * (rows.gated ? 2 : 1) + column;
    const A* grad_output =
        tiles::read_piece(rows.grad_output, row * rows.grad_output_stride + column, count, grad_buffer);
    const A* x = tiles::read_biased_piece(rows.x, row_start, column, count, rows.bias, x_buffer);
    A* __restrict__ grad_x = tiles::place_of_piece(rows.grad_input, to, count, grad_x_buffer);
    if (rows.gated) {
      const A* up = tiles::read_biased_piece(rows.x, row_start, width + column, count, rows.bias, up_buffer);
      A* __restrict__ grad_up = tiles::place_of_piece(rows.grad_input, to + width, count, grad_up_buffer);
#pragma omp simd
      for (int64_t i = 0; i < kPiece; ++i) {
        A slope;
        const A value = Activation::value_and_slope(x[i], slope);
        grad_x[i] = grad_output[i] * up[i] * slope;
        grad_up[i] = grad_output[i] * value;
      }
      if (partial != nullptr) {
        tiles::accumulate_inline(grad_up, count, partial + width + column);
      }
      tiles::write_piece(rows.grad_input, to + width, count, grad_up);
    } else {
#pragma omp simd
      for (int64_t i = 0; i < kPiece; ++i) {
        A slope;
        Activation::value_and_slope(x[i], slope);
        grad_x[i] = grad_output[i] * slope;
      }
    }
    if (partial != nullptr) {
      tiles::accumulate_inline(grad_x, count, partial + column);
    }
    tiles::write_piece(rows.grad_input, to, count, grad_x);
  }
}

// Per-processor versions exist for plain functions only, not for templates. The last argument selects the type.
#define MEGALLM_ACTIVATION(Activation)                                                                                \
  MEGALLM_CLONES void Activation##_forward(const ForwardRows& rows, int64_t row, int64_t begin, int64_t end, float) { \
    forward_row<Activation, float>(rows, row, begin, end);                                                            \
  }                                                                                                                   \
  void Activation##_forward(const ForwardRows& rows, int64_t row, int64_t begin, int64_t end, double) {               \
    forward_row<Activation, double>(rows, row, begin, end);                                                           \
  }                                                                                                                   \
  MEGALLM_CLONES void Activation##_backward(const BackwardRows& rows, int64_t row, float* partial) {                  \
    backward_row<Activation>(rows, row, partial);                                                                     \
  }                                                                                                                   \
  void Activation##_backward(const BackwardRows& rows, int64_t row, double* partial) {                                \
    backward_row<Activation>(rows, row, partial);                                                                     \
  }

MEGALLM_ACTIVATION(Silu)
MEGALLM_ACTIVATION(Gelu)
MEGALLM_ACTIVATION(GeluTanh)
MEGALLM_ACTIVATION(Relu)
MEGALLM_ACTIVATION(SquaredRelu)
#undef MEGALLM_ACTIVATION

template <typename A>
void run_forward_row(Kind kind, const ForwardRows& rows, int64_t row, int64_t begin, int64_t end) {
  switch (kind) {
    case Kind::kSilu:
      return Silu_forward(rows, row, begin, end, A());
    case Kind::kGelu:
      return Gelu_forward(rows, row, begin, end, A());
    case Kind::kGeluTanh:
      return GeluTanh_forward(rows, row, begin, end, A());
    case Kind::kRelu:
      return Relu_forward(rows, row, begin, end, A());
    default:
      return SquaredRelu_forward(rows, row, begin, end, A());
  }
}

template <typename A>
void run_backward_row(Kind kind, const BackwardRows& rows, int64_t row, A* partial) {
  switch (kind) {
    case Kind::kSilu:
      return Silu_backward(rows, row, partial);
    case Kind::kGelu:
      return Gelu_backward(rows, row, partial);
    case Kind::kGeluTanh:
      return GeluTanh_backward(rows, row, partial);
    case Kind::kRelu:
      return Relu_backward(rows, row, partial);
    default:
      return SquaredRelu_backward(rows, row, partial);
  }
}

// With a piece more, since the last piece of a row reads all of its own.
template <typename A>
std::vector<A> wide_bias(const std::optional<Tensor>& bias) {
  std::vector<A> result = tiles::widened<A>(bias);
  result.resize(result.size() + (bias ? kPiece : 0));
  return result;
}

template <typename A>
void run_forward(const Forward& call) {
  const std::vector<A> bias = wide_bias<A>(call.bias);
  // Without a bias, rows that follow each other are one long row.
  const bool flat = !call.gated && !call.bias && call.x.stride == call.x.width;
  const int64_t width = (flat ? call.x.count : 1) * call.x.width / (call.gated ? 2 : 1);
  const int64_t count = flat ? 1 : call.x.count;
  const ForwardRows rows{tiles::source(call.x), call.x.stride, call.bias ? bias.data() : nullptr, width, call.gated,
                         tiles::target(call.y)};
  const int64_t tiles_per_row = (width + kTile - 1) / kTile;
  torch::stable::parallel_for(
      0, count * tiles_per_row, std::max<int64_t>(1, kGrain / std::min(width, kTile)), [&](int64_t begin, int64_t end) {
        for (int64_t index = begin; index < end; ++index) {
          const int64_t column = index % tiles_per_row * kTile;
          run_forward_row<A>(call.kind, rows, index / tiles_per_row, column, std::min(column + kTile, width));
        }
      });
}

template <typename A>
void run_backward(const Backward& call) {
  const std::vector<A> bias = wide_bias<A>(call.bias);
  const BackwardRows rows{tiles::source(call.grad_output),
                          call.grad_output.stride,
                          tiles::source(call.x),
                          call.x.stride,
                          call.bias ? bias.data() : nullptr,
                          call.x.width / (call.gated ? 2 : 1),
                          call.gated,
                          tiles::target(call.grad_input)};
  const Tensor* grad_bias = call.bias ? &call.grad_bias : nullptr;
  for_blocks_of_rows<A>(call.x.count, call.x.width, grad_bias, [&](int64_t begin, int64_t end, A* partial) {
    for (int64_t row = begin; row < end; ++row) {
      run_backward_row(call.kind, rows, row, partial);
    }
  });
}

Tensor forward(const Tensor& x, const std::optional<Tensor>& bias, std::string name, bool gated) {
  const Forward call = prepare_forward(x, bias, name, gated);
  if (call.y.numel() > 0) {
    x.scalar_type() == ScalarType::Double ? run_forward<double>(call) : run_forward<float>(call);
  }
  return call.y;
}

std::tuple<Tensor, Tensor> backward(const Tensor& grad_output, const Tensor& x, const std::optional<Tensor>& bias,
                                    std::string name, bool gated) {
  const Backward call = prepare_backward(grad_output, x, bias, name, gated);
  x.scalar_type() == ScalarType::Double ? run_backward<double>(call) : run_backward<float>(call);
  return {call.grad_input, call.grad_bias};
}

}  // namespace
}  // namespace megallm::activation

STABLE_TORCH_LIBRARY_FRAGMENT(megallm, library) {
  library.def("activation_forward(Tensor x, Tensor? bias, str activation, bool gated) -> Tensor");
  library.def(
      "activation_backward(Tensor grad_output, Tensor x, Tensor? bias, str activation, bool gated) -> (Tensor "
      "grad_input, Tensor grad_bias)");
}

STABLE_TORCH_LIBRARY_IMPL(megallm, CPU, library) {
  library.impl("activation_forward", TORCH_BOX(&megallm::activation::forward));
  library.impl("activation_backward", TORCH_BOX(&megallm::activation::backward));
}
