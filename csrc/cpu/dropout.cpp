// Bias, dropout and residual addition on the CPU.

#include "cpu/dropout.h"

#include "cpu/column_sums.h"
#include "cpu/tiles.h"

namespace megallm::dropout {
namespace {

using tiles::kTile;

template <typename A>
void run_forward(const Forward& call) {
  const std::vector<A> wide_bias = tiles::widened<A>(call.bias);
  const A* bias = call.bias ? wide_bias.data() : nullptr;
  const Pieces pieces(call.mask);
  const tiles::Source x = tiles::source(call.x);
  const tiles::Source residual = call.residual ? tiles::source(*call.residual) : tiles::Source{};
  const tiles::Target y = tiles::target(call.y);
  const int64_t width = call.x.width;
  torch::stable::parallel_for(
      0, call.x.count, std::max<int64_t>(1, kGrain / std::max<int64_t>(1, width)), [&](int64_t begin, int64_t end) {
        tiles::Buffer<A> x_buffer, residual_buffer, y_buffer;
        for (int64_t row = begin; row < end; ++row) {
          for (int64_t column = 0; column < width; column += kTile) {
            const int64_t count = std::min(kTile, width - column);
            const int64_t to = row * width + column;
            const A* values = tiles::read_biased(x, row * call.x.stride + column, count, bias, column, x_buffer);
            A* result = y.begin(to, y_buffer);
            pieces.apply(row, column, values, count, result);
            if (call.residual) {
              const A* added = residual.read(row * call.residual->stride + column, count, residual_buffer);
              tiles::accumulate(added, count, result);
            }
            y.end(to, count, result);
          }
        }
      });
}

template <typename A>
void run_backward(const Backward& call) {
  const Pieces pieces(call.mask);
  const tiles::Source grad_output = tiles::source(call.grad_output);
  const tiles::Target grad_input = tiles::target(call.grad_input);
  const int64_t width = call.grad_output.width;
  for_blocks_of_rows<A>(call.grad_output.count, width, call.bias ? &call.grad_bias : nullptr,
                        [&](int64_t begin, int64_t end, A* partial) {
                          tiles::Buffer<A> grad_buffer, result_buffer;
                          for (int64_t row = begin; row < end; ++row) {
                            for (int64_t column = 0; column < width; column += kTile) {
                              const int64_t count = std::min(kTile, width - column);
                              const int64_t to = row * width + column;
                              const A* grad =
                                  grad_output.read(row * call.grad_output.stride + column, count, grad_buffer);
                              A* result = grad_input.begin(to, result_buffer);
                              pieces.apply(row, column, grad, count, result);
                              if (partial != nullptr) {
                                tiles::accumulate(result, count, partial + column);
                              }
                              grad_input.end(to, count, result);
                            }
                          }
                        });
}

Tensor forward(const Tensor& x, const std::optional<Tensor>& bias, const std::optional<Tensor>& residual,
               const Tensor& key, const Tensor& step, const Tensor& rows, double drop) {
  const Forward call = prepare_forward(x, bias, residual, key, step, rows, drop);
  x.scalar_type() == ScalarType::Double ? run_forward<double>(call) : run_forward<float>(call);
  return call.y;
}

std::tuple<Tensor, Tensor> backward(const Tensor& grad_output, const Tensor& key, const Tensor& step,
                                    const Tensor& rows, double drop, bool bias) {
  const Backward call = prepare_backward(grad_output, key, step, rows, drop, bias);
  grad_output.scalar_type() == ScalarType::Double ? run_backward<double>(call) : run_backward<float>(call);
  return {call.grad_input, call.grad_bias};
}

}  // namespace
}  // namespace megallm::dropout

STABLE_TORCH_LIBRARY_FRAGMENT(megallm, library) {
  library.def(
      "dropout_add(Tensor x, Tensor? bias, Tensor? residual, Tensor key, Tensor step, Tensor rows, float drop) -> "
      "Tensor");
  library.def(
      "dropout_add_backward(Tensor grad_output, Tensor key, Tensor step, Tensor rows, float drop, bool bias) -> "
      "(Tensor "
      "grad_input, Tensor grad_bias)");
}

STABLE_TORCH_LIBRARY_IMPL(megallm, CPU, library) {
  library.impl("dropout_add", TORCH_BOX(&megallm::dropout::forward));
  library.impl("dropout_add_backward", TORCH_BOX(&megallm::dropout::backward));
}
