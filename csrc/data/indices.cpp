// Loops that decide which tokens make a sample and which dataset a sample comes from.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
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
    int64_t first = 0;   // number of the document's first token in the stream
    int64_t sample = 1;  // whose start is looked for
    int64_t token = sequence_length;
    for (int64_t position = 0; position < num_documents && sample <= num_samples; ++position) {
      const int32_t document = documents[position];
      if (document < 0 || document >= num_sequences) {
        throw py::value_error("document " + std::to_string(document) + " is not among " +
                              std::to_string(num_sequences) + " sequences");
      }
      const int64_t next = first + lengths[document];
      for (; token < next && sample <= num_samples; ++sample, token += sequence_length) {
        rows[2 * sample] = static_cast<Index>(position);
        rows[2 * sample + 1] = static_cast<Index>(token - first);
      }
      first = next;
    }
    if (sample <= num_samples) {
      throw py::value_error("the documents hold " + std::to_string(first) + " tokens, too few for " +
                            std::to_string(num_samples) + " samples of " + std::to_string(sequence_length) +
                            " and 1 more");
    }
  }
  return result;
}

py::array build_sample_index(const Array<int32_t>& sequence_lengths, const Array<int32_t>& document_index,
                             int64_t sequence_length, int64_t num_samples, bool wide) {
  if (sequence_length < 1 || num_samples < 0)
    throw py::value_error("sequence_length must be positive and num_samples not negative");
  if (wide) return sample_index<int64_t>(sequence_lengths, document_index, sequence_length, num_samples);
  if (document_index.size() > std::numeric_limits<int32_t>::max())
    throw py::value_error("a document index of " + std::to_string(document_index.size()) + " entries needs wide");
  return sample_index<int32_t>(sequence_lengths, document_index, sequence_length, num_samples);
}

constexpr int64_t kNever = std::numeric_limits<int64_t>::max();
constexpr int32_t kNobody = std::numeric_limits<int32_t>::max();
// Counts as drawn so often that its lag is below any other's.
constexpr double kSpent = 4611686018427387904.0;       // 2^62
constexpr double kFractionsLost = 4503599627370496.0;  // 2^52

// Finds the dataset that lags most behind its share, without looking at all of them at every step.
//
// A dataset's lag is weight * position - drawn, in doubles, and the first of equal ones wins. The datasets play a
// knockout tournament. A lag changes only by its dataset being drawn, after which the matches on its way to the top are
// played again, and by the position, in which lags are straight lines: so a match's result holds up to a position that
// can be told when it is played (a kinetic tournament). Rounding is allowed for by a margin that is larger than all
// errors of the lags and of the computation of that position. Within the margin a match is played at every step, so
// the result is always that of comparing the rounded lags, as a loop over all datasets would.
//
// Neighbours in the tournament have like weights: their lags run side by side, and their matches hold for long.
class Tournament {
 public:
  // A dataset of size 0 takes no part; without `sizes` there is none.
  Tournament(const std::vector<double>& weights, const std::vector<int64_t>& sizes) {
    while (num_leaves_ < weights.size()) num_leaves_ *= 2;
    entrants_.resize(num_leaves_, {0.0, kSpent, kNobody});
    for (size_t dataset = 0; dataset < weights.size(); ++dataset) {
      const bool is_empty = !sizes.empty() && sizes[dataset] == 0;
      entrants_[dataset] = {weights[dataset], is_empty ? kSpent : 0.0, static_cast<int32_t>(dataset)};
    }
    std::stable_sort(entrants_.begin(), entrants_.begin() + weights.size(),
                     [](const Entrant& a, const Entrant& b) { return a.weight > b.weight; });
    nodes_.resize(2 * num_leaves_);
    for (size_t leaf = 0; leaf < num_leaves_; ++leaf) nodes_[num_leaves_ + leaf] = {kNever, static_cast<int32_t>(leaf)};
    for (size_t node = num_leaves_ - 1; node >= 1; --node) play(node, 1);
  }

  // The dataset with the largest lag at the position that `take` was last given, or 1.
  int32_t winner() const { return entrants_[nodes_[1].winner].dataset; }

  // Draws from the winner, and goes on to a position not before the last one. A dataset that is spent never wins again.
  void take(bool is_spent, int64_t position) {
    const int32_t winner = nodes_[1].winner;
    if (is_spent) {
      entrants_[winner].weight = 0.0;
      entrants_[winner].drawn = kSpent;
    } else {
      entrants_[winner].drawn += 1.0;
    }
    for (size_t node = num_leaves_ + winner; node > 1; node /= 2) {
      refresh(node ^ 1, position);
      play(node / 2, position);
    }
  }

 private:
  struct Entrant {
    double weight, drawn;
    int32_t dataset;
  };
  struct Node {
    int64_t holds_until;  // first position at which the winner may be another
    int32_t winner;       // an entrant
  };

  void refresh(size_t node, int64_t position) {
    if (nodes_[node].holds_until > position) return;
    refresh(2 * node, position);
    refresh(2 * node + 1, position);
    play(node, position);
  }

  void play(size_t node, int64_t position) {
    const Node& left = nodes_[2 * node];
    const Node& right = nodes_[2 * node + 1];
    const Entrant& l = entrants_[left.winner];
    const Entrant& r = entrants_[right.winner];
    const double lag_l = l.weight * static_cast<double>(position) - l.drawn;
    const double lag_r = r.weight * static_cast<double>(position) - r.drawn;
    const bool right_wins = lag_r > lag_l || (lag_r == lag_l && r.dataset < l.dataset);
    const int64_t holds = right_wins ? holds_until(r, l, position) : holds_until(l, r, position);
    nodes_[node] = {std::min({left.holds_until, right.holds_until, holds}), right_wins ? right.winner : left.winner};
  }

  // A rounded lag is off by at most 2^-53 (2 weight * p + drawn). Where the true difference of two lags is larger than
  // both errors together, the rounded ones compare alike. With a margin eight times as large, which takes in the errors
  // made here, that is slope * p > offset.
  static int64_t holds_until(const Entrant& winner, const Entrant& loser, int64_t position) {
    constexpr double kMargin = 1.0 / (int64_t{1} << 50);
    if (winner.weight == loser.weight) {
      // The same product on both sides: the position does not matter before it is so large that fractions are lost.
      if (winner.drawn == loser.drawn) return kNever;
      return next_match(kFractionsLost / winner.weight, position);
    }
    const double slope = (winner.weight - loser.weight) - 2 * kMargin * (winner.weight + loser.weight);
    const double offset = (winner.drawn - loser.drawn) + kMargin * (winner.drawn + loser.drawn);
    if (!(slope * static_cast<double>(position) > offset)) return position + 1;
    if (slope >= 0) return kNever;
    return next_match(offset / slope, position);
  }

  // The position at which a match is played next, when its result holds below `limit`.
  static int64_t next_match(double limit, int64_t position) {
    return limit >= kSpent ? kNever : std::max(position + 1, static_cast<int64_t>(limit));
  }

  size_t num_leaves_ = 2;
  std::vector<Entrant> entrants_;  // the heaviest first
  std::vector<Node> nodes_;        // 1 is the root, the children of n are 2n and 2n + 1
};

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
    Tournament tournament(weights, sizes);
    std::vector<int64_t> drawn(weights.size(), 0);
    for (int64_t step = 0; step < size; ++step) {
      const int32_t chosen = tournament.winner();
      datasets[step] = static_cast<Dataset>(chosen);
      samples[step] = drawn[chosen]++;
      tournament.take(!sizes.empty() && drawn[chosen] == sizes[chosen], step + 1);
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
  for (int64_t dataset = 0; dataset < weights.size(); ++dataset) {
    if (!std::isfinite(weights.data()[dataset]) || weights.data()[dataset] < 0)
      throw py::value_error("the weights of a blend must be finite and not negative");
  }
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
