#include <pybind11/stl.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstdint>
#include <cstring>
#include <limits>
#include <numeric>
#include <string>
#include <utility>
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
struct NoSample {
  int64_t index;
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
  const int64_t* indices;
  const int64_t* places;
  int64_t num_samples;
  int64_t height;
  int64_t width;
  int64_t padding;
  int64_t* text;
};

// Of all tokens that were read; and how many were missing at the ends of samples.
struct Found {
  int64_t lowest = std::numeric_limits<int64_t>::max();
  int64_t highest = std::numeric_limits<int64_t>::min();
  int64_t missing = 0;
};

// Tokens [count] from byte `offset` of the file, widened.
template <typename Token>
void read_tokens(int descriptor, int64_t offset, int64_t count, int64_t* text, Found& found, Token* block) {
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
  found.lowest = std::min(found.lowest, static_cast<int64_t>(lowest));
  found.highest = std::max(found.highest, static_cast<int64_t>(highest));
}

// Tokens [width] of the stream from token `offset` of the document at `position` on; returns how many there are.
template <typename Token>
int64_t read_sample(const Stream& stream, int64_t position, int64_t offset, int64_t width, int64_t* text, Found& found,
                    Token* block) {
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
    read_tokens<Token>(stream.descriptor, start, count, text + filled, found, block);
    filled += count;
  }
  return filled;
}

// See SampleReader in megallm/data/samples/fetch.py. Holds its arrays; each is looked at once, when this is made.
class SampleReader {
 public:
  SampleReader(int descriptor, const py::dtype& dtype, Array<int32_t> sequence_lengths, Array<int64_t> sequence_offsets,
               Array<int32_t> document_index, py::array sample_index, py::array shuffle_index,
               std::vector<std::pair<int, int64_t>> files)
      : kind_(dtype.kind()),
        itemsize_(dtype.itemsize()),
        lengths_(std::move(sequence_lengths)),
        offsets_(std::move(sequence_offsets)),
        documents_(std::move(document_index)),
        starts_(std::move(sample_index)),
        order_(std::move(shuffle_index)),
        files_(std::move(files)) {
    if (lengths_.size() != offsets_.size())
      throw py::value_error("there must be one length and one offset for each sequence");
    wide_starts_ = py::isinstance<Array<int64_t>>(starts_);
    if (starts_.ndim() != 2 || starts_.shape(1) != 2 || !(wide_starts_ || py::isinstance<Array<int32_t>>(starts_)))
      throw py::value_error("sample_index must be [samples, 2], contiguous, int32 or int64");
    wide_order_ = py::isinstance<Array<int64_t>>(order_);
    if (order_.ndim() != 1 || !(wide_order_ || py::isinstance<Array<uint32_t>>(order_)))
      throw py::value_error("shuffle_index must be [samples], contiguous, uint32 or int64");
    stream_ = {lengths_.data(), offsets_.data(), lengths_.size(), documents_.data(), documents_.size(), descriptor};
  }

  py::tuple fetch(const Array<int64_t>& indices, const Array<int64_t>& places, Array<int64_t>& text,
                  int64_t padding) const {
    if (text.ndim() != 2 || indices.size() != places.size())
      throw py::value_error("text must be [rows, width], and there must be one row for each sample");
    const Rows rows{indices.data(), places.data(), indices.size(),     text.shape(0),
                    text.shape(1),  padding,       text.mutable_data()};
    Found found;
    try {
      py::gil_scoped_release release;
      require_whole_files();
      found = wide_starts_ ? read_any_dtype(static_cast<const int64_t*>(starts_.data()), rows)
                           : read_any_dtype(static_cast<const int32_t*>(starts_.data()), rows);
    } catch (const EndOfFile&) {
      PyErr_SetString(PyExc_EOFError, "a file ends before a sample does");
      throw py::error_already_set();
    } catch (const ReadFailed& failure) {
      errno = failure.code;
      PyErr_SetFromErrno(PyExc_OSError);
      throw py::error_already_set();
    } catch (const WrongIndex& wrong) {
      throw py::value_error(wrong.what);
    } catch (const NoSample& wrong) {
      throw py::index_error("there are samples 0 to " + std::to_string(order_.size() - 1) + ", not " +
                            std::to_string(wrong.index));
    }
    return py::make_tuple(found.lowest, found.highest, found.missing);
  }

 private:
  void require_whole_files() const {
    for (const auto& [descriptor, size] : files_) {
      struct stat status;
      if (fstat(descriptor, &status) != 0) throw ReadFailed{errno};
      if (status.st_size < size) throw EndOfFile{};
    }
  }

  int64_t sample_at(int64_t index) const {
    if (index < 0 || index >= order_.size()) throw NoSample{index};
    return wide_order_ ? load(static_cast<const int64_t*>(order_.data()), index)
                       : load(static_cast<const uint32_t*>(order_.data()), index);
  }

  template <typename Token, typename Index>
  Found read_samples(const Index* starts, const Rows& rows) const {
    Found found;
    std::vector<Token> block(std::min(kBlockBytes / static_cast<int64_t>(sizeof(Token)), rows.width));
    for (int64_t number = 0; number < rows.num_samples; ++number) {
      const int64_t sample = sample_at(rows.indices[number]);
      const int64_t row = rows.places[number];
      if (row < 0 || row >= rows.height)
        throw WrongIndex{"row " + std::to_string(row) + " is not among " + std::to_string(rows.height)};
      if (sample < 0 || sample >= starts_.shape(0))
        throw WrongIndex{"sample " + std::to_string(sample) + " is not among " + std::to_string(starts_.shape(0))};
      int64_t* text = rows.text + row * rows.width;
      const int64_t filled = read_sample<Token>(stream_, load(starts, 2 * sample), load(starts, 2 * sample + 1),
                                                rows.width, text, found, block.data());
      std::fill(text + filled, text + rows.width, rows.padding);
      found.missing += rows.width - filled;
    }
    return found;
  }

  template <typename Index>
  Found read_any_dtype(const Index* starts, const Rows& rows) const {
    const auto read = [&](auto token) { return read_samples<decltype(token), Index>(starts, rows); };
    if (kind_ == 'u' && itemsize_ == 1) return read(uint8_t{});
    if (kind_ == 'u' && itemsize_ == 2) return read(uint16_t{});
    if (kind_ == 'i' && itemsize_ == 1) return read(int8_t{});
    if (kind_ == 'i' && itemsize_ == 2) return read(int16_t{});
    if (kind_ == 'i' && itemsize_ == 4) return read(int32_t{});
    if (kind_ == 'i' && itemsize_ == 8) return read(int64_t{});
    throw WrongIndex{"tokens must be integers of 1, 2, 4 or 8 bytes"};
  }

  char kind_;
  int64_t itemsize_;
  Array<int32_t> lengths_;
  Array<int64_t> offsets_;
  Array<int32_t> documents_;
  py::array starts_;
  py::array order_;
  std::vector<std::pair<int, int64_t>> files_;
  bool wide_starts_;
  bool wide_order_;
  Stream stream_;
};

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
  py::class_<SampleReader>(module, "SampleReader")
      .def(py::init<int, const py::dtype&, Array<int32_t>, Array<int64_t>, Array<int32_t>, py::array, py::array,
                    std::vector<std::pair<int, int64_t>>>(),
           py::arg("descriptor"), py::arg("dtype"), py::arg("sequence_lengths").noconvert(),
           py::arg("sequence_offsets").noconvert(), py::arg("document_index").noconvert(),
           py::arg("sample_index").noconvert(), py::arg("shuffle_index").noconvert(), py::arg("files"))
      .def("fetch", &SampleReader::fetch, py::arg("indices").noconvert(), py::arg("places").noconvert(),
           py::arg("text").noconvert(), py::arg("padding"));
  module.def("mark_documents", &mark_documents, py::arg("text").noconvert(), py::arg("end"),
             py::arg("loss_mask").noconvert(), py::arg("position_ids").noconvert(),
             py::arg("document_ids").noconvert());
}

}  // namespace megallm::data
