// Activations on the CPU.

#include "include/activation.h"

#include <algorithm>
#include <vector>

#include "cpu/column_sums.h"
#include "cpu/pieces.h"
#include "cpu/tiles.h"
#include "cpu/vector_math.h"

namespace megallm::activation {
namespace {

using pieces::kPiece;
using simd::Accumulation;
using tiles::kTile;
using torch::headeronly::BFloat16;
using torch::headeronly::Half;

// Each activation's value, and its value and slope, at x.
struct Silu {
  template <bool kShort, typename A>
  static MEGALLM_INLINE A value(A x) {
    return simd::times_sigmoid<kShort>(x, x);
  }
  template <bool kShort, typename A>
  static MEGALLM_INLINE A value_and_slope(A x, A& slope) {
    A rest;
    const A gate = simd::sigmoid_and_rest<kShort>(x, rest);
    slope = gate * (A(1) + x * rest);
    return x * gate;
  }
};

// With the tail of the normal distribution beyond |x|.
struct Gelu {
  template <bool kShort, typename A>
  static MEGALLM_INLINE A value(A x) {
    const A tail = simd::normal_tail<kShort>(std::fabs(x), simd::bell<kShort>(x));
    return x * (x < A(0) ? tail : A(1) - tail);
  }
  template <bool kShort, typename A>
  static MEGALLM_INLINE A value_and_slope(A x, A& slope) {
    const A bell = simd::bell<kShort>(x);
    const A tail = simd::normal_tail<kShort>(std::fabs(x), bell);
    const A probability = x < A(0) ? tail : A(1) - tail;
    slope = probability + x * (bell * A(0.39894228040143267794));
    return x * probability;
  }
};

// (1 + tanh z) / 2 is the sigmoid of 2 z.
struct GeluTanh {
  template <bool kShort, typename A>
  static MEGALLM_INLINE A value(A x) {
    return simd::times_sigmoid<kShort>(x, x * (A(1.5957691216057308) + A(0.07135481627260025) * x * x));
  }
  template <bool kShort, typename A>
  static MEGALLM_INLINE A value_and_slope(A x, A& slope) {
    const A squared = x * x;
    A rest;
    const A gate = simd::sigmoid_and_rest<kShort>(x * (A(1.5957691216057308) + A(0.07135481627260025) * squared), rest);
    slope = gate + x * gate * rest * (A(1.5957691216057308) + A(0.21406444881780076) * squared);
    return x * gate;
  }
};

struct Relu {
  template <bool kShort, typename A>
  static MEGALLM_INLINE A value(A x) {
    return x <= A(0) ? A(0) : x;  // a NaN stays one
  }
  template <bool kShort, typename A>
  static MEGALLM_INLINE A value_and_slope(A x, A& slope) {
    slope = x <= A(0) ? A(0) : A(1);
    return value<kShort>(x);
  }
};

struct SquaredRelu {
  template <bool kShort, typename A>
  static MEGALLM_INLINE A value(A x) {
    return Relu::value<kShort>(x) * Relu::value<kShort>(x);
  }
  template <bool kShort, typename A>
  static MEGALLM_INLINE A value_and_slope(A x, A& slope) {
    slope = A(2) * Relu::value<kShort>(x);
    return value<kShort>(x);
  }
};

// Without a gate there is no up projection.
template <typename Scalar>
struct ForwardRows {
  const Scalar* x;
  int64_t stride;
  const Accumulation<Scalar>* bias;  // with a piece more behind it; or null
  int64_t width;                     // of the result
  bool gated;
  pieces::Target<Scalar> y;
};

template <typename Scalar>
struct BackwardRows {
  const Scalar* grad_output;
  int64_t grad_output_stride;
  const Scalar* x;
  int64_t stride;
  const Accumulation<Scalar>* bias;
  int64_t width;
  bool gated;
  pieces::Target<Scalar> grad_input;
};

// Columns `begin` to `end` of a row.
template <typename Activation, typename Scalar>
MEGALLM_INLINE void forward_row(const ForwardRows<Scalar>& rows, int64_t row, int64_t begin, int64_t end) {
  using A = Accumulation<Scalar>;
  constexpr bool kShort = sizeof(Scalar) == 2;
  const Scalar* x_row = rows.x + row * rows.stride;
  pieces::Piece<A> x_buffer, up_buffer, y_buffer;
  for (int64_t column = begin; column < end; column += kPiece) {
    const int64_t count = std::min(kPiece, end - column);
    const int64_t to = row * rows.width + column;
    const A* bias = rows.bias == nullptr ? nullptr : rows.bias + column;
    const A* x = pieces::read_biased(x_row + column, count, bias, x_buffer);
    A* __restrict__ y = rows.y.place(to, count, y_buffer);
    if (rows.gated) {
      const A* up_bias = bias == nullptr ? nullptr : bias + rows.width;
      const A* up = pieces::read_biased(x_row + rows.width + column, count, up_bias, up_buffer);
#pragma omp simd
      for (int64_t i = 0; i < kPiece; ++i) {
        y[i] = Activation::template value<kShort>(x[i]) * up[i];
      }
    } else {
#pragma omp simd
      for (int64_t i = 0; i < kPiece; ++i) {
        y[i] = Activation::template value<kShort>(x[i]);
      }
    }
    rows.y.write(to, count, y);
  }
}

// The gradients of one row; `partial` takes up the bias's, or is null.
template <typename Activation, typename Scalar>
MEGALLM_INLINE void backward_row(const BackwardRows<Scalar>& rows, int64_t row, Accumulation<Scalar>* partial) {
  using A = Accumulation<Scalar>;
  constexpr bool kShort = sizeof(Scalar) == 2;
  const int64_t width = rows.width;
  const Scalar* x_row = rows.x + row * rows.stride;
  pieces::Piece<A> x_buffer, up_buffer, grad_buffer, grad_x_buffer, grad_up_buffer;
  for (int64_t column = 0; column < width; column += kPiece) {
    const int64_t count = std::min(kPiece, width - column);
    const int64_t to = row * width * (rows.gated ? 2 : 1) + column;
    const A* bias = rows.bias == nullptr ? nullptr : rows.bias + column;
    const A* grad_output = pieces::read(rows.grad_output + row * rows.grad_output_stride + column, count, grad_buffer);
    const A* x = pieces::read_biased(x_row + column, count, bias, x_buffer);
    A* __restrict__ grad_x = rows.grad_input.place(to, count, grad_x_buffer);
    if (rows.gated) {
      const A* up_bias = bias == nullptr ? nullptr : bias + width;
      const A* up = pieces::read_biased(x_row + width + column, count, up_bias, up_buffer);
      A* __restrict__ grad_up = rows.grad_input.place(to + width, count, grad_up_buffer);
#pragma omp simd
      for (int64_t i = 0; i < kPiece; ++i) {
        A slope;
        const A value = Activation::template value_and_slope<kShort>(x[i], slope);
        grad_x[i] = grad_output[i] * up[i] * slope;
        grad_up[i] = grad_output[i] * value;
      }
      if (partial != nullptr) {
        tiles::accumulate_inline(grad_up, count, partial + width + column);
      }
      rows.grad_input.write(to + width, count, grad_up);
    } else {
#pragma omp simd
      for (int64_t i = 0; i < kPiece; ++i) {
        A slope;
        Activation::template value_and_slope<kShort>(x[i], slope);
        grad_x[i] = grad_output[i] * slope;
      }
    }
    if (partial != nullptr) {
      tiles::accumulate_inline(grad_x, count, partial + column);
    }
    rows.grad_input.write(to, count, grad_x);
  }
}

// Per-processor versions exist for plain functions only, not for templates; float64, which the C library computes,
// needs none.
#define MEGALLM_ACTIVATION_OF(Activation, Scalar, CLONES)                                                           \
  CLONES void Activation##_forward(const ForwardRows<Scalar>& rows, int64_t row, int64_t begin, int64_t end) {      \
    forward_row<Activation>(rows, row, begin, end);                                                                 \
  }                                                                                                                 \
  CLONES void Activation##_backward(const BackwardRows<Scalar>& rows, int64_t row, Accumulation<Scalar>* partial) { \
    backward_row<Activation>(rows, row, partial);                                                                   \
  }
#define MEGALLM_ACTIVATION(Activation)                        \
  MEGALLM_ACTIVATION_OF(Activation, float, MEGALLM_CLONES)    \
  MEGALLM_ACTIVATION_OF(Activation, BFloat16, MEGALLM_CLONES) \
  MEGALLM_ACTIVATION_OF(Activation, Half, MEGALLM_CLONES)     \
  MEGALLM_ACTIVATION_OF(Activation, double, )

MEGALLM_ACTIVATION(Silu)
MEGALLM_ACTIVATION(Gelu)
MEGALLM_ACTIVATION(GeluTanh)
MEGALLM_ACTIVATION(Relu)
MEGALLM_ACTIVATION(SquaredRelu)
#undef MEGALLM_ACTIVATION
#undef MEGALLM_ACTIVATION_OF

template <typename Scalar>
void run_forward_row(Kind kind, const ForwardRows<Scalar>& rows, int64_t row, int64_t begin, int64_t end) {
  switch (kind) {
    case Kind::kSilu:
      return Silu_forward(rows, row, begin, end);
    case Kind::kGelu:
      return Gelu_forward(rows, row, begin, end);
    case Kind::kGeluTanh:
      return GeluTanh_forward(rows, row, begin, end);
    case Kind::kRelu:
      return Relu_forward(rows, row, begin, end);
    default:
      return SquaredRelu_forward(rows, row, begin, end);
  }
}

template <typename Scalar>
void run_backward_row(Kind kind, const BackwardRows<Scalar>& rows, int64_t row, Accumulation<Scalar>* partial) {
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

// Of gated activations alone the memory takes longer than the arithmetic, and not in 16 bits.
template <typename Scalar>
pieces::Target<Scalar> target(const Tensor& tensor, int64_t width, bool gated) {
  pieces::Target<Scalar> result = pieces::target<Scalar>(tensor, width);
  result.streamed &= gated && sizeof(Scalar) > 2;
  return result;
}

template <typename Scalar>
void run_forward(const Forward& call) {
  const std::vector<Accumulation<Scalar>> bias = wide_bias<Accumulation<Scalar>>(call.bias);
  // Without a bias, rows that follow each other are one long row.
  const bool flat = !call.gated && !call.bias && call.x.stride == call.x.width;
  const int64_t width = (flat ? call.x.count : 1) * call.x.width / (call.gated ? 2 : 1);
  const int64_t count = flat ? 1 : call.x.count;
  const ForwardRows<Scalar> rows{call.x.data<Scalar>(),
                                 call.x.stride,
                                 call.bias ? bias.data() : nullptr,
                                 width,
                                 call.gated,
                                 target<Scalar>(call.y, width, call.gated)};
  const int64_t tiles_per_row = (width + kTile - 1) / kTile;
  torch::stable::parallel_for(
      0, count * tiles_per_row, std::max<int64_t>(1, kGrain / std::min(width, kTile)), [&](int64_t begin, int64_t end) {
        for (int64_t index = begin; index < end; ++index) {
          const int64_t column = index % tiles_per_row * kTile;
          run_forward_row(call.kind, rows, index / tiles_per_row, column, std::min(column + kTile, width));
        }
        stream::finish();
      });
}

template <typename Scalar>
void run_backward(const Backward& call) {
  using A = Accumulation<Scalar>;
  const std::vector<A> bias = wide_bias<A>(call.bias);
  const int64_t width = call.x.width / (call.gated ? 2 : 1);
  const BackwardRows<Scalar> rows{call.grad_output.data<Scalar>(),
                                  call.grad_output.stride,
                                  call.x.data<Scalar>(),
                                  call.x.stride,
                                  call.bias ? bias.data() : nullptr,
                                  width,
                                  call.gated,
                                  target<Scalar>(call.grad_input, width, call.gated)};
  const Tensor* grad_bias = call.bias ? &call.grad_bias : nullptr;
  for_blocks_of_rows<A>(call.x.count, call.x.width, grad_bias, [&](int64_t begin, int64_t end, A* partial) {
    for (int64_t row = begin; row < end; ++row) {
      run_backward_row(call.kind, rows, row, partial);
    }
    stream::finish();
  });
}

Tensor forward(const Tensor& x, const std::optional<Tensor>& bias, std::string name, bool gated) {
  const Forward call = prepare_forward(x, bias, name, gated);
  if (call.y.numel() == 0) {
    return call.y;
  }
  simd::dispatch(x.scalar_type(), [&](auto scalar) { run_forward<decltype(scalar)>(call); });
  return call.y;
}

std::tuple<Tensor, Tensor> backward(const Tensor& grad_output, const Tensor& x, const std::optional<Tensor>& bias,
                                    std::string name, bool gated) {
  const Backward call = prepare_backward(grad_output, x, bias, name, gated);
  simd::dispatch(x.scalar_type(), [&](auto scalar) { run_backward<decltype(scalar)>(call); });
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
