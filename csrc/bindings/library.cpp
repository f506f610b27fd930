// Schemas of all operators. Their implementations register themselves beside their code, for the CPU and for CUDA.

#include <torch/csrc/stable/library.h>

STABLE_TORCH_LIBRARY(megallm, library) {
  library.def(
      "rms_norm_forward(Tensor x, Tensor? weight, float epsilon, float weight_offset) -> (Tensor y, Tensor "
      "reciprocal_rms)");
  library.def(
      "rms_norm_backward(Tensor grad_output, Tensor x, Tensor? weight, Tensor reciprocal_rms, Tensor? grad_residual, "
      "float weight_offset) -> (Tensor grad_input, Tensor grad_weight)");
}
