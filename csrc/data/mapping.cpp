// Which sentences make a sample of a masked language model, in Megatron's order.

#include <algorithm>
#include <cstdint>
#include <random>
#include <string>
#include <utility>
#include <vector>

#include "helpers.h"

namespace megallm::data {
namespace {

// Documents with a longer sentence are left out.
constexpr int32_t kLongestSentence = 512;

struct Documents {
  const int32_t* lengths;                           // tokens of every sentence
  std::vector<std::pair<int64_t, int64_t>> usable;  // first sentence of a document, and the one behind its last
};

struct Targets {
  int64_t max_length;
  int64_t short_ratio;  // one sample in so many is shorter; 0 for none

  int64_t draw(std::mt19937& generator) const {
    if (short_ratio == 0) return max_length;
    const int64_t number = static_cast<int64_t>(generator());
    return number % short_ratio ? max_length : 2 + number % (max_length - 1);
  }
};

// A document of one sentence is kept however long it is: its sample is cut.
std::vector<std::pair<int64_t, int64_t>> usable_documents(const Array<int64_t>& bounds, const Array<int32_t>& lengths,
                                                          int64_t min_sentences) {
  std::vector<std::pair<int64_t, int64_t>> usable;
  for (int64_t document = 0; document + 1 < bounds.size(); ++document) {
    const int64_t first = bounds.data()[document];
    const int64_t last = bounds.data()[document + 1];
    if (first < 0 || last < first || last > lengths.size()) {
      throw py::value_error("document " + std::to_string(document) + " has sentences " + std::to_string(first) +
                            " to " + std::to_string(last) + ", which are not among " + std::to_string(lengths.size()));
    }
    if (last - first < std::max<int64_t>(min_sentences, 1)) continue;
    const auto is_long = [](int32_t length) { return length > kLongestSentence; };
    if (last - first > 1 && std::any_of(lengths.data() + first, lengths.data() + last, is_long)) continue;
    usable.emplace_back(first, last);
  }
  return usable;
}

// Gives every sample to `take(first sentence, the one behind its last, target length)`, epoch after epoch until there
// are `num_samples`; an epoch is always finished. Every call with the same arguments gives the same samples.
template <typename Take>
int64_t walk(const Documents& documents, const Targets& targets, int64_t min_sentences, int64_t num_samples,
             uint32_t seed, Take take) {
  std::mt19937 generator(seed);
  int64_t count = 0;
  while (count < num_samples && !documents.usable.empty()) {
    for (const auto& [first, last] : documents.usable) {
      int64_t start = first;
      int64_t tokens = 0;
      int64_t target = targets.draw(generator);
      for (int64_t sentence = first; sentence < last; ++sentence) {
        tokens += documents.lengths[sentence];
        const int64_t left = last - sentence - 1;
        // A single sentence is never left over: it would be no pair.
        if (left != 0 && (tokens < target || left == 1 || sentence + 1 - start < min_sentences)) continue;
        take(start, sentence + 1, target);
        ++count;
        start = sentence + 1;
        tokens = 0;
        // Drawn behind the last sample of a document too, where nothing needs it: the order of draws is Megatron's.
        target = targets.draw(generator);
      }
    }
  }
  return count;
}

template <typename Row>
py::array mapping(const Documents& documents, const Targets& targets, int64_t min_sentences, int64_t num_samples,
                  uint32_t seed) {
  int64_t count = 0;
  {
    py::gil_scoped_release release;
    // Counted first, so that the rows are never held twice.
    count = walk(documents, targets, min_sentences, num_samples, seed, [](int64_t, int64_t, int64_t) {});
  }
  Array<Row> result({count, int64_t{3}});
  Row* rows = result.mutable_data();
  {
    py::gil_scoped_release release;
    Row* row = rows;
    walk(documents, targets, min_sentences, num_samples, seed, [&row](int64_t first, int64_t last, int64_t target) {
      *row++ = static_cast<Row>(first);
      *row++ = static_cast<Row>(last);
      *row++ = static_cast<Row>(target);
    });
    std::mt19937_64 generator(uint64_t{seed} + 1);
    for (int64_t i = count - 1; i > 0; --i) {
      const int64_t j = static_cast<int64_t>(generator() % static_cast<uint64_t>(i + 1));
      std::swap_ranges(rows + 3 * i, rows + 3 * i + 3, rows + 3 * j);
    }
  }
  return result;
}

py::array build_sentence_mapping(const Array<int64_t>& document_bounds, const Array<int32_t>& sentence_lengths,
                                 int64_t num_samples, int64_t max_length, int64_t short_ratio, uint32_t seed,
                                 int64_t min_sentences, bool wide) {
  if (max_length < 2 || short_ratio < 0)
    throw py::value_error("max_length must be 2 at least and short_ratio not negative");
  Documents documents{sentence_lengths.data(), {}};
  {
    py::gil_scoped_release release;
    documents.usable = usable_documents(document_bounds, sentence_lengths, min_sentences);
  }
  const Targets targets{max_length, short_ratio};
  if (wide) return mapping<int64_t>(documents, targets, min_sentences, num_samples, seed);
  return mapping<uint32_t>(documents, targets, min_sentences, num_samples, seed);
}

}  // namespace

void add_mapping(py::module_& module) {
  module.def("build_sentence_mapping", &build_sentence_mapping, py::arg("document_bounds").noconvert(),
             py::arg("sentence_lengths").noconvert(), py::arg("num_samples"), py::arg("max_length"),
             py::arg("short_ratio"), py::arg("seed"), py::arg("min_sentences"), py::arg("wide"));
}

}  // namespace megallm::data
