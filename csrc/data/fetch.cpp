#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstdint>
#include <cstring>
#include <limits>
#include <numeric>
#include <string>
#include <vector>

#include "helpers.h"

namespace megallm::data {

namespace {

constexpr int64_t kBlockBytes = 1 << 16;

struct EndOfFile {};
struct ReadFailed {
  int code;
};
struct WrongIndex {
  std::string what;
};

// The arrays of an index file lie behind a header of 34 bytes, so that their elements may be unaligned.
template <typename T>
T load(const T* values, int64_t index) {
  T value;
  std::memcpy(&value, reinterpret_cast<const char*>(values) + index * static_cast<int64_t>(sizeof(T)), sizeof(T));
  return value;
}

// What a sample is cut from: sequences of a file of tokens, in an order in which one may occur many times.
struct Stream {
  const int32_t* lengths;
  const int64_t* offsets;
  int64_t num_sequences;
  const int32_t* documents;
  int64_t num_documents;
  int descriptor;
};

// Samples, and the rows of a matrix [height, width] that they fill.
struct Rows {
  const int64_t* samples;
  const int64_t* places;
  int64_t num_samples;
  int64_t height;
  int64_t width;
  int64_t* text;
};

struct Extremes {
  int64_t lowest = std::numeric_limits<int64_t>::max();
  int64_t highest = std::numeric_limits<int64_t>::min();
};

// Tokens [count] from byte `offset` of the file, widened.
template <typename Token>
void read_tokens(int descriptor, int64_t offset, int64_t count, int64_t* text, Extremes& extremes, Token* block) {
  constexpr int64_t kBlock = kBlockBytes / static_cast<int64_t>(sizeof(Token));
  Token lowest = std::numeric_limits<Token>::max();
  Token highest = std::numeric_limits<Token>::min();
  while (count > 0) {
    const int64_t wanted = std::min(count, kBlock);
    const int64_t bytes = wanted * static_cast<int64_t>(sizeof(Token));
    for (int64_t done = 0; done < bytes;) {
      const ssize_t got = pread(descriptor, reinterpret_cast<char*>(block) + done, bytes - done, offset + done);
      if (got == 0) throw EndOfFile{};
      if (got < 0 && errno != EINTR) throw ReadFailed{errno};
      if (got > 0) done += got;
    }
    for (int64_t token = 0; token < wanted; ++token) {
      lowest = std::min(lowest, block[token]);
      highest = std::max(highest, block[token]);
      text[token] = static_cast<int64_t>(block[token]);
    }
    text += wanted;
    offset += bytes;
    count -= wanted;
  }
  extremes.lowest = std::min(extremes.lowest, static_cast<int64_t>(lowest));
  extremes.highest = std::max(extremes.highest, static_cast<int64_t>(highest));
}

// Tokens [width] of the stream from token `offset` of the document at `position` on; returns how many there are.
template <typename Token>
int64_t read_sample(const Stream& stream, int64_t position, int64_t offset, int64_t width, int64_t* text,
                    Extremes& extremes, Token* block) {
  int64_t filled = 0;
  if (position < 0 || offset < 0) throw WrongIndex{"a sample starts at a negative place"};
  for (; filled < width && position < stream.num_documents; ++position, offset = 0) {
    const int64_t document = load(stream.documents, position);
    if (document < 0 || document >= stream.num_sequences)
      throw WrongIndex{"document " + std::to_string(document) + " is not among " +
                       std::to_string(stream.num_sequences) + " sequences"};
    const int64_t length = load(stream.lengths, document);
    if (offset > length)
      throw WrongIndex{"token " + std::to_string(offset) + " is not within document " + std::to_string(document) +
                       " of " + std::to_string(length) + " tokens"};
    const int64_t count = std::min(length - offset, width - filled);
    if (count == 0) continue;
    const int64_t start = load(stream.offsets, document) + offset * static_cast<int64_t>(sizeof(Token));
    read_tokens<Token>(stream.descriptor, start, count, text + filled, extremes, block);
    filled += count;
  }
  return filled;
}

template <typename Token, typename Index>
Extremes read_samples(const Stream& stream, const Index* starts, int64_t num_starts, const Rows& rows,
                      int64_t* filled) {
  Extremes extremes;
  std::vector<Token> block(std::min(kBlockBytes / static_cast<int64_t>(sizeof(Token)), rows.width));
  for (int64_t number = 0; number < rows.num_samples; ++number) {
    const int64_t sample = rows.samples[number];
    const int64_t row = rows.places[number];
    if (row < 0 || row >= rows.height)
      throw WrongIndex{"row " + std::to_string(row) + " is not among " + std::to_string(rows.height)};
    if (sample < 0 || sample >= num_starts)
      throw WrongIndex{"sample " + std::to_string(sample) + " is not among " + std::to_string(num_starts)};
    const int64_t position = load(starts, 2 * sample);
    const int64_t offset = load(starts, 2 * sample + 1);
    filled[number] =
        read_sample<Token>(stream, position, offset, rows.width, rows.text + row * rows.width, extremes, block.data());
  }
  return extremes;
}

template <typename Index>
Extremes read_any_dtype(char kind, int64_t itemsize, const Stream& stream, const Index* starts, int64_t num_starts,
                        const Rows& rows, int64_t* filled) {
  const auto read = [&](auto token) {
    return read_samples<decltype(token), Index>(stream, starts, num_starts, rows, filled);
  };
  if (kind == 'u' && itemsize == 1) return read(uint8_t{});
  if (kind == 'u' && itemsize == 2) return read(uint16_t{});
  if (kind == 'i' && itemsize == 1) return read(int8_t{});
  if (kind == 'i' && itemsize == 2) return read(int16_t{});
  if (kind == 'i' && itemsize == 4) return read(int32_t{});
  if (kind == 'i' && itemsize == 8) return read(int64_t{});
  throw WrongIndex{"tokens must be integers of 1, 2, 4 or 8 bytes"};
}

py::tuple fetch_samples(int descriptor, const py::dtype& dtype, const Array<int32_t>& sequence_lengths,
                        const Array<int64_t>& sequence_offsets, const Array<int32_t>& document_index,
                        const py::array& sample_index, const Array<int64_t>& samples, const Array<int64_t>& places,
                        Array<int64_t>& text) {
  if (sequence_lengths.size() != sequence_offsets.size())
    throw py::value_error("there must be one length and one offset for each sequence");
  if (text.ndim() != 2 || samples.size() != places.size())
    throw py::value_error("text must be [rows, width], and there must be one row for each sample");
  const bool wide = py::isinstance<Array<int64_t>>(sample_index);
  if (sample_index.ndim() != 2 || sample_index.shape(1) != 2 || !(wide || py::isinstance<Array<int32_t>>(sample_index)))
    throw py::value_error("sample_index must be [samples, 2], contiguous, int32 or int64");
  const Stream stream{sequence_lengths.data(), sequence_offsets.data(), sequence_lengths.size(),
                      document_index.data(),   document_index.size(),   descriptor};
  const Rows rows{samples.data(), places.data(), samples.size(), text.shape(0), text.shape(1), text.mutable_data()};
  const char kind = dtype.kind();
  const int64_t itemsize = dtype.itemsize();
  const void* starts = sample_index.data();
  const int64_t num_starts = sample_index.shape(0);
  Array<int64_t> filled(samples.size());
  int64_t* counts = filled.mutable_data();
  Extremes extremes;
  try {
    py::gil_scoped_release release;
    extremes =
        wide ? read_any_dtype(kind, itemsize, stream, static_cast<const int64_t*>(starts), num_starts, rows, counts)
             : read_any_dtype(kind, itemsize, stream, static_cast<const int32_t*>(starts), num_starts, rows, counts);
  } catch (const EndOfFile&) {
    PyErr_SetString(PyExc_EOFError, "the file ends before a sample does");
    throw py::error_already_set();
  } catch (const ReadFailed& failure) {
    errno = failure.code;
    PyErr_SetFromErrno(PyExc_OSError);
    throw py::error_already_set();
  } catch (const WrongIndex& wrong) {
    throw py::value_error(wrong.what);
  }
  return py::make_tuple(filled, extremes.lowest, extremes.highest);
}

// Documents of each row of text [n, width], of which all but the last token are inputs: where they end, and what
// follows from that for each input. What is not asked for is empty.
void mark_documents(const Array<int64_t>& text, int64_t end, Array<float>& loss_mask, Array<int64_t>& position_ids,
                    Array<int64_t>& document_ids) {
  if (text.ndim() != 2 || text.shape(1) < 1) throw py::value_error("text must be [n, width]");
  const int64_t n = text.shape(0);
  const int64_t width = text.shape(1);
  const int64_t length = width - 1;
  for (const ssize_t size : {loss_mask.size(), position_ids.size(), document_ids.size()})
    if (size != 0 && size != n * length) throw py::value_error("what is marked must be [n, width - 1], or empty");
  const int64_t* tokens = text.data();
  float* losses = loss_mask.size() ? loss_mask.mutable_data() : nullptr;
  int64_t* positions = position_ids.size() ? position_ids.mutable_data() : nullptr;
  int64_t* documents = document_ids.size() ? document_ids.mutable_data() : nullptr;
  py::gil_scoped_release release;
  for (int64_t row = 0; row < n; ++row, tokens += width) {
    int64_t document = 0;
    for (int64_t first = 0, behind = 0; first < length; first = behind, ++document) {
      const int64_t* found = std::find(tokens + first, tokens + length, end);
      behind = std::min(found - tokens + 1, length);
      if (losses && found < tokens + length) losses[row * length + behind - 1] = 0.0F;
      if (positions) std::iota(positions + row * length + first, positions + row * length + behind, int64_t{0});
      if (documents) std::fill(documents + row * length + first, documents + row * length + behind, document);
    }
  }
}

}  // namespace

void add_fetch(py::module_& module) {
  module.def("fetch_samples", &fetch_samples, py::arg("descriptor"), py::arg("dtype"),
             py::arg("sequence_lengths").noconvert(), py::arg("sequence_offsets").noconvert(),
             py::arg("document_index").noconvert(), py::arg("sample_index").noconvert(), py::arg("samples").noconvert(),
             py::arg("places").noconvert(), py::arg("text").noconvert());
  module.def("mark_documents", &mark_documents, py::arg("text").noconvert(), py::arg("end"),
             py::arg("loss_mask").noconvert(), py::arg("position_ids").noconvert(),
             py::arg("document_ids").noconvert());
}

}  // namespace megallm::data
