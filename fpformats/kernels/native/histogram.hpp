// Integer moments of float32 numbers by the top bits of their patterns, for Histogram in Python.
#pragma once

#include <cstdint>
#include <vector>

namespace fpformats {

struct Moments {
  int64_t count, low, square;
};

struct Histogram {
  std::vector<uint32_t> bins;    // the nonempty ones in ascending order
  std::vector<Moments> moments;  // of the low bits of the patterns in each bin
};

// The histogram of `count` numbers, by their patterns without the low `low_bits` bits.
Histogram histogram(const float* numbers, int64_t count, int low_bits);

}  // namespace fpformats
