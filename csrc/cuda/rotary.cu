// Rotary position embedding on CUDA devices: a block for each token, over the heads of all tensors in one launch.
//
// A thread keeps the cosines and sines of a few pairs in registers and applies them to the same pairs of one head after
// another.

#include <algorithm>

#include "include/cuda_support.cuh"
#include "include/rotary.h"

namespace megallm::rotary {
namespace {

using cuda::AccumulatorOf;
using cuda::load;
using cuda::narrow;
using cuda::store;
using cuda::Vector;
using cuda::widen;

constexpr int kThreads = 256;
constexpr int kMaxItems = 4;

struct Strides {
  int64_t sequence;
  int64_t batch;
  int64_t head;
};

template <typename Scalar>
struct ItemArguments {
  const Scalar* input;
  Scalar* output;
  Strides input_strides;
  Strides output_strides;
  int heads;
  int head_dim;
};

template <typename Scalar, typename Accumulator>
struct Arguments {
  ItemArguments<Scalar> items[kMaxItems];
  int num_items;
  const Accumulator* cosines;
  const Accumulator* sines;
  int64_t sequence_stride;
  int64_t batch_stride;
  // Counted in 32 bits: a 64-bit division is a call, with a stack of its own.
  unsigned tokens;
  unsigned batch;
  int dim;
  int copied;  // elements beyond `dim` in the widest heads, 0 when all are in their place
  bool inverse;
};

template <int kPairs, typename Scalar>
struct Pairs {
  Vector<Scalar, kPairs> first;
  Vector<Scalar, kPairs> second;
};

// Pairs [index, index + kPairs) of a head, or of a table, which is never interleaved.
template <int kPairs, bool kInterleaved, typename Scalar>
__device__ __forceinline__ Pairs<kPairs, Scalar> load_pairs(const Scalar* head, int index, int half) {
  if constexpr (!kInterleaved) {
    return Pairs<kPairs, Scalar>{load<kPairs>(head + index), load<kPairs>(head + half + index)};
  } else {
    Pairs<kPairs, Scalar> pairs;
    if constexpr (kPairs == 1) {
      pairs.first.values[0] = head[2 * index];
      pairs.second.values[0] = head[2 * index + 1];
    } else {
      const Vector<Scalar, 2 * kPairs> both = load<2 * kPairs>(head + 2 * index);
#pragma unroll
      for (int i = 0; i < kPairs; ++i) {
        pairs.first.values[i] = both.values[2 * i];
        pairs.second.values[i] = both.values[2 * i + 1];
      }
    }
    return pairs;
  }
}

template <int kPairs, bool kInterleaved, typename Scalar>
__device__ __forceinline__ void store_pairs(Scalar* head, int index, int half, const Pairs<kPairs, Scalar>& pairs) {
  if constexpr (!kInterleaved) {
    store<kPairs>(head + index, pairs.first);
    store<kPairs>(head + half + index, pairs.second);
  } else if constexpr (kPairs == 1) {
    head[2 * index] = pairs.first.values[0];
    head[2 * index + 1] = pairs.second.values[0];
  } else {
    Vector<Scalar, 2 * kPairs> both;
#pragma unroll
    for (int i = 0; i < kPairs; ++i) {
      both.values[2 * i] = pairs.first.values[i];
      both.values[2 * i + 1] = pairs.second.values[i];
    }
    store<2 * kPairs>(head + 2 * index, both);
  }
}

// The sines with their signs, as they multiply the other element of the pair.
template <int kPairs, typename Accumulator>
__device__ __forceinline__ Pairs<kPairs, Accumulator> signed_sines(const Pairs<kPairs, Accumulator>& sines,
                                                                   bool inverse) {
  Pairs<kPairs, Accumulator> result;
#pragma unroll
  for (int i = 0; i < kPairs; ++i) {
    result.first.values[i] = inverse ? sines.second.values[i] : -sines.first.values[i];
    result.second.values[i] = inverse ? -sines.first.values[i] : sines.second.values[i];
  }
  return result;
}

template <int kPairs, typename Scalar, typename Accumulator>
__device__ __forceinline__ Pairs<kPairs, Scalar> rotated(const Pairs<kPairs, Scalar>& pairs,
                                                         const Pairs<kPairs, Accumulator>& cosines,
                                                         const Pairs<kPairs, Accumulator>& sines) {
  Pairs<kPairs, Scalar> result;
#pragma unroll
  for (int i = 0; i < kPairs; ++i) {
    const Accumulator first = widen(pairs.first.values[i]);
    const Accumulator second = widen(pairs.second.values[i]);
    narrow(first * cosines.first.values[i] + second * sines.first.values[i], result.first.values[i]);
    narrow(second * cosines.second.values[i] + first * sines.second.values[i], result.second.values[i]);
  }
  return result;
}

// A block's threads are `lanes` rows of `columns`: a column is a group of pairs, or of elements that are only copied,
// and each lane takes heads in its turn.
template <int kPairs, bool kInterleaved, typename Scalar, typename Accumulator>
__global__ void __launch_bounds__(kThreads, 3) rotary_kernel(const Arguments<Scalar, Accumulator> arguments) {
  const int half = arguments.dim / 2;
  const int rotated_groups = half / kPairs;
  const int groups = rotated_groups + arguments.copied / kPairs;
  const int columns = min(groups, kThreads);
  const int lanes = kThreads / columns;
  const int lane = static_cast<int>(threadIdx.x) / columns;
  if (lane >= lanes) {
    return;
  }
#pragma unroll 1
  for (unsigned token = blockIdx.x; token < arguments.tokens; token += gridDim.x) {
    const unsigned position = token / arguments.batch;
    const unsigned sample = token % arguments.batch;
    const int64_t table = position * arguments.sequence_stride + sample * arguments.batch_stride;
#pragma unroll 1
    for (int group = static_cast<int>(threadIdx.x) % columns; group < groups; group += columns) {
      const bool rotates = group < rotated_groups;
      const int index = group * kPairs;
      const int copied = arguments.dim + (group - rotated_groups) * kPairs;
      Pairs<kPairs, Accumulator> cosines, sines;
      if (rotates) {
        cosines = load_pairs<kPairs, false>(arguments.cosines + table, index, half);
        sines =
            signed_sines<kPairs>(load_pairs<kPairs, false>(arguments.sines + table, index, half), arguments.inverse);
      }
#pragma unroll 1
      for (int number = 0; number < arguments.num_items; ++number) {
        const ItemArguments<Scalar>& item = arguments.items[number];
        const Strides& from = item.input_strides;
        const Strides& to = item.output_strides;
        const Scalar* input = item.input + position * from.sequence + sample * from.batch + lane * from.head;
        Scalar* output = item.output + position * to.sequence + sample * to.batch + lane * to.head;
#pragma unroll 1
        for (int head = lane; head < item.heads; head += lanes) {
          if (rotates) {
            const auto pairs = load_pairs<kPairs, kInterleaved>(input, index, half);
            store_pairs<kPairs, kInterleaved>(output, index, half, rotated<kPairs>(pairs, cosines, sines));
          } else if (copied < item.head_dim) {
            store<kPairs>(output + copied, load<kPairs>(input + copied));
          }
          input += lanes * from.head;
          output += lanes * to.head;
        }
      }
    }
  }
}

// Whether every head can be accessed 16 bytes at a time.
bool aligned(const Tensor& tensor) {
  const int64_t size = static_cast<int64_t>(tensor.element_size());
  for (int64_t dim = 0; dim < 3; ++dim) {
    if (tensor.size(dim) > 1 && tensor.stride(dim) * size % 16 != 0) {
      return false;
    }
  }
  return cuda::aligned(tensor.const_data_ptr(), 0, 1, size);
}

Strides strides_of(const Tensor& tensor) { return Strides{tensor.stride(0), tensor.stride(1), tensor.stride(2)}; }

template <int kPairs, typename Scalar, typename Accumulator>
void launch(const Arguments<Scalar, Accumulator>& arguments, bool interleaved, cudaStream_t stream) {
  const unsigned grid = std::min(arguments.tokens, 1u << 30);
  if (interleaved) {
    rotary_kernel<kPairs, true><<<grid, kThreads, 0, stream>>>(arguments);
  } else {
    rotary_kernel<kPairs, false><<<grid, kThreads, 0, stream>>>(arguments);
  }
  cuda::check(cudaGetLastError(), "rotary_");
}

template <typename Scalar>
void run(const Call& call, bool interleaved, bool inverse) {
  using Accumulator = typename AccumulatorOf<Scalar>::type;
  constexpr int kPairs = 16 / sizeof(Scalar);
  Arguments<Scalar, Accumulator> arguments{};
  arguments.num_items = static_cast<int>(call.items.size());
  arguments.cosines = static_cast<const Accumulator*>(call.cosines.const_data_ptr());
  arguments.sines = static_cast<const Accumulator*>(call.sines.const_data_ptr());
  arguments.sequence_stride = call.sequence_stride;
  arguments.batch_stride = call.batch_stride;
  arguments.tokens = static_cast<unsigned>(call.sequence * call.batch);
  arguments.batch = static_cast<unsigned>(call.batch);
  arguments.dim = static_cast<int>(call.dim);
  arguments.inverse = inverse;
  bool vectors = call.dim > 0 && call.dim / 2 % kPairs == 0 && cuda::aligned(arguments.cosines, 0, 1, 1) &&
                 cuda::aligned(arguments.sines, 0, 1, 1);
  for (size_t i = 0; i < call.items.size(); ++i) {
    const Item& item = call.items[i];
    arguments.items[i] = ItemArguments<Scalar>{static_cast<const Scalar*>(item.input.const_data_ptr()),
                                               static_cast<Scalar*>(item.output.mutable_data_ptr()),
                                               strides_of(item.input),
                                               strides_of(item.output),
                                               static_cast<int>(item.heads),
                                               static_cast<int>(item.head_dim)};
    if (arguments.items[i].input != arguments.items[i].output) {
      arguments.copied = std::max(arguments.copied, static_cast<int>(item.head_dim - call.dim));
    }
    vectors = vectors && aligned(item.input) && aligned(item.output) && (item.head_dim - call.dim) % kPairs == 0;
  }
  const cudaStream_t stream = cuda::current_stream(call.cosines);
  if (vectors) {
    launch<kPairs>(arguments, interleaved, stream);
  } else {
    launch<1>(arguments, interleaved, stream);
  }
}

void rotary(const std::vector<Tensor>& inputs, const std::vector<Tensor>& outputs, const Tensor& cosines,
            const Tensor& sines, bool interleaved, bool inverse) {
  const torch::stable::accelerator::DeviceGuard guard(cosines.get_device_index());
  const Call call = prepare(inputs, outputs, cosines, sines);
  STD_TORCH_CHECK(call.items.size() <= kMaxItems && call.dim > 0, "rotary: one to ", kMaxItems,
                  " tensors, of which something is rotated");
  STD_TORCH_CHECK(call.sequence * call.batch < (int64_t{1} << 31), "rotary: there must be fewer than 2^31 tokens");
  if (call.sequence * call.batch == 0) {
    return;
  }
  cuda::dispatch(inputs[0], [&](auto scalar) { run<decltype(scalar)>(call, interleaved, inverse); });
}

}  // namespace
}  // namespace megallm::rotary

STABLE_TORCH_LIBRARY_IMPL(megallm, CUDA, library) { library.impl("rotary_", TORCH_BOX(&megallm::rotary::rotary)); }
