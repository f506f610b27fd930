// numpy's RandomState.shuffle: the same draws and the same order, with the memory accesses prefetched.

#include <algorithm>
#include <cstdint>
#include <string>

#include "helpers.h"

namespace megallm::data {
namespace {

constexpr int kStateSize = 624;

// The 32-bit Mersenne Twister (Matsumoto and Nishimura 1998), whose state is the caller's: `key`, and `position`, the
// number of its words already used.
class MersenneTwister {
 public:
  MersenneTwister(uint32_t* key, int position) : key_(key), position_(position) { temper(); }

  int position() const { return position_; }
  int available() const { return kStateSize - position_; }
  uint32_t next() { return tempered_[position_++]; }

  void advance() {
    constexpr int kShift = 397;
    for (int i = 0; i < kStateSize - kShift; ++i) key_[i] = twist(key_[i], key_[i + 1], key_[i + kShift]);
    for (int i = kStateSize - kShift; i < kStateSize - 1; ++i)
      key_[i] = twist(key_[i], key_[i + 1], key_[i + kShift - kStateSize]);
    key_[kStateSize - 1] = twist(key_[kStateSize - 1], key_[0], key_[kShift - 1]);
    position_ = 0;
    temper();
  }

 private:
  static uint32_t twist(uint32_t high, uint32_t low, uint32_t other) {
    const uint32_t mixed = (high & 0x80000000u) | (low & 0x7fffffffu);
    return other ^ (mixed >> 1) ^ ((0u - (mixed & 1u)) & 0x9908b0dfu);
  }

  void temper() {
    for (int i = 0; i < kStateSize; ++i) {
      uint32_t y = key_[i];
      y ^= y >> 11;
      y ^= (y << 7) & 0x9d2c5680u;
      y ^= (y << 15) & 0xefc60000u;
      tempered_[i] = y ^ (y >> 18);
    }
  }

  uint32_t* key_;
  int position_;
  uint32_t tempered_[kStateSize];
};

// Fisher-Yates from the last element down. The partner of element i is a draw in 0 to i: the lowest bits that can hold
// i, drawn again while they are above it. Partners are drawn a block ahead, so that they are in the cache when swapped.
template <typename Item>
void shuffle_items(Item* items, int64_t size, MersenneTwister& generator) {
  constexpr int64_t kBlock = 256;
  uint32_t partners[kBlock];
  int64_t last = size - 1;
  while (last >= 1) {
    uint32_t mask = static_cast<uint32_t>(last);
    for (int shift = 1; shift < 32; shift *= 2) mask |= mask >> shift;
    // All elements of a block have this mask: it is that of every i above half of it.
    const int64_t wanted = std::min<int64_t>(kBlock, last - mask / 2);
    int64_t found = 0;
    while (found < wanted) {
      if (generator.available() == 0) generator.advance();
      const int64_t draws = std::min<int64_t>(generator.available(), wanted - found);
      for (int64_t draw = 0; draw < draws; ++draw) {
        const uint32_t value = generator.next() & mask;
        partners[found] = value;
        __builtin_prefetch(items + value, 1);
        found += static_cast<int64_t>(value) <= last - found;
      }
    }
    for (int64_t i = 0; i < wanted; ++i) std::swap(items[last - i], items[partners[i]]);
    last -= wanted;
  }
}

int shuffle(py::array array, Array<uint32_t> key, int position) {
  if (array.ndim() != 1 || !(array.flags() & py::array::c_style)) throw py::value_error("the array must be contiguous");
  if (array.size() > int64_t{1} << 32) throw py::value_error("the array is too long for draws of 32 bits");
  if (array.itemsize() != 4 && array.itemsize() != 8) throw py::value_error("the items must have 4 or 8 bytes");
  if (key.size() != kStateSize || position < 0 || position > kStateSize)
    throw py::value_error("this is no state of a Mersenne Twister");
  void* items = array.mutable_data();
  MersenneTwister generator(key.mutable_data(), position);
  const int64_t size = array.size();
  const bool narrow = array.itemsize() == 4;
  {
    py::gil_scoped_release release;
    if (narrow)
      shuffle_items(static_cast<uint32_t*>(items), size, generator);
    else
      shuffle_items(static_cast<uint64_t*>(items), size, generator);
  }
  return generator.position();
}

}  // namespace

void add_shuffle(py::module_& module) {
  module.def("shuffle", &shuffle, py::arg("array").noconvert(), py::arg("key").noconvert(), py::arg("position"));
}

}  // namespace megallm::data
