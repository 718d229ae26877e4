// Bit patterns of numbers, and the fields of float32 and float64.
#pragma once

#include <cstdint>
#include <cstring>

namespace fpformats {

template <class To, class From>
inline To bit_cast(From from) {
  static_assert(sizeof(To) == sizeof(From), "a pattern has the width of its number");
  To to;
  std::memcpy(&to, &from, sizeof(To));
  return to;
}

template <class Lane>
struct Bits;

template <>
struct Bits<float> {
  using Unsigned = uint32_t;
  static constexpr int width = 23, bias = 127;
  static constexpr uint32_t sign = 0x80000000u, exponent = 0x7F800000u;
};

template <>
struct Bits<double> {
  using Unsigned = uint64_t;
  static constexpr int width = 52, bias = 1023;
  static constexpr uint64_t sign = 0x8000000000000000u, exponent = 0x7FF0000000000000u;
};

}  // namespace fpformats
