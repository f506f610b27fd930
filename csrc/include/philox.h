// The counter-based generator Philox 4x32-10 (Salmon et al., SC 2011), as megallm/random.py uses it: counter words
// column / 4, row (64 bits), step; the four results belong to columns 4 k to 4 k + 3.

#pragma once

#include <cstdint>

// For functions that both compilers see and that must be inlined: into the CPU's vector loops, or into a kernel.
#if defined(__CUDACC__)
#define MEGALLM_INLINE_EVERYWHERE __host__ __device__ __forceinline__
#else
#define MEGALLM_INLINE_EVERYWHERE __attribute__((always_inline)) inline
#endif

namespace megallm::philox {

struct Key {
  uint32_t words[2];
  uint32_t step;
};

MEGALLM_INLINE_EVERYWHERE void generate(const Key& key, uint64_t row, uint32_t block, uint32_t& w0, uint32_t& w1,
                                        uint32_t& w2, uint32_t& w3) {
  w0 = block;
  w1 = static_cast<uint32_t>(row);
  w2 = static_cast<uint32_t>(row >> 32);
  w3 = key.step;
  uint32_t k0 = key.words[0];
  uint32_t k1 = key.words[1];
#if defined(__CUDACC__)
#pragma unroll
#endif
  for (int round = 0; round < 10; ++round) {
    const uint64_t product0 = static_cast<uint64_t>(w0) * 0xD2511F53u;
    const uint64_t product1 = static_cast<uint64_t>(w2) * 0xCD9E8D57u;
    w0 = static_cast<uint32_t>(product1 >> 32) ^ w1 ^ k0;
    w1 = static_cast<uint32_t>(product1);
    w2 = static_cast<uint32_t>(product0 >> 32) ^ w3 ^ k1;
    w3 = static_cast<uint32_t>(product0);
    k0 += 0x9E3779B9u;
    k1 += 0xBB67AE85u;
  }
}

// A word at least this large keeps its element.
inline uint32_t threshold(double drop) { return static_cast<uint32_t>(drop * 4294967296.0); }

}  // namespace megallm::philox
