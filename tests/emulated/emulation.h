// What the CUDA kernels need to be compiled for the CPU: the threads of a block take turns on one thread of the CPU.
//
// Included before everything else in each rewritten kernel file.

#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>
#include <torch/csrc/stable/accelerator.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <functional>

// Blocks run one after another, so that one copy of their shared memory is enough.
#undef __shared__
#define __shared__ static
#undef __launch_bounds__
#define __launch_bounds__(...)
// Everything inlined everywhere would take the compiler many times as long.
#undef __forceinline__
#define __forceinline__ inline

namespace emulation {

extern uint3 thread_index, block_index;
extern dim3 block_size, grid_size;

// Each returns when all threads of the block, or of the warp, have called it.
void wait_for_block();
int count_over_block(bool vote);
uint64_t exchange_in_warp(uint64_t bits, int lane_mask);

// A launch, with the arguments that stand between <<< and >>>. It is over when `run` returns.
class Launch {
 public:
  Launch(dim3 grid, dim3 block, size_t /*shared_memory*/, cudaStream_t) : grid_(grid), block_(block) {}
  void run(const std::function<void()>& kernel) const;

 private:
  dim3 grid_, block_;
};

// Stands for the guard that makes a tensor's GPU the current one.
struct NoGuard {
  template <typename Device>
  explicit NoGuard(Device) {}
};

// So few that the loops over what is beyond one turn of all blocks are run with small tensors, too.
constexpr int kProcessors = 3;
constexpr int kBlocksPerProcessor = 2;

inline cudaError_t answer(int* result, int value) {
  *result = value;
  return cudaSuccess;
}

}  // namespace emulation

namespace torch::stable::accelerator {
using emulation::NoGuard;
}
#define DeviceGuard NoGuard

// Otherwise null where torch has no CUDA, and another thing where it has.
#define aoti_torch_get_current_cuda_stream emulation_stream

#define threadIdx emulation::thread_index
#define blockIdx emulation::block_index
#define blockDim emulation::block_size
#define gridDim emulation::grid_size

#define cudaGetDevice(device) emulation::answer(device, 0)
#define cudaDeviceGetAttribute(result, attribute, device) emulation::answer(result, emulation::kProcessors)
#define cudaOccupancyMaxActiveBlocksPerMultiprocessor(result, kernel, threads, memory) \
  emulation::answer(result, emulation::kBlocksPerProcessor)
#define cudaGetLastError() cudaSuccess
#define cudaGetErrorString(error) "an error of an emulated launch"

inline void __syncthreads() { emulation::wait_for_block(); }
inline int __syncthreads_count(int vote) { return emulation::count_over_block(vote != 0); }

template <typename Value>
Value __shfl_xor_sync(unsigned, Value value, int lane_mask) {
  static_assert(sizeof(Value) <= sizeof(uint64_t));
  uint64_t bits = 0;
  std::memcpy(&bits, &value, sizeof(Value));
  bits = emulation::exchange_in_warp(bits, lane_mask);
  std::memcpy(&value, &bits, sizeof(Value));
  return value;
}

inline void __trap() { std::abort(); }
inline float __expf(float x) { return std::exp(x); }
inline float __frcp_rn(float x) { return 1.0f / x; }
inline float rsqrt(float x) { return 1.0f / std::sqrt(x); }
inline double rsqrt(double x) { return 1.0 / std::sqrt(x); }
inline double normcdf(double x) { return 0.5 * std::erfc(-x * 0.70710678118654752440); }
inline float normcdff(float x) { return static_cast<float>(normcdf(static_cast<double>(x))); }

using std::exp;
using std::log;
using std::max;
using std::min;
using std::pow;
using std::sqrt;
