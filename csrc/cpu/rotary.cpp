// Rotary position embedding on the CPU.

#include "include/rotary.h"

#include <algorithm>

#include "cpu/simd.h"

namespace megallm::rotary {
namespace {

using simd::narrow;
using simd::widen;
using torch::headeronly::BFloat16;
using torch::headeronly::Half;

constexpr int64_t kGrain = 32768;

// Cosines and sines of one token.
template <typename Accumulator>
struct Angles {
  const Accumulator* cosines;
  const Accumulator* sines;
  int64_t dim;
  bool interleaved;
  bool inverse;
};

// What one token has in one tensor: heads that lie `input_stride` and `output_stride` elements apart.
template <typename Scalar>
struct Heads {
  const Scalar* input;
  Scalar* output;
  int64_t input_stride;
  int64_t output_stride;
  int64_t count;
  int64_t head_dim;
};

// `kStep` is the distance between pairs. Pairs may be written where they were read: each is read before it is written.
template <int kStep, bool kInverse, typename Scalar, typename Accumulator>
MEGALLM_INLINE void rotate_pairs(const Scalar* input, Scalar* output, const Angles<Accumulator>& angles) {
  const int64_t half = angles.dim / 2;
  const int64_t other = kStep == 1 ? half : 1;
  const Accumulator* cosines_of_first = angles.cosines;
  const Accumulator* cosines_of_second = angles.cosines + half;
  const Accumulator* sines_of_first = angles.sines + (kInverse ? half : 0);
  const Accumulator* sines_of_second = angles.sines + (kInverse ? 0 : half);
#pragma omp simd
  for (int64_t i = 0; i < half; ++i) {
    const Accumulator first = widen(input[i * kStep]);
    const Accumulator second = widen(input[i * kStep + other]);
    const Accumulator turned_first = kInverse ? second * sines_of_first[i] : -(second * sines_of_first[i]);
    const Accumulator turned_second = kInverse ? -(first * sines_of_second[i]) : first * sines_of_second[i];
    narrow(first * cosines_of_first[i] + turned_first, output[i * kStep]);
    narrow(second * cosines_of_second[i] + turned_second, output[i * kStep + other]);
  }
}

template <typename Scalar, typename Accumulator>
MEGALLM_INLINE void rotate_heads(const Heads<Scalar>& heads, const Angles<Accumulator>& angles) {
  for (int64_t head = 0; head < heads.count; ++head) {
    const Scalar* input = heads.input + head * heads.input_stride;
    Scalar* output = heads.output + head * heads.output_stride;
    if (angles.interleaved && angles.inverse) {
      rotate_pairs<2, true>(input, output, angles);
    } else if (angles.interleaved) {
      rotate_pairs<2, false>(input, output, angles);
    } else if (angles.inverse) {
      rotate_pairs<1, true>(input, output, angles);
    } else {
      rotate_pairs<1, false>(input, output, angles);
    }
    if (angles.dim < heads.head_dim && input != output) {
      std::memcpy(output + angles.dim, input + angles.dim, (heads.head_dim - angles.dim) * sizeof(Scalar));
    }
  }
}

// Per-processor versions exist for plain functions only, not for templates.
#define MEGALLM_ROTATE(Scalar, Accumulator)                                                   \
  MEGALLM_CLONES void rotate(const Heads<Scalar>& heads, const Angles<Accumulator>& angles) { \
    rotate_heads(heads, angles);                                                              \
  }

MEGALLM_ROTATE(float, float)
MEGALLM_ROTATE(double, double)
MEGALLM_ROTATE(BFloat16, float)
MEGALLM_ROTATE(Half, float)
#undef MEGALLM_ROTATE

template <typename Scalar, typename Accumulator = simd::Accumulation<Scalar>>
void run(const Call& call, bool interleaved, bool inverse) {
  const Accumulator* cosines = static_cast<const Accumulator*>(call.cosines.const_data_ptr());
  const Accumulator* sines = static_cast<const Accumulator*>(call.sines.const_data_ptr());
  int64_t elements = 1;
  for (const Item& item : call.items) {
    elements += item.heads * item.head_dim;
  }
  const int64_t grain = std::max<int64_t>(1, kGrain / elements);
  torch::stable::parallel_for(0, call.sequence * call.batch, grain, [&](int64_t begin, int64_t end) {
    for (int64_t token = begin; token < end; ++token) {
      const int64_t position = token / call.batch;
      const int64_t sample = token % call.batch;
      const int64_t table = position * call.sequence_stride + sample * call.batch_stride;
      const Angles<Accumulator> angles{cosines + table, sines + table, call.dim, interleaved, inverse};
      for (const Item& item : call.items) {
        const Tensor& input = item.input;
        const Tensor& output = item.output;
        rotate(Heads<Scalar>{static_cast<const Scalar*>(input.const_data_ptr()) + position * input.stride(0) +
                                 sample * input.stride(1),
                             static_cast<Scalar*>(output.mutable_data_ptr()) + position * output.stride(0) +
                                 sample * output.stride(1),
                             input.stride(2), output.stride(2), item.heads, item.head_dim},
               angles);
      }
    }
  });
}

void rotary(const std::vector<Tensor>& inputs, const std::vector<Tensor>& outputs, const Tensor& cosines,
            const Tensor& sines, bool interleaved, bool inverse) {
  const Call call = prepare(inputs, outputs, cosines, sines);
  simd::dispatch(inputs[0].scalar_type(), [&](auto scalar) { run<decltype(scalar)>(call, interleaved, inverse); });
}

}  // namespace
}  // namespace megallm::rotary

STABLE_TORCH_LIBRARY_FRAGMENT(megallm, library) {
  library.def(
      "rotary_(Tensor[] inputs, Tensor(a!)[] outputs, Tensor cosines, Tensor sines, bool interleaved, bool inverse) -> "
      "()");
}

STABLE_TORCH_LIBRARY_IMPL(megallm, CPU, library) { library.impl("rotary_", TORCH_BOX(&megallm::rotary::rotary)); }
