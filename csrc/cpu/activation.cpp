// Activations on the CPU.

#include "include/activation.h"

#include <vector>

#include "cpu/column_sums.h"
#include "cpu/tiles.h"
#include "cpu/vector_math.h"

namespace megallm::activation {
namespace {

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

// The arithmetic on one tile. `up` is null without a gate.
template <typename A>
struct Tile {
  const A* x;  // the gate's argument, bias added
  const A* up;
  const A* grad_output;
  int64_t count;
  A* y;
  A* grad_x;
  A* grad_up;
};

template <typename Activation, typename A>
MEGALLM_INLINE void forward_tile(const Tile<A>& tile) {
  const A* x = tile.x;
  const A* up = tile.up;
  A* __restrict__ y = tile.y;
  if (up == nullptr) {
#pragma omp simd
    for (int64_t i = 0; i < tile.count; ++i) {
      y[i] = Activation::value(x[i]);
    }
  } else {
#pragma omp simd
    for (int64_t i = 0; i < tile.count; ++i) {
      y[i] = Activation::value(x[i]) * up[i];
    }
  }
}

template <typename Activation, typename A>
MEGALLM_INLINE void backward_tile(const Tile<A>& tile) {
  const A* x = tile.x;
  const A* up = tile.up;
  const A* grad_output = tile.grad_output;
  A* __restrict__ grad_x = tile.grad_x;
  A* __restrict__ grad_up = tile.grad_up;
  if (up == nullptr) {
#pragma omp simd
    for (int64_t i = 0; i < tile.count; ++i) {
      A slope;
      Activation::value_and_slope(x[i], slope);
      grad_x[i] = grad_output[i] * slope;
    }
  } else {
#pragma omp simd
    for (int64_t i = 0; i < tile.count; ++i) {
      A slope;
      const A value = Activation::value_and_slope(x[i], slope);
      grad_x[i] = grad_output[i] * up[i] * slope;
      grad_up[i] = grad_output[i] * value;
    }
  }
}

// Per-processor versions exist for plain functions only, not for templates.
#define MEGALLM_ACTIVATION(Activation)                                                                     \
  MEGALLM_CLONES void Activation##_forward(const Tile<float>& tile) { forward_tile<Activation>(tile); }    \
  MEGALLM_CLONES void Activation##_backward(const Tile<float>& tile) { backward_tile<Activation>(tile); }  \
  [[maybe_unused]] void Activation##_forward(const Tile<double>& tile) { forward_tile<Activation>(tile); } \
  [[maybe_unused]] void Activation##_backward(const Tile<double>& tile) { backward_tile<Activation>(tile); }

MEGALLM_ACTIVATION(Silu)
MEGALLM_ACTIVATION(Gelu)
MEGALLM_ACTIVATION(GeluTanh)
MEGALLM_ACTIVATION(Relu)
MEGALLM_ACTIVATION(SquaredRelu)
#undef MEGALLM_ACTIVATION

template <typename A>
void run_forward_tile(Kind kind, const Tile<A>& tile) {
  switch (kind) {
    case Kind::kSilu:
      return Silu_forward(tile);
    case Kind::kGelu:
      return Gelu_forward(tile);
    case Kind::kGeluTanh:
      return GeluTanh_forward(tile);
    case Kind::kRelu:
      return Relu_forward(tile);
    default:
      return SquaredRelu_forward(tile);
  }
}

template <typename A>
void run_backward_tile(Kind kind, const Tile<A>& tile) {
  switch (kind) {
    case Kind::kSilu:
      return Silu_backward(tile);
    case Kind::kGelu:
      return Gelu_backward(tile);
    case Kind::kGeluTanh:
      return GeluTanh_backward(tile);
    case Kind::kRelu:
      return Relu_backward(tile);
    default:
      return SquaredRelu_backward(tile);
  }
}

template <typename A>
void run_forward(const Forward& call) {
  const std::vector<A> wide_bias = tiles::widened<A>(call.bias);
  const A* bias = call.bias ? wide_bias.data() : nullptr;
  const tiles::Source x = tiles::source(call.x);
  const tiles::Target y = tiles::target(call.y);
  // Without a bias, rows that follow each other are one long row.
  const bool flat = !call.gated && bias == nullptr && call.x.stride == call.x.width;
  const int64_t width = (flat ? call.x.count : 1) * call.x.width / (call.gated ? 2 : 1);
  const int64_t rows = flat ? 1 : call.x.count;
  const int64_t tiles_per_row = (width + kTile - 1) / kTile;
  torch::stable::parallel_for(
      0, rows * tiles_per_row, std::max<int64_t>(1, kGrain / std::min(width, kTile)), [&](int64_t begin, int64_t end) {
        tiles::Buffer<A> x_buffer, up_buffer, y_buffer;
        for (int64_t index = begin; index < end; ++index) {
          const int64_t row = index / tiles_per_row;
          const int64_t column = index % tiles_per_row * kTile;
          const int64_t count = std::min(kTile, width - column);
          const int64_t from = row * call.x.stride + column;
          const int64_t to = row * width + column;
          Tile<A> tile{};
          tile.count = count;
          tile.x = tiles::read_biased(x, from, count, bias, column, x_buffer);
          tile.up = call.gated ? tiles::read_biased(x, from + width, count, bias, width + column, up_buffer) : nullptr;
          tile.y = y.begin(to, y_buffer);
          run_forward_tile(call.kind, tile);
          y.end(to, count, tile.y);
        }
      });
}

// The gradients of one row; `partial` takes up the bias's, or is null.
template <typename A>
void backward_row(const Backward& call, int64_t row, const A* bias, A* partial) {
  const int64_t width = call.x.width / (call.gated ? 2 : 1);
  const tiles::Source x = tiles::source(call.x);
  const tiles::Source grad_output = tiles::source(call.grad_output);
  const tiles::Target grad_input = tiles::target(call.grad_input);
  tiles::Buffer<A> x_buffer, up_buffer, grad_buffer, grad_x_buffer, grad_up_buffer;
  for (int64_t column = 0; column < width; column += kTile) {
    const int64_t count = std::min(kTile, width - column);
    const int64_t from = row * call.x.stride + column;
    const int64_t to = row * call.x.width + column;
    Tile<A> tile{};
    tile.count = count;
    tile.x = tiles::read_biased(x, from, count, bias, column, x_buffer);
    tile.grad_output = grad_output.read(row * call.grad_output.stride + column, count, grad_buffer);
    tile.grad_x = grad_input.begin(to, grad_x_buffer);
    if (call.gated) {
      tile.up = tiles::read_biased(x, from + width, count, bias, width + column, up_buffer);
      tile.grad_up = grad_input.begin(to + width, grad_up_buffer);
    }
    run_backward_tile(call.kind, tile);
    if (partial != nullptr) {
      tiles::accumulate(tile.grad_x, count, partial + column);
      if (call.gated) {
        tiles::accumulate(tile.grad_up, count, partial + width + column);
      }
    }
    grad_input.end(to, count, tile.grad_x);
    if (call.gated) {
      grad_input.end(to + width, count, tile.grad_up);
    }
  }
}

template <typename A>
void run_backward(const Backward& call) {
  const std::vector<A> wide_bias = tiles::widened<A>(call.bias);
  const A* bias = call.bias ? wide_bias.data() : nullptr;
  const Tensor* grad_bias = call.bias ? &call.grad_bias : nullptr;
  for_blocks_of_rows<A>(call.x.count, call.x.width, grad_bias, [&](int64_t begin, int64_t end, A* partial) {
    for (int64_t row = begin; row < end; ++row) {
      backward_row(call, row, bias, partial);
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
