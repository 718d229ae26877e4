#include "histogram.hpp"

#include <algorithm>

#include "bits.hpp"

namespace fpformats {

Histogram histogram(const float* numbers, int64_t count, int low_bits) {
  // All possible bins, and a bit for each bin in use. Each thread keeps both and leaves them empty.
  static thread_local std::vector<Moments> all;
  static thread_local std::vector<uint64_t> used;
  all.resize(std::max<size_t>(all.size(), size_t(1) << (32 - low_bits)));
  used.resize(all.size() / 64 + 1);
  const uint32_t mask = (1u << low_bits) - 1;
  Histogram result;
  for (int64_t i = 0; i < count; ++i) {
    const uint32_t pattern = bit_cast<uint32_t>(numbers[i]), bin = pattern >> low_bits;
    const int64_t low = pattern & mask;
    Moments& moments = all[bin];
    used[bin / 64] |= uint64_t(1) << (bin % 64);
    moments.count += 1, moments.low += low, moments.square += low * low;
  }
  for (size_t word = 0; word < used.size(); ++word) {
    for (uint32_t bit = 0; used[word]; ++bit, used[word] >>= 1) {
      if (!(used[word] & 1)) continue;
      const uint32_t bin = uint32_t(word) * 64 + bit;
      result.bins.push_back(bin);
      result.moments.push_back(all[bin]);
      all[bin] = {};
    }
  }
  return result;
}

}  // namespace fpformats
