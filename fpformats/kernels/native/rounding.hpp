// Rounding the lanes of a block, to values or to codes.
//
// There are four ways. `Narrow` lets the hardware round float32, by adding a number whose last bit
// is the spacing of the format. `Drawn` does the same for StochasticA. `Pattern` rounds the bit
// pattern of a float32, for formats with the exponents of float32. `General` is for everything else
// and the slowest; it splits numbers in float64 as plan.py describes.
#pragma once

#include <algorithm>
#include <cmath>

#include "bits.hpp"
#include "job.hpp"

namespace fpformats {
namespace {

constexpr uint32_t not_a_number = 0xFFFFFFFFu;  // in place of a code; no number has this code

// Restores the sign and NaN after magnitudes have been rounded.
template <bool Signed>
struct Signs {
  float high, neutral;
  int shift;
  bool negative_zero;

  explicit Signs(const Plan& plan)
      : high(float(plan.high)),
        neutral(plan.negative_zero ? -0.0f : 0.0f),
        shift(plan.magnitude_bits),
        negative_zero(plan.negative_zero) {}

  // The magnitude, clipped to the range of the format; NaN stays.
  float magnitude(float x) const {
    const float a = Signed ? std::fabs(x) : (x < 0.0f ? 0.0f : x);
    return a > high ? high : a;
  }

  float value(float magnitude, float x) const {
    const uint32_t sign = Signed ? bit_cast<uint32_t>(x) & Bits<float>::sign : 0;
    const float y = bit_cast<float>(bit_cast<uint32_t>(magnitude) | sign) + neutral;
    return x != x ? x : y;
  }

  uint32_t code(uint32_t magnitude, float x) const {
    const uint32_t sign = Signed ? (bit_cast<uint32_t>(x) >> 31) << shift : 0;
    const uint32_t code = magnitude | (negative_zero || magnitude != 0 ? sign : 0);
    return x != x ? not_a_number : code;
  }
};

// The binade of a magnitude, and its number: the one whose last bit is the spacing of the format.
struct Binades {
  uint32_t floor, raise;
  int cut;

  explicit Binades(const Plan& plan)
      : floor(bit_cast<uint32_t>(float(plan.floor))),
        raise((uint32_t(23 - plan.digits) << 23) + 0x400000u),
        cut(23 - plan.digits) {}

  uint32_t of(float a) const {
    return std::max(bit_cast<uint32_t>(a) & Bits<float>::exponent, floor);
  }
  float number(uint32_t binade) const { return bit_cast<float>(binade + raise); }

  // The code of a magnitude. The last bits of its sum with the binade's number count the steps.
  uint32_t code(uint32_t binade, float sum) const {
    const uint32_t count = bit_cast<uint32_t>(sum) - (binade + raise);
    return ((binade - floor) >> cut) + count;
  }
};

// The default policy in float32. `Parity` is for formats without mantissa bits, where the parity of
// a code is not that of the count of steps.
template <bool Signed, bool Parity>
struct Narrow {
  Signs<Signed> signs;
  Binades binades;

  explicit Narrow(const Plan& plan) : signs(plan), binades(plan) {}

  float sum(float x, uint32_t& binade) const {
    float a = signs.magnitude(x);
    binade = binades.of(a);
    if (Parity) {
      // If the code is even but the count odd, a tie must round down, as the number below does.
      const uint32_t even = a <= signs.high ? (binade - binades.floor) >> 23 & 1 : 0;
      a = bit_cast<float>(bit_cast<uint32_t>(a) - even);
    }
    return a + binades.number(binade);
  }

  float value(float x) const {
    uint32_t binade;
    const float rounded = sum(x, binade);
    return signs.value(rounded - binades.number(binade), x);
  }

  uint32_t code(float x) const {
    uint32_t binade;
    const float rounded = sum(x, binade);
    return signs.code(binades.code(binade, rounded), x);
  }

  // The value, whose zero may have any sign; anything for NaN.
  float number(float x) const {
    uint32_t binade;
    const float rounded = sum(x, binade) - binades.number(binade);
    const uint32_t sign = Signed ? bit_cast<uint32_t>(x) & Bits<float>::sign : 0;
    return bit_cast<float>(bit_cast<uint32_t>(rounded) | sign);
  }
};

// StochasticA for a format that `Narrow` takes, with words of up to 32 bits.
template <bool Signed>
struct Drawn {
  Signs<Signed> signs;
  Binades binades;
  uint32_t below, above, kept;
  int bits;

  Drawn(const Plan& plan, int random_bits)
      : signs(plan),
        binades(plan),
        below(uint32_t(plan.digits) << 23),
        above(uint32_t(254 + plan.digits) << 23),
        kept(~uint32_t(0) << (32 - random_bits)),
        bits(random_bits) {}

  // The neighbour nearer zero. `up` is 1 if the number rounds to the other neighbour: if the first
  // bits of the rest, in steps, carry when the word is added.
  float split(float x, uint32_t word, uint32_t& binade, uint32_t& up) const {
    const float magnitude = signs.magnitude(x), a = x != x ? 0.0f : magnitude;
    binade = binades.of(a);
    const float number = binades.number(binade), nearest = (a + number) - number;
    const float low = nearest > a ? nearest - step(binade) : nearest;
    const float rest = (a - low) * bit_cast<float>(above - binade) * 0x1p31f;
    const uint32_t first_bits = (uint32_t(int32_t(rest)) << 1 | bit_below(rest)) & kept;
    up = first_bits + (word << (32 - bits)) < first_bits ? 1u : 0u;
    return low;
  }

  float step(uint32_t binade) const { return bit_cast<float>(binade - below); }

  // The 32nd bit of the rest. Conversion is to signed integers, so 31 bits are before the point.
  static uint32_t bit_below(float rest) {
    return rest - float(int32_t(rest)) >= 0.5f ? 1 : 0;
  }

  float value(float x, uint32_t word) const {
    uint32_t binade, up;
    const float low = split(x, word, binade, up);
    return signs.value(up ? low + step(binade) : low, x);
  }

  uint32_t code(float x, uint32_t word) const {
    uint32_t binade, up;
    const float low = split(x, word, binade, up);
    return signs.code(binades.code(binade, low + binades.number(binade)) + up, x);
  }
};

// A format whose binades are those of float32, subnormal numbers included.
template <bool Signed>
struct Pattern {
  Signs<Signed> signs;
  uint32_t half, lowest;
  int cut;

  static bool fits(const Plan& plan) {
    return plan.floor == 0x1p-126 && plan.digits == plan.mantissa_bits && plan.smallest == 0;
  }

  explicit Pattern(const Plan& plan)
      : signs(plan),
        half(plan.digits < 23 ? (1u << (22 - plan.digits)) - 1 : 0),
        lowest(plan.digits < 23),
        cut(23 - plan.digits) {}

  uint32_t steps(float x) const {
    const uint32_t u = bit_cast<uint32_t>(signs.magnitude(x)) & ~Bits<float>::sign;
    return (u + half + (u >> cut & lowest)) >> cut;
  }

  float value(float x) const { return signs.value(bit_cast<float>(steps(x) << cut), x); }
  uint32_t code(float x) const { return signs.code(steps(x), x); }
};

// Any format and any policy. Numbers are computed in float64, and codes are 64 bits wide.
template <Mode mode>
struct General {
  static constexpr bool is_stochastic = mode >= Mode::stochastic_a;
  double high, smallest, inverse_leading, excess, neutral, edges[edge_count];
  uint64_t floor, top;
  int64_t code_base, below_smallest, max_code, edge_codes[edge_count];
  // For negative numbers: the last code of a magnitude in the range, and the last one without sign.
  int64_t last_above_low, last_without_sign;
  int digits, bits, sign_shift;

  General(const Plan& plan, int random_bits)
      : high(plan.high),
        smallest(plan.smallest),
        inverse_leading(plan.smallest ? std::ldexp(1.0, -std::ilogb(plan.smallest)) : 1.0),
        excess(plan.smallest ? plan.smallest * inverse_leading - 1.0 : 0.0),
        neutral(plan.negative_zero ? -0.0 : 0.0),
        floor(bit_cast<uint64_t>(plan.floor)),
        top(uint64_t(2046) << 52),
        code_base(plan.code_base),
        below_smallest(plan.zero ? 0 : -1),
        max_code(plan.max_code),
        last_above_low(plan.is_signed ? plan.max_code : below_smallest),
        last_without_sign(!plan.is_signed                          ? plan.max_code + 1
                          : plan.negative_zero || !plan.zero ? -2
                                                             : 0),
        digits(plan.digits),
        bits(random_bits),
        sign_shift(plan.magnitude_bits) {
    std::copy_n(plan.edges, +edge_count, edges);
    std::copy_n(plan.edge_codes, +edge_count, edge_codes);
  }

  // The number if `by` is 0, the next larger one if `by` is 1. The compiler vectorizes this, but
  // not a test of parity.
  static double raised(double number, int64_t by) {
    return bit_cast<double>(bit_cast<int64_t>(number) + by);
  }

  // The gap is a power of two times (1 + extra); `part` is the rest in units of that power.
  bool goes_up(double rest, double gap, double part, double extra, int64_t code, bool negative,
               uint64_t word) const {
    switch (mode) {
      case Mode::nearest_ties_to_even:
        return rest + rest >= raised(gap, ~code & 1);
      case Mode::nearest_ties_to_away:
        return rest + rest >= gap;
      case Mode::toward_zero:
        return false;
      case Mode::toward_positive:
        return (rest > 0) & !negative;
      case Mode::toward_negative:
        return (rest > 0) & negative;
      case Mode::to_odd:
        return rest > bit_cast<double>(-(code & 1) & int64_t(Bits<double>::exponent));
      default:
        return draws_up(part, extra, word);
    }
  }

  // As _draws_up in policy.py, which derives it from P3109's definitions.
  bool draws_up(double part, double extra, uint64_t word) const {
    // Converted to float64: from 2**52 on, the low bits of a float64 are an integer.
    const uint64_t pattern = bit_cast<uint64_t>(0x1p52) + ((uint64_t(1) << bits) - word);
    const double wanted = bit_cast<double>(pattern) - 0x1p52;
    const double twice = 2 * wanted - (mode == Mode::stochastic_a ? 0.0 : 1.0);
    const double left = part * double(int64_t(1) << (bits + 1)) - twice, right = twice * extra;
    return left >= (mode == Mode::stochastic_c ? raised(right, int64_t(word & 1)) : right);
  }

  double value(double x, uint64_t word) const { return round<double>(x, word); }
  uint32_t code(double x, uint64_t word) const { return uint32_t(round<int64_t>(x, word)); }

 private:
  // Rounds to a value (Out is double) or to a code; the other one is not computed.
  template <class Out>
  Out round(double x, uint64_t word) const {
    const bool negative = bit_cast<int64_t>(x) < 0;
    const double a = std::fabs(x), clipped = a < high ? a : high;
    const uint64_t e = std::max(bit_cast<uint64_t>(clipped) & Bits<double>::exponent, floor);
    const uint64_t step_bits = e - (uint64_t(digits) << 52);
    const double step = bit_cast<double>(step_bits), inverse = bit_cast<double>(top - step_bits);
    // The integer part of a number below 2**51, as float64 and as integer, without conversions.
    const double steps = clipped * inverse, sum = steps + 0x1p52;
    const double excess_count = sum - 0x1p52 > steps ? 1.0 : 0.0;
    const double count = sum - 0x1p52 - excess_count;
    const uint64_t counted = bit_cast<uint64_t>(count + 0x1p52) & 0xFFFFFFFFFFFFF;
    const int64_t linear_code = int64_t(((e - floor) >> (52 - digits)) + counted) + code_base;
    const bool is_below = a < smallest;  // never, in formats with subnormal numbers
    const double low = is_below ? 0.0 : count * step, gap = is_below ? smallest : step;
    const double unit = is_below ? inverse_leading : inverse, extra = is_below ? excess : 0.0;
    const int64_t code = is_below ? below_smallest : linear_code;
    const double rest = a - low;
    const bool up = goes_up(rest, gap, rest * unit, extra, code, negative, word) | (rest >= gap);
    const int64_t rounded_code = code + (up ? 1 : 0);
    const double rounded = up ? low + gap : low;
    const bool over = rounded_code > max_code, is_nothing = rounded_code < 0;
    const bool under = negative & (rounded_code > last_above_low);
    const bool flips = negative & (rounded_code > last_without_sign);
    const auto pick = [&](Out y, const Out* edge, auto flip) {
      y = over ? edge[above] : is_nothing ? edge[zero_result] : y;
      y = flips ? flip(y) : y;
      y = under ? edge[below] : y;
      const Out infinite = negative ? edge[negative_infinity] : edge[infinity];
      return a == HUGE_VAL ? infinite : y;
    };
    if constexpr (std::is_same_v<Out, double>) {
      const double y = pick(rounded, edges, [](double number) { return -number; });
      return x != x ? x : y + neutral;
    } else {
      const int64_t sign = int64_t(1) << sign_shift;
      const int64_t y = pick(rounded_code, edge_codes, [=](int64_t bits) { return bits | sign; });
      return x != x ? nan_edge : y;
    }
  }
};

}  // namespace
}  // namespace fpformats
