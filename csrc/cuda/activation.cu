// Activations on CUDA devices.

#include "include/activation.h"

#include <type_traits>

#include "include/column_sums.cuh"
#include "include/strips.cuh"

namespace megallm::activation {
namespace {

using cuda::AccumulatorOf;
using cuda::exponential;
using cuda::load;
using cuda::narrow;
using cuda::store;
using cuda::Vector;
using cuda::widen;

__device__ __forceinline__ float sigmoid(float x) { return __frcp_rn(1.0f + expf(-x)); }
__device__ __forceinline__ double sigmoid(double x) { return 1.0 / (1.0 + exp(-x)); }

// The sigmoid of x and that of -x. In 16 bits neither the fast reciprocal's error nor that of 1 - gate is seen, and the
// accurate ones would take longer than the memory.
template <typename Scalar, typename A>
__device__ __forceinline__ void sigmoids(A x, A& gate, A& opposite) {
  if constexpr (sizeof(Scalar) == 2) {
    gate = cuda::fast_reciprocal(1.0f + exponential<Scalar>(-x));
    opposite = 1.0f - gate;
  } else {
    gate = sigmoid(x);
    opposite = sigmoid(-x);
  }
}

__device__ __forceinline__ float normal_distribution(float x) { return normcdff(x); }
__device__ __forceinline__ double normal_distribution(double x) { return normcdf(x); }

// The normal distribution and e^(-x^2/2). In 16 bits its tail is the latter times a polynomial in 1 / (1 + p |x|), of
// the form of Abramowitz and Stegun 7.1.26, fitted anew: good to 3.3e-5 of its value, as far as that is a normal
// number, which is a fifteenth of float16's unit in the last place. The accurate one takes twice as long as the memory.
template <typename Scalar, typename A>
__device__ __forceinline__ void normal(A x, A& probability, A& exponential_of_square) {
  if constexpr (sizeof(Scalar) == 2) {
    const float t = cuda::fast_reciprocal(1.0f + 0.375f * fabsf(x));
    exponential_of_square = cuda::fast_power_of_two(-0.7213475204444817f * x * x);
    float polynomial = -0.09098517f;
    polynomial = polynomial * t + 0.20104319f;
    polynomial = polynomial * t + 0.08297414f;
    polynomial = polynomial * t + 0.15792004f;
    polynomial = polynomial * t + 0.14904113f;
    const float tail = exponential_of_square * (polynomial * t);
    probability = x < 0.0f ? tail : 1.0f - tail;
  } else {
    probability = normal_distribution(x);
    exponential_of_square = exponential<Scalar>(A(-0.5) * x * x);
  }
}

template <Kind kKind, typename Scalar, typename A>
__device__ __forceinline__ A value_and_slope(A x, A& slope) {
  if constexpr (kKind == Kind::kSilu) {
    A gate, opposite;
    sigmoids<Scalar>(x, gate, opposite);
    slope = gate * (A(1) + x * opposite);
    return x * gate;
  } else if constexpr (kKind == Kind::kGelu) {
    A probability, exponential_of_square;
    normal<Scalar>(x, probability, exponential_of_square);
    slope = probability + x * (exponential_of_square * A(0.3989422804014327));
    return x * probability;
  } else if constexpr (kKind == Kind::kGeluTanh) {
    // (1 + tanh z) / 2 is the sigmoid of 2 z.
    const A squared = x * x;
    A gate, opposite;
    sigmoids<Scalar>(x * (A(1.5957691216057308) + A(0.07135481627260025) * squared), gate, opposite);
    slope = gate + x * gate * opposite * (A(1.5957691216057308) + A(0.21406444881780076) * squared);
    return x * gate;
  } else {
    const A positive = x <= A(0) ? A(0) : x;  // a NaN stays one
    if constexpr (kKind == Kind::kRelu) {
      slope = x <= A(0) ? A(0) : A(1);
      return positive;
    } else {
      slope = A(2) * positive;
      return positive * positive;
    }
  }
}

template <typename Scalar>
struct Arguments {
  const Scalar* grad_output;  // or null in the forward pass
  int64_t grad_output_stride;
  const Scalar* x;
  int64_t x_stride;
  const Scalar* bias;  // or null
  int width;           // of the output
  Kind kind;
  Scalar* result;  // y, or the gradient of x, contiguous
};

template <int kVectorSize, typename Scalar, typename A>
__device__ __forceinline__ void load_bias(const Scalar* bias, int column, A (&result)[kVectorSize]) {
#pragma unroll
  for (int i = 0; i < kVectorSize; ++i) {
    result[i] = A(0);
  }
  if (bias != nullptr) {
    const Vector<Scalar, kVectorSize> vector = load<kVectorSize>(bias + column);
#pragma unroll
    for (int i = 0; i < kVectorSize; ++i) {
      result[i] = widen(vector.values[i]);
    }
  }
}

// x of some columns of a row, or gate and up.
template <bool kGated, int kSize, typename Scalar>
struct Input {
  Vector<Scalar, kSize> x;
  Vector<Scalar, kGated ? kSize : 1> up;

  __device__ __forceinline__ void load(const Arguments<Scalar>& arguments, int64_t row, int column) {
    const Scalar* from = arguments.x + row * arguments.x_stride + column;
    x = cuda::load<kSize>(from);
    if constexpr (kGated) {
      up = cuda::load<kSize>(from + arguments.width);
    }
  }
};

template <Kind kKind>
using Constant = std::integral_constant<Kind, kKind>;

// Calls `store` with the kind as a constant: one branch for a vector, which all threads take alike.
template <bool kGated, typename Store>
__device__ __forceinline__ void with_kind(Kind kind, const Store& store) {
  if constexpr (kGated) {
    kind == Kind::kSilu ? store(Constant<Kind::kSilu>()) : store(Constant<Kind::kGeluTanh>());
  } else {
    switch (kind) {
      case Kind::kGelu:
        return store(Constant<Kind::kGelu>());
      case Kind::kGeluTanh:
        return store(Constant<Kind::kGeluTanh>());
      case Kind::kRelu:
        return store(Constant<Kind::kRelu>());
      default:
        return store(Constant<Kind::kSquaredRelu>());
    }
  }
}

template <bool kGated, int kVectorSize, typename Scalar, typename A>
struct ForwardWork {
  static constexpr int kSize = kVectorSize;
  static constexpr int kSums = 0;
  using Accumulator = A;

  struct Columns {
    A bias[kSize];
    A up_bias[kGated ? kSize : 1];
  };
  using Loaded = Input<kGated, kSize, Scalar>;

  Arguments<Scalar> arguments;

  __device__ __forceinline__ void begin(int column, Columns& columns) const {
    load_bias(arguments.bias, column, columns.bias);
    if constexpr (kGated) {
      load_bias(arguments.bias, arguments.width + column, columns.up_bias);
    }
  }

  __device__ __forceinline__ void load(int64_t row, int column, Loaded& loaded) const {
    loaded.load(arguments, row, column);
  }

  __device__ __forceinline__ void store(int64_t row, int column, const Loaded& loaded, Columns& columns) const {
    with_kind<kGated>(arguments.kind,
                      [&](auto kind) { store_as<decltype(kind)::value>(row, column, loaded, columns); });
  }

  template <Kind kKind>
  __device__ __forceinline__ void store_as(int64_t row, int column, const Loaded& loaded, Columns& columns) const {
    Vector<Scalar, kSize> result;
#pragma unroll
    for (int i = 0; i < kSize; ++i) {
      A slope;
      A value = value_and_slope<kKind, Scalar, A>(widen(loaded.x.values[i]) + columns.bias[i], slope);
      if constexpr (kGated) {
        value *= widen(loaded.up.values[i]) + columns.up_bias[i];
      }
      narrow(value, result.values[i]);
    }
    cuda::store<kSize>(arguments.result + row * arguments.width + column, result);
  }
};

template <bool kGated, bool kBias, int kVectorSize, typename Scalar, typename A>
struct BackwardWork {
  static constexpr int kSize = kVectorSize;
  static constexpr int kSums = kBias ? (kGated ? 2 * kSize : kSize) : 0;
  using Accumulator = A;

  struct Columns {
    A bias[kBias ? kSize : 1];
    A up_bias[kBias && kGated ? kSize : 1];
    A sums[kBias ? kSums : 1];
  };
  struct Loaded {
    Vector<Scalar, kSize> grad_output;
    Input<kGated, kSize, Scalar> input;
  };

  Arguments<Scalar> arguments;
  A* partials;  // [chunks, partials_width], or null without a bias
  int64_t partials_width;

  __device__ __forceinline__ int64_t sum_column(int column, int i) const {
    return i < kSize ? column + i : arguments.width + column + i - kSize;
  }

  __device__ __forceinline__ void begin(int column, Columns& columns) const {
    if constexpr (kBias) {
      load_bias(arguments.bias, column, columns.bias);
      if constexpr (kGated) {
        load_bias(arguments.bias, arguments.width + column, columns.up_bias);
      }
#pragma unroll
      for (int i = 0; i < kSums; ++i) {
        columns.sums[i] = A(0);
      }
    }
  }

  __device__ __forceinline__ void load(int64_t row, int column, Loaded& loaded) const {
    loaded.grad_output = cuda::load<kSize>(arguments.grad_output + row * arguments.grad_output_stride + column);
    loaded.input.load(arguments, row, column);
  }

  __device__ __forceinline__ void store(int64_t row, int column, const Loaded& loaded, Columns& columns) const {
    with_kind<kGated>(arguments.kind,
                      [&](auto kind) { store_as<decltype(kind)::value>(row, column, loaded, columns); });
  }

  template <Kind kKind>
  __device__ __forceinline__ void store_as(int64_t row, int column, const Loaded& loaded, Columns& columns) const {
    Vector<Scalar, kSize> grad_x;
    Vector<Scalar, kGated ? kSize : 1> grad_up;
#pragma unroll
    for (int i = 0; i < kSize; ++i) {
      A x = widen(loaded.input.x.values[i]);
      if constexpr (kBias) {
        x += columns.bias[i];
      }
      A slope;
      const A value = value_and_slope<kKind, Scalar, A>(x, slope);
      const A grad = widen(loaded.grad_output.values[i]);
      A result = grad * slope;
      if constexpr (kGated) {
        A up = widen(loaded.input.up.values[i]);
        if constexpr (kBias) {
          up += columns.up_bias[i];
          columns.sums[kSize + i] += grad * value;
        }
        result = grad * up * slope;
        narrow(grad * value, grad_up.values[i]);
      }
      if constexpr (kBias) {
        columns.sums[i] += result;
      }
      narrow(result, grad_x.values[i]);
    }
    Scalar* target = arguments.result + row * arguments.width * (kGated ? 2 : 1) + column;
    cuda::store<kSize>(target, grad_x);
    if constexpr (kGated) {
      cuda::store<kSize>(target + arguments.width, grad_up);
    }
  }
};

// Which kinds there are on CUDA: those that models use, which keeps the library small.
void check_kind(Kind kind, bool gated) {
  const bool is_gate = kind == Kind::kSilu || kind == Kind::kGeluTanh;
  STD_TORCH_CHECK(gated ? is_gate : kind != Kind::kSilu,
                  "activation: on CUDA gates are silu or gelu_tanh, and silu is a gate");
}

template <typename Scalar>
bool can_use_vectors(const Arguments<Scalar>& arguments, int64_t rows, int vector_size, bool gated) {
  const auto aligned = [&](const void* data, int64_t stride) {
    return cuda::aligned(data, stride, rows, sizeof(Scalar));
  };
  return arguments.width % vector_size == 0 && aligned(arguments.x, arguments.x_stride) &&
         aligned(arguments.grad_output, arguments.grad_output_stride) && aligned(arguments.bias, 0) &&
         aligned(arguments.result, static_cast<int64_t>(arguments.width) * (gated ? 2 : 1));
}

template <bool kGated, int kSize, typename Scalar>
void launch_forward(const Arguments<Scalar>& arguments, int64_t rows, cudaStream_t stream) {
  using A = typename AccumulatorOf<Scalar>::type;
  const ForwardWork<kGated, kSize, Scalar, A> work{arguments};
  const cuda::Strips strips = cuda::choose_strips(rows, arguments.width, kSize, false);
  cuda::launch_strips(work, strips, rows, arguments.width, stream, "activation_forward");
}

template <bool kGated, typename Scalar>
void run_forward(const Forward& call) {
  const Arguments<Scalar> arguments{nullptr,
                                    0,
                                    call.x.data<Scalar>(),
                                    call.x.stride,
                                    call.bias ? static_cast<const Scalar*>(call.bias->const_data_ptr()) : nullptr,
                                    static_cast<int>(call.x.width / (kGated ? 2 : 1)),
                                    call.kind,
                                    static_cast<Scalar*>(call.y.mutable_data_ptr())};
  // float64 is for checks: it has narrow accesses only.
  constexpr int kSize = cuda::kVector<Scalar>;
  const cudaStream_t stream = cuda::current_stream(call.x.tensor);
  if (can_use_vectors(arguments, call.x.count, kSize, false)) {
    launch_forward<kGated, kSize>(arguments, call.x.count, stream);
  } else {
    launch_forward<kGated, 1>(arguments, call.x.count, stream);
  }
}

template <bool kGated, bool kBias, int kSize, typename Scalar>
void launch_backward(const Arguments<Scalar>& arguments, const Backward& call, cudaStream_t stream) {
  using A = typename AccumulatorOf<Scalar>::type;
  const int64_t rows = call.x.count;
  const cuda::Strips strips = cuda::choose_strips(rows, arguments.width, kSize, kBias);
  std::optional<Tensor> workspace;
  A* partials = nullptr;
  if (kBias) {
    const int64_t sizes[] = {strips.chunks, call.x.width};
    workspace = torch::stable::new_empty(call.grad_bias, torch::headeronly::IntHeaderOnlyArrayRef(sizes, 2));
    partials = static_cast<A*>(workspace->mutable_data_ptr());
  }
  const BackwardWork<kGated, kBias, kSize, Scalar, A> work{arguments, partials, call.x.width};
  cuda::launch_strips(work, strips, rows, arguments.width, stream, "activation_backward");
  if (kBias) {
    cuda::sum_partials(partials, strips.chunks, call.x.width, static_cast<A*>(call.grad_bias.mutable_data_ptr()),
                       stream);
  }
}

template <bool kGated, typename Scalar>
void run_backward(const Backward& call) {
  const Arguments<Scalar> arguments{call.grad_output.data<Scalar>(),
                                    call.grad_output.stride,
                                    call.x.data<Scalar>(),
                                    call.x.stride,
                                    call.bias ? static_cast<const Scalar*>(call.bias->const_data_ptr()) : nullptr,
                                    static_cast<int>(call.x.width / (kGated ? 2 : 1)),
                                    call.kind,
                                    static_cast<Scalar*>(call.grad_input.mutable_data_ptr())};
  constexpr int kSize = cuda::kVector<Scalar>;
  const cudaStream_t stream = cuda::current_stream(call.x.tensor);
  const bool vectors = can_use_vectors(arguments, call.x.count, kSize, kGated);
  if (call.bias) {
    vectors ? launch_backward<kGated, true, kSize>(arguments, call, stream)
            : launch_backward<kGated, true, 1>(arguments, call, stream);
  } else {
    vectors ? launch_backward<kGated, false, kSize>(arguments, call, stream)
            : launch_backward<kGated, false, 1>(arguments, call, stream);
  }
}

Tensor forward(const Tensor& x, const std::optional<Tensor>& bias, std::string name, bool gated) {
  const torch::stable::accelerator::DeviceGuard guard(x.get_device_index());
  const Forward call = prepare_forward(x, bias, name, gated);
  check_kind(call.kind, gated);
  if (call.y.numel() > 0) {
    cuda::dispatch(x, [&](auto scalar) {
      using Scalar = decltype(scalar);
      gated ? run_forward<true, Scalar>(call) : run_forward<false, Scalar>(call);
    });
  }
  return call.y;
}

std::tuple<Tensor, Tensor> backward(const Tensor& grad_output, const Tensor& x, const std::optional<Tensor>& bias,
                                    std::string name, bool gated) {
  const torch::stable::accelerator::DeviceGuard guard(x.get_device_index());
  Backward call = prepare_backward(grad_output, x, bias, name, gated);
  check_kind(call.kind, gated);
  if (x.numel() > 0) {
    cuda::dispatch(x, [&](auto scalar) {
      using Scalar = decltype(scalar);
      gated ? run_backward<true, Scalar>(call) : run_backward<false, Scalar>(call);
    });
  } else {
    torch::stable::zero_(call.grad_bias);
  }
  return {call.grad_input, call.grad_bias};
}

}  // namespace
}  // namespace megallm::activation

STABLE_TORCH_LIBRARY_IMPL(megallm, CUDA, library) {
  library.impl("activation_forward", TORCH_BOX(&megallm::activation::forward));
  library.impl("activation_backward", TORCH_BOX(&megallm::activation::backward));
}
