// Loops that decide which tokens make a sample and which dataset a sample comes from.

#include <algorithm>
#include <cstdint>
#include <limits>
#include <stdexcept>
#include <string>
#include <vector>

#include "helpers.h"

namespace megallm::data {
namespace {

// Start of every sample as (position in the document index, token offset in that document). A sample is sequence_length
// tokens and the one that follows, which is the first of the next sample.
template <typename Index>
py::array sample_index(const Array<int32_t>& sequence_lengths, const Array<int32_t>& document_index,
                       int64_t sequence_length, int64_t num_samples) {
  Array<Index> result({num_samples + 1, int64_t{2}});
  const int32_t* lengths = sequence_lengths.data();
  const int32_t* documents = document_index.data();
  const int64_t num_sequences = sequence_lengths.size();
  const int64_t num_documents = document_index.size();
  Index* rows = result.mutable_data();
  {
    py::gil_scoped_release release;
    rows[0] = rows[1] = 0;
    int64_t position = 0;  // in the document index
    int64_t first = 0;     // number of the document's first token in the stream
    for (int64_t sample = 1; sample <= num_samples; ++sample) {
      const int64_t token = sample * sequence_length;
      for (;; ++position) {
        if (position == num_documents) {
          throw py::value_error("the documents hold " + std::to_string(first) + " tokens, too few for " +
                                std::to_string(num_samples) + " samples of " + std::to_string(sequence_length) +
                                " and 1 more");
        }
        const int32_t document = documents[position];
        if (document < 0 || document >= num_sequences) {
          throw py::value_error("document " + std::to_string(document) + " is not among " +
                                std::to_string(num_sequences) + " sequences");
        }
        if (token < first + lengths[document]) break;
        first += lengths[document];
      }
      rows[2 * sample] = static_cast<Index>(position);
      rows[2 * sample + 1] = static_cast<Index>(token - first);
    }
  }
  return result;
}

py::array build_sample_index(const Array<int32_t>& sequence_lengths, const Array<int32_t>& document_index,
                             int64_t sequence_length, int64_t num_samples, bool wide) {
  if (sequence_length < 1 || num_samples < 0)
    throw py::value_error("sequence_length must be positive and num_samples not negative");
  if (wide) return sample_index<int64_t>(sequence_lengths, document_index, sequence_length, num_samples);
  return sample_index<int32_t>(sequence_lengths, document_index, sequence_length, num_samples);
}

// At each step the dataset that lags most behind its share gives the next sample; the first one wins a tie. With
// `sizes`, a dataset drops out once it has given that many.
template <typename Dataset>
py::tuple blend(const std::vector<double>& weights, const std::vector<int64_t>& sizes, int64_t size) {
  Array<Dataset> dataset_index(size);
  Array<int64_t> dataset_sample_index(size);
  Dataset* datasets = dataset_index.mutable_data();
  int64_t* samples = dataset_sample_index.mutable_data();
  {
    py::gil_scoped_release release;
    const size_t num_datasets = weights.size();
    std::vector<int64_t> drawn(num_datasets, 0);
    for (int64_t step = 0; step < size; ++step) {
      const double position = std::max(static_cast<double>(step), 1.0);
      double largest = -std::numeric_limits<double>::infinity();
      size_t chosen = 0;
      for (size_t dataset = 0; dataset < num_datasets; ++dataset) {
        if (!sizes.empty() && drawn[dataset] == sizes[dataset]) continue;
        const double lag = weights[dataset] * position - static_cast<double>(drawn[dataset]);
        if (lag > largest) {
          largest = lag;
          chosen = dataset;
        }
      }
      datasets[step] = static_cast<Dataset>(chosen);
      samples[step] = drawn[chosen]++;
    }
  }
  return py::make_tuple(dataset_index, dataset_sample_index);
}

// Megatron's int16 where it holds the number of a dataset, int32 beyond.
py::tuple blend_of_any_width(const std::vector<double>& weights, const std::vector<int64_t>& sizes, int64_t size) {
  if (weights.size() <= static_cast<size_t>(std::numeric_limits<int16_t>::max()))
    return blend<int16_t>(weights, sizes, size);
  return blend<int32_t>(weights, sizes, size);
}

py::tuple build_blending_indices(const Array<double>& weights, int64_t size) {
  if (weights.size() < 1 || size < 0)
    throw py::value_error("a blend needs one dataset at least and a size that is not negative");
  return blend_of_any_width({weights.data(), weights.data() + weights.size()}, {}, size);
}

py::tuple build_exhaustive_blending_indices(const Array<int64_t>& sizes) {
  if (sizes.size() < 1) throw py::value_error("a blend needs one dataset at least");
  const std::vector<int64_t> counts(sizes.data(), sizes.data() + sizes.size());
  int64_t total = 0;
  for (const int64_t count : counts) {
    if (count < 0) throw py::value_error("the sizes of a blend must not be negative");
    total += count;
  }
  std::vector<double> weights;
  for (const int64_t count : counts)
    weights.push_back(static_cast<double>(count) / static_cast<double>(std::max<int64_t>(total, 1)));
  return blend_of_any_width(weights, counts, total);
}

}  // namespace

void add_indices(py::module_& module) {
  module.def("build_sample_index", &build_sample_index, py::arg("sequence_lengths").noconvert(),
             py::arg("document_index").noconvert(), py::arg("sequence_length"), py::arg("num_samples"),
             py::arg("wide"));
  module.def("build_blending_indices", &build_blending_indices, py::arg("weights").noconvert(), py::arg("size"));
  module.def("build_exhaustive_blending_indices", &build_exhaustive_blending_indices, py::arg("sizes").noconvert());
}

}  // namespace megallm::data
