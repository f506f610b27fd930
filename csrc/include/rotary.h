// What the CPU and CUDA versions of rotary position embedding share.
//
// Elements a and b of a head are a pair: either i and i + dim / 2, or 2 i and 2 i + 1 when interleaved. With cosines
// and sines of their places,
//
//   forward:   a' = a cos_a - b sin_a     b' = b cos_b + a sin_b
//   inverse:   a' = a cos_a + b sin_b     b' = b cos_b - a sin_a     (the transposed map, which the backward pass
//   needs)
//
// Elements from `dim` on are copied, unless they are in their place already.

#pragma once

#include <vector>

#include "include/rows.h"

namespace megallm::rotary {

// One tensor [sequence, batch, heads, head_dim], read from `input` and written to `output`, which may be the same.
struct Item {
  Tensor input;
  Tensor output;
  int64_t heads;
  int64_t head_dim;
};

struct Call {
  std::vector<Item> items;
  Tensor cosines;  // [sequence, batch or 1, 1, dim], contiguous
  Tensor sines;
  int64_t sequence;
  int64_t batch;
  int64_t dim;
  // Elements of the tables between two positions, and between two sequences of the batch.
  int64_t sequence_stride;
  int64_t batch_stride;
};

inline Call prepare(const std::vector<Tensor>& inputs, const std::vector<Tensor>& outputs, const Tensor& cosines,
                    const Tensor& sines) {
  STD_TORCH_CHECK(!inputs.empty() && inputs.size() == outputs.size(), "rotary: every input has its output");
  const Tensor& first = inputs[0];
  STD_TORCH_CHECK(first.dim() == 4 && cosines.dim() == 4 && same_shape(cosines, sines),
                  "rotary: tensors must have the dims sequence, batch, head, element");
  const ScalarType type = first.scalar_type();
  STD_TORCH_CHECK(type == ScalarType::Float || type == ScalarType::BFloat16 || type == ScalarType::Half ||
                      type == ScalarType::Double,
                  "rotary: tensors must be float32, bfloat16, float16 or float64");
  STD_TORCH_CHECK(cosines.scalar_type() == accumulation_type(type) && sines.scalar_type() == accumulation_type(type),
                  "rotary: cosines and sines must be float32, or float64 for float64");
  const int64_t sequence = first.size(0);
  const int64_t batch = first.size(1);
  const int64_t dim = cosines.size(3);
  STD_TORCH_CHECK(cosines.size(0) == sequence && (cosines.size(1) == batch || cosines.size(1) == 1) &&
                      cosines.size(2) == 1 && dim % 2 == 0,
                  "rotary: cosines must have the shape [sequence, batch or 1, 1, an even dim]");
  Call call{{},
            torch::stable::contiguous(cosines),
            torch::stable::contiguous(sines),
            sequence,
            batch,
            dim,
            cosines.size(1) * dim,
            cosines.size(1) == 1 ? 0 : dim};
  for (size_t i = 0; i < inputs.size(); ++i) {
    const Tensor& input = inputs[i];
    const Tensor& output = outputs[i];
    STD_TORCH_CHECK(same_shape(input, output) && input.dim() == 4 && input.size(0) == sequence &&
                        input.size(1) == batch && input.size(3) >= dim && input.size(3) < (int64_t{1} << 20) &&
                        input.size(2) < (int64_t{1} << 20),
                    "rotary: inputs and outputs must have the shape [sequence, batch, heads, at least dim]");
    for (const Tensor* tensor : {&input, &output}) {
      STD_TORCH_CHECK(tensor->scalar_type() == type && tensor->device() == cosines.device(),
                      "rotary: tensors must have one type and be on one device");
    }
    STD_TORCH_CHECK(output.stride(3) == 1 || output.size(3) <= 1, "rotary: outputs must have contiguous heads");
    const bool contiguous_heads = input.stride(3) == 1 || input.size(3) <= 1;
    call.items.push_back(
        Item{contiguous_heads ? input : torch::stable::contiguous(input), output, input.size(2), input.size(3)});
  }
  return call;
}

}  // namespace megallm::rotary
