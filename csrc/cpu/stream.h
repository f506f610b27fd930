// Reading ahead of, and writing past the caches. Operators that do little else than move memory wait for it: a
// processor foresees the reads of a few sequences only, and an ordinary store into memory that no cache holds first
// reads its line, and writes it back later.

#pragma once

#include <cstdint>

#include "cpu/simd.h"
#include "include/rows.h"

#if defined(__SSE2__)
#include <immintrin.h>
#else
#include <cstring>
#endif

namespace megallm::stream {

constexpr int64_t kLine = 64;
// How far ahead memory is asked for, in bytes.
constexpr int64_t kAhead = 4096;
// Results of fewer bytes are still in the second-level cache, or a part of them is, when they are read next.
constexpr int64_t kLarge = int64_t{4} << 20;

// Asks for `count` elements that are read soon. Where no memory is, nothing happens.
template <typename Scalar>
MEGALLM_INLINE void fetch(const Scalar* data, int64_t count) {
#if defined(__GNUC__)
  const char* from = reinterpret_cast<const char*>(data);
  for (int64_t byte = 0; byte < count * static_cast<int64_t>(sizeof(Scalar)); byte += kLine) {
    __builtin_prefetch(from + byte);
  }
#endif
}

// Asks for what lies `kAhead` bytes behind `count` elements that are read now.
template <typename Scalar>
MEGALLM_INLINE void fetch_ahead(const Scalar* data, int64_t count) {
  fetch(data + kAhead / static_cast<int64_t>(sizeof(Scalar)), count);
}

// Whether to write a result past the caches: a large one, of whole cache lines, as its rows of `width` elements are.
inline bool pays(const Tensor& result, int64_t width) {
#if defined(__SSE2__)
  const int64_t size = static_cast<int64_t>(result.element_size());
  return result.numel() * size >= kLarge && width * size % kLine == 0 &&
         reinterpret_cast<uintptr_t>(result.const_data_ptr()) % kLine == 0;
#else
  static_cast<void>(result);
  static_cast<void>(width);
  return false;
#endif
}

// Copies whole cache lines, from memory that begins at a multiple of 64 bytes: with AVX-512 a line at once, which GCC
// does not make of a loop, otherwise 16 bytes.
#if defined(__x86_64__) && defined(__linux__) && defined(__GNUC__) && !defined(__clang__)
[[maybe_unused]] __attribute__((target("avx512f"))) static void write(void* result, const void* values, int64_t bytes) {
  for (int64_t i = 0; i < bytes; i += kLine) {
    _mm512_stream_si512(reinterpret_cast<__m512i*>(static_cast<char*>(result) + i),
                        _mm512_load_si512(static_cast<const char*>(values) + i));
  }
}
__attribute__((target("default")))
#endif
[[maybe_unused]] static void write(void* result, const void* values, int64_t bytes) {
#if defined(__SSE2__)
  auto* to = static_cast<__m128i*>(result);
  const auto* from = static_cast<const __m128i*>(values);
  for (int64_t i = 0; i < bytes / static_cast<int64_t>(sizeof(__m128i)); ++i) {
    _mm_stream_si128(to + i, _mm_load_si128(from + i));
  }
#else
  std::memcpy(result, values, bytes);
#endif
}

// Other threads see such stores in any order: to be called before a thread says that it is done.
inline void finish() {
#if defined(__SSE2__)
  _mm_sfence();
#endif
}

}  // namespace megallm::stream
