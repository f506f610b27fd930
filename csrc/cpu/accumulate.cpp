// target += scale * source on the CPU, where the source may have 16 bits.

#include "cpu/pieces.h"
#include "cpu/simd.h"
#include "include/flat.h"

namespace megallm::accumulate {
namespace {

using simd::widen;
using torch::headeronly::BFloat16;
using torch::headeronly::Half;

constexpr int64_t kGrain = 32768;

template <typename Target, typename Source>
MEGALLM_INLINE void add_elements(Target* __restrict__ target, const Source* __restrict__ source, Target scale,
                                 int64_t begin, int64_t end) {
  pieces::for_pieces(end - begin, [&](int64_t column, int64_t count) __attribute__((always_inline)) {
    stream::fetch_ahead(target + begin + column, count);
    stream::fetch_ahead(source + begin + column, count);
#pragma omp simd
    for (int64_t i = begin + column; i < begin + column + count; ++i) {
      target[i] += scale * widen(source[i]);
    }
  });
}

// Per-processor versions exist for plain functions only, not for templates.
#define MEGALLM_ADD_RANGE(Target, Source)                                                                         \
  MEGALLM_CLONES void add_range(Target* target, const Source* source, Target scale, int64_t begin, int64_t end) { \
    add_elements(target, source, scale, begin, end);                                                              \
  }

MEGALLM_ADD_RANGE(float, float)
MEGALLM_ADD_RANGE(double, double)
MEGALLM_ADD_RANGE(float, BFloat16)
MEGALLM_ADD_RANGE(float, Half)
#undef MEGALLM_ADD_RANGE

template <typename Source, typename Target = simd::Accumulation<Source>>
void run(const Tensor& target, const Tensor& source, double scale) {
  Target* to = static_cast<Target*>(target.mutable_data_ptr());
  const Source* from = static_cast<const Source*>(source.const_data_ptr());
  torch::stable::parallel_for(0, target.numel(), kGrain, [&](int64_t begin, int64_t end) {
    add_range(to, from, static_cast<Target>(scale), begin, end);
  });
}

void accumulate(const Tensor& target, const Tensor& source, double scale) {
  check_accumulation(target, source);
  simd::dispatch(source.scalar_type(), [&](auto scalar) { run<decltype(scalar)>(target, source, scale); });
}

}  // namespace
}  // namespace megallm::accumulate

STABLE_TORCH_LIBRARY_FRAGMENT(megallm, library) {
  library.def("accumulate_(Tensor(a!) target, Tensor source, float scale) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(megallm, CPU, library) {
  library.impl("accumulate_", TORCH_BOX(&megallm::accumulate::accumulate));
}
