#include "histogram.hpp"

#include <algorithm>

#include "bits.hpp"

namespace fpformats {

Histogram histogram(const float* numbers, int64_t count, int low_bits) {
  // Room for every bin there can be, kept by each thread and left empty again.
  static thread_local std::vector<Moments> all;
  all.resize(std::max<size_t>(all.size(), size_t(1) << (32 - low_bits)));
  const uint32_t mask = (1u << low_bits) - 1;
  Histogram result;
  for (int64_t i = 0; i < count; ++i) {
    const uint32_t pattern = bit_cast<uint32_t>(numbers[i]), bin = pattern >> low_bits;
    const int64_t low = pattern & mask;
    Moments& moments = all[bin];
    if (moments.count == 0) result.bins.push_back(bin);
    moments.count += 1, moments.low += low, moments.square += low * low;
  }
  std::sort(result.bins.begin(), result.bins.end());
  result.moments.reserve(result.bins.size());
  for (const uint32_t bin : result.bins) {
    result.moments.push_back(all[bin]);
    all[bin] = {};
  }
  return result;
}

}  // namespace fpformats
