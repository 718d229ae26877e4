// From codes to values: small codes count steps, larger codes are shortened bit patterns.
#pragma once

#include <limits>

#include "bits.hpp"
#include "job.hpp"
#include "rounding.hpp"

namespace fpformats {
namespace {

template <class Lane>
struct Decoder {
  using Unsigned = typename Bits<Lane>::Unsigned;
  Lane quantum;
  Unsigned magnitudes, linear, offset, infinite_code, first_nan, nan_with_sign;
  int cut, sign_shift;
  bool is_signed;

  explicit Decoder(const Plan& plan)
      : quantum(Lane(plan.quantum)),
        magnitudes((Unsigned(1) << plan.magnitude_bits) - 1),
        linear(Unsigned(plan.linear)),
        offset(Unsigned(plan.pattern_offset -
                        (int64_t(1023 - Bits<Lane>::bias) << plan.mantissa_bits))),
        // A number above all magnitudes stands for a special value that the format does not have.
        infinite_code(plan.infinite_code < 0 ? ~Unsigned(0) : Unsigned(plan.infinite_code)),
        first_nan(plan.first_nan < 0 ? ~Unsigned(0) : Unsigned(plan.first_nan)),
        nan_with_sign(plan.nan_is_negative_zero ? Unsigned(1) << plan.magnitude_bits
                                                : ~Unsigned(0)),
        cut(Bits<Lane>::width - plan.mantissa_bits),
        sign_shift(plan.magnitude_bits),
        is_signed(plan.is_signed) {}

  Lane value(uint32_t code) const {
    const Unsigned m = code & magnitudes;
    const Unsigned sign = is_signed ? Unsigned(code >> sign_shift & 1) : 0;
    const Lane counted = Lane(int32_t(m)) * quantum;
    const Lane cut_off = bit_cast<Lane>((m + offset) << cut);
    Lane y = m < linear ? counted : cut_off;
    y = m == infinite_code ? std::numeric_limits<Lane>::infinity() : y;
    const bool is_nan = m >= first_nan || (m | sign << sign_shift) == nan_with_sign;
    y = is_nan ? std::numeric_limits<Lane>::quiet_NaN() : y;
    return bit_cast<Lane>(bit_cast<Unsigned>(y) | sign * Bits<Lane>::sign);
  }
};

// Whether float32 holds all intermediate numbers and none is subnormal; subnormal ones are slow.
inline bool decodes_in_float(const Plan& plan) {
  return plan.is_narrow && plan.quantum >= 0x1p-126;
}

inline void decode_block(const Plan& plan, int64_t count, const uint32_t* codes, float* out) {
  if (decodes_in_float(plan)) {
    const Decoder<float> decoder(plan);
#pragma omp simd
    for (int64_t i = 0; i < count; ++i) out[i] = decoder.value(codes[i]);
  } else {
    const Decoder<double> decoder(plan);
#pragma omp simd
    for (int64_t i = 0; i < count; ++i) out[i] = float(decoder.value(codes[i]));
  }
}

inline void decode_block(const Plan& plan, int64_t count, const uint32_t* codes, double* out) {
  const Decoder<double> decoder(plan);
#pragma omp simd
  for (int64_t i = 0; i < count; ++i) out[i] = decoder.value(codes[i]);
}

}  // namespace
}  // namespace fpformats
