// What the CUDA operators share: types, vector accesses, sums over threads, streams and launch checks.

#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/macros.h>

#include <cstdint>
#include <cstring>

#include "include/rows.h"

// Lives in libtorch_cuda. A weak reference lets one binary load on a torch without CUDA, where it stays null and is
// never called.
extern "C" __attribute__((weak)) AOTITorchError aoti_torch_get_current_cuda_stream(int32_t device_index, void** stream);

namespace megallm::cuda {

inline cudaStream_t current_stream(const Tensor& tensor) {
  STD_TORCH_CHECK(aoti_torch_get_current_cuda_stream != nullptr, "this torch has no CUDA");
  void* stream = nullptr;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(tensor.get_device_index(), &stream));
  return static_cast<cudaStream_t>(stream);
}

inline void check(cudaError_t error, const char* what) {
  STD_TORCH_CHECK(error == cudaSuccess, what, ": ", cudaGetErrorString(error));
}

__device__ __forceinline__ float widen(float value) { return value; }
__device__ __forceinline__ double widen(double value) { return value; }
__device__ __forceinline__ float widen(__nv_bfloat16 value) { return __bfloat162float(value); }
__device__ __forceinline__ float widen(__half value) { return __half2float(value); }

__device__ __forceinline__ void narrow(float value, float& result) { result = value; }
__device__ __forceinline__ void narrow(double value, double& result) { result = value; }
__device__ __forceinline__ void narrow(float value, __nv_bfloat16& result) { result = __float2bfloat16_rn(value); }
__device__ __forceinline__ void narrow(float value, __half& result) { result = __float2half_rn(value); }

// What sums of a type are carried in.
template <typename Scalar>
struct AccumulatorOf {
  using type = float;
};
template <>
struct AccumulatorOf<double> {
  using type = double;
};

// Elements of an access of 16 bytes. float64 is for checks: it has narrow accesses only.
template <typename Scalar>
constexpr int kVector = sizeof(Scalar) == 8 ? 1 : 16 / sizeof(Scalar);

// 2^x, good to two units in the last place, in one instruction: __expf adds three for what is below 2^-126, which is 0
// here.
__device__ __forceinline__ float fast_power_of_two(float x) {
  float result;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(result) : "f"(x));
  return result;
}

// 16-bit values are so coarse that the fast exponential adds nothing to their error; their rate needs it.
template <typename Scalar>
__device__ __forceinline__ float exponential(float x) {
  if constexpr (sizeof(Scalar) == 2) {
    return fast_power_of_two(x * 1.4426950408889634f);
  } else {
    return expf(x);
  }
}
template <typename Scalar>
__device__ __forceinline__ double exponential(double x) {
  return exp(x);
}

// 1 / x for x from 1 on, good to a unit in the last place, in one instruction: rounded, it takes ten and a branch. What
// is below 2^-126 is 0.
__device__ __forceinline__ float fast_reciprocal(float x) {
  float result;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(result) : "f"(x));
  return result;
}

__device__ __forceinline__ float minus_infinity(float) { return -INFINITY; }
__device__ __forceinline__ double minus_infinity(double) { return -static_cast<double>(INFINITY); }

// Calls `run` with a value of the element type.
template <typename Run>
void dispatch(const Tensor& tensor, const Run& run) {
  switch (tensor.scalar_type()) {
    case ScalarType::Float:
      return run(float());
    case ScalarType::Double:
      return run(double());
    case ScalarType::BFloat16:
      return run(__nv_bfloat16());
    default:
      return run(__half());
  }
}

// Loaded and stored as a whole, in accesses of up to 16 bytes.
template <typename Scalar, int kCount>
struct alignas(sizeof(Scalar) * kCount < 16 ? sizeof(Scalar) * kCount : 16) Vector {
  Scalar values[kCount];
};

template <int kCount, typename Scalar>
__device__ __forceinline__ Vector<Scalar, kCount> load(const Scalar* pointer) {
  return *reinterpret_cast<const Vector<Scalar, kCount>*>(pointer);
}

__device__ __forceinline__ void store_words(uint4* pointer, const uint4& words) {
  asm volatile("st.global.v4.b32 [%0], {%1, %2, %3, %4};"
               :
               : "l"(__cvta_generic_to_global(pointer)), "r"(words.x), "r"(words.y), "r"(words.z), "r"(words.w)
               : "memory");
}

template <int kCount, typename Scalar>
__device__ __forceinline__ void store(Scalar* pointer, const Vector<Scalar, kCount>& vector) {
  if constexpr (sizeof(vector) % sizeof(uint4) == 0) {
    // In so many words: in some loops the compiler takes a whole apart and stores its elements one by one.
    constexpr int kWords = sizeof(vector) / sizeof(uint4);
    uint4 words[kWords];
    memcpy(words, &vector, sizeof(vector));
#pragma unroll
    for (int word = 0; word < kWords; ++word) {
      store_words(reinterpret_cast<uint4*>(pointer) + word, words[word]);
    }
  } else {
    *reinterpret_cast<Vector<Scalar, kCount>*>(pointer) = vector;
  }
}

// Makes the compiler convert 16-bit vectors again after a sum over the threads. It would rather keep the widened values
// across it, in twice the registers.
template <typename Scalar, int kSize, int kCount>
__device__ __forceinline__ void forget_conversions(Vector<Scalar, kSize> (&vectors)[kCount]) {
  if constexpr (sizeof(Scalar) == 2 && kSize % 2 == 0) {
#pragma unroll
    for (int k = 0; k < kCount; ++k) {
      uint32_t* words = reinterpret_cast<uint32_t*>(vectors[k].values);
#pragma unroll
      for (int word = 0; word < kSize / 2; ++word) {
        asm volatile("" : "+r"(words[word]));
      }
    }
  }
}

// Whether every row can be accessed 16 bytes at a time.
inline bool aligned(const void* data, int64_t stride, int64_t rows, int64_t element_size) {
  return reinterpret_cast<uintptr_t>(data) % 16 == 0 && (rows <= 1 || stride * element_size % 16 == 0);
}

constexpr int kWarp = 32;

// Every lane gets the same bits: the exchange is symmetric.
template <typename Accumulator>
__device__ __forceinline__ Accumulator sum_over_warp(Accumulator value) {
#pragma unroll
  for (int distance = kWarp / 2; distance > 0; distance /= 2) {
    value += __shfl_xor_sync(0xffffffffu, value, distance);
  }
  return value;
}

// A comparison with a NaN is false: it is not the largest of anything.
template <typename Accumulator>
__device__ __forceinline__ Accumulator largest_over_warp(Accumulator value) {
#pragma unroll
  for (int distance = kWarp / 2; distance > 0; distance /= 2) {
    const Accumulator other = __shfl_xor_sync(0xffffffffu, value, distance);
    value = other > value ? other : value;
  }
  return value;
}

// Sum over all threads of a block, in an order fixed by the block's size. `scratch` holds one value per warp; two
// consecutive calls must not be given the same memory, since a slow thread may still be reading it.
template <typename Accumulator>
__device__ __forceinline__ Accumulator sum_over_block(Accumulator value, Accumulator* scratch) {
  value = sum_over_warp(value);
  if (threadIdx.x % kWarp == 0) {
    scratch[threadIdx.x / kWarp] = value;
  }
  __syncthreads();
  Accumulator total = scratch[0];
  for (int warp = 1; warp < static_cast<int>(blockDim.x) / kWarp; ++warp) {
    total += scratch[warp];
  }
  return total;
}

// The largest over all threads of a block; `scratch` as for the sum.
template <typename Accumulator>
__device__ __forceinline__ Accumulator largest_over_block(Accumulator value, Accumulator* scratch) {
  value = largest_over_warp(value);
  if (threadIdx.x % kWarp == 0) {
    scratch[threadIdx.x / kWarp] = value;
  }
  __syncthreads();
  Accumulator largest = scratch[0];
  for (int warp = 1; warp < static_cast<int>(blockDim.x) / kWarp; ++warp) {
    largest = scratch[warp] > largest ? scratch[warp] : largest;
  }
  return largest;
}

}  // namespace megallm::cuda
