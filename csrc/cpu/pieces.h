// Rows piece by piece: read ahead of, computed in the accumulation type, and written past the caches where that pays.

#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <type_traits>

#include "cpu/simd.h"
#include "cpu/stream.h"
#include "cpu/tiles.h"

namespace megallm::pieces {

using simd::Accumulation;

// Elements that are read, computed and written before the next ones: so few that the processor fetches those meanwhile.
constexpr int64_t kPiece = 128;

template <typename Scalar>
using Piece = tiles::Buffer<Scalar, kPiece>;

template <typename Scalar>
MEGALLM_INLINE const Scalar* padded(const Scalar* data, int64_t count, Piece<Scalar>& buffer) {
  if (count == kPiece) {
    return data;
  }
  std::memset(static_cast<void*>(buffer.values), 0, sizeof(buffer));
  std::memcpy(static_cast<void*>(buffer.values), data, count * sizeof(Scalar));
  return buffer;
}

// `count` elements and zeros behind them: in place if they have the accumulation type, otherwise widened. Loops over a
// piece so all have as many iterations, and the compiler needs no code for a rest; what comes of zeros is not written.
template <typename Scalar>
MEGALLM_INLINE const Accumulation<Scalar>* read(const Scalar* data, int64_t count,
                                                Piece<Accumulation<Scalar>>& buffer) {
  stream::fetch_ahead(data, kPiece);
  if constexpr (std::is_same_v<Scalar, Accumulation<Scalar>>) {
    return padded(data, count, buffer);
  } else {
    Piece<Scalar> rest;
    tiles::widen_all(padded(data, count, rest), kPiece, buffer.values);
    return buffer;
  }
}

// With a bias, which may be null, and has a piece more behind it.
template <typename Scalar>
MEGALLM_INLINE const Accumulation<Scalar>* read_biased(const Scalar* data, int64_t count,
                                                       const Accumulation<Scalar>* bias,
                                                       Piece<Accumulation<Scalar>>& buffer) {
  const Accumulation<Scalar>* values = read(data, count, buffer);
  if (bias == nullptr) {
    return values;
  }
#pragma omp simd
  for (int64_t i = 0; i < kPiece; ++i) {
    buffer[i] = values[i] + bias[i];
  }
  return buffer;
}

// A tensor's memory. Whoever writes to one that is streamed ends with `stream::finish`.
template <typename Scalar>
struct Target {
  Scalar* data;
  bool streamed;

  // Where to compute `count` elements from `offset` on, before `write`: in place if that holds a whole piece.
  MEGALLM_INLINE Accumulation<Scalar>* place(int64_t offset, int64_t count, Piece<Accumulation<Scalar>>& buffer) const {
    if constexpr (std::is_same_v<Scalar, Accumulation<Scalar>>) {
      return count == kPiece && !streamed ? data + offset : buffer.values;
    } else {
      return buffer;
    }
  }

  MEGALLM_INLINE void write(int64_t offset, int64_t count, const Accumulation<Scalar>* values) const {
    if constexpr (std::is_same_v<Scalar, Accumulation<Scalar>>) {
      if (count < kPiece || streamed) {
        copy(offset, count, values);
      }
    } else if (count == kPiece && !streamed) {
      tiles::narrow_all(values, kPiece, data + offset);
    } else {
      Piece<Scalar> narrowed;
      tiles::narrow_all(values, kPiece, narrowed.values);
      copy(offset, count, narrowed.values);
    }
  }

  MEGALLM_INLINE void copy(int64_t offset, int64_t count, const Scalar* values) const {
    const int64_t bytes = count * static_cast<int64_t>(sizeof(Scalar));
    if (streamed) {
      stream::write(data + offset, values, bytes);
    } else {
      std::memcpy(static_cast<void*>(data + offset), values, bytes);
    }
  }
};

// Calls run(column, elements) for each piece of a row, with a constant number where the piece is whole.
template <typename Run>
MEGALLM_INLINE void for_pieces(int64_t width, const Run& run) {
  int64_t column = 0;
  for (; column + kPiece <= width; column += kPiece) {
    run(column, kPiece);
  }
  if (column < width) {
    run(column, width - column);
  }
}

// Writes value(0), ..., value(width - 1) as a row from `offset` on, and before each piece of it calls ahead(column,
// elements), which asks for what is read afterwards. All that is passed must be marked always_inline.
template <typename Scalar, typename Value, typename Ahead>
MEGALLM_INLINE void write_row(const Target<Scalar>& target, int64_t offset, int64_t width, const Value& value,
                              const Ahead& ahead) {
  Piece<Scalar> piece;
  for_pieces(width, [&](int64_t column, int64_t count) __attribute__((always_inline)) {
    ahead(column, count);
    Scalar* __restrict__ result = target.streamed ? piece.values : target.data + offset + column;
#pragma omp simd
    for (int64_t i = 0; i < count; ++i) {
      simd::narrow(value(column + i), result[i]);
    }
    if (target.streamed) {
      target.copy(offset + column, count, piece.values);
    }
  });
}

// In rows of `width` elements, of which a piece never holds parts of two.
template <typename Scalar>
Target<Scalar> target(const Tensor& tensor, int64_t width) {
  return {static_cast<Scalar*>(tensor.mutable_data_ptr()), stream::pays(tensor, width)};
}

}  // namespace megallm::pieces
