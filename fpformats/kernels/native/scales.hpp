// The scales and zero points of a block, spread so that each lane has its own.
#pragma once

#include <algorithm>
#include <cstring>
#include <type_traits>

#include "bits.hpp"
#include "job.hpp"

namespace fpformats {
namespace {

// Division by one scale, with the bits of the division and in less time: the quotient by the rounded
// reciprocal is corrected twice by its exact remainder (Markstein, 1990). For a narrow format and the
// default policy, which gives numbers beyond twice the range the result of that bound.
class Quotient {
 public:
  Quotient(const Job& job, float scale)
      : scale_(scale), reciprocal_(1 / scale), bound_(2 * float(job.plan->high) * scale) {
    const auto is_moderate = [](double x) { return x >= 0x1p-60 && x <= 0x1p60; };
#if defined(__FMA__)
    is_exact = job.plan->is_default && job.plan->is_narrow && is_moderate(scale) &&
               is_moderate(job.plan->quantum) && is_moderate(job.plan->high);
#else
    (void)is_moderate;
#endif
  }

  bool is_exact = false;

  // Loops with a call that is not inlined are not vectorized.
  [[gnu::always_inline]] float operator()(float x) const {
#if defined(__FMA__)
    float t = x > bound_ ? bound_ : x;
    t = t < -bound_ ? -bound_ : t;
    const float first = t * reciprocal_;
    const float second =
        __builtin_fmaf(__builtin_fmaf(-first, scale_, t), reciprocal_, first);
    const float third = __builtin_fmaf(__builtin_fmaf(-second, scale_, t), reciprocal_, second);
    const uint32_t sign = bit_cast<uint32_t>(x) & Bits<float>::sign;  // of zero, which sums lose
    return bit_cast<float>((bit_cast<uint32_t>(third) & ~Bits<float>::sign) | sign);
#else
    return x / scale_;
#endif
  }

 private:
  float scale_, reciprocal_, bound_;
};

template <class Lane>
class Scales {
 public:
  Scales(const Job& job, int64_t begin, Lane* scales, Lane* zero_points)
      : from_scales_(static_cast<const Lane*>(job.scales)),
        from_zero_points_(static_cast<const Lane*>(job.zero_points)),
        layout_(job.layout),
        scales_(scales),
        zero_points_(zero_points),
        is_one_(from_scales_ && job.layout.run_length == job.layout.row_length &&
                job.layout.row_stride == 0),
        quotient_(job, is_one_ ? float(from_scales_[0]) : 1.0f) {
    if (!from_scales_) return;
    row_ = begin / layout_.row_length;
    column_ = begin % layout_.row_length;
    run_ = column_ / layout_.run_length;
    in_run_ = column_ % layout_.run_length;
  }

  // Spread the scales of the next `count` elements; call this for each block in turn.
  void fill(int64_t count) {
    if (is_one_ && filled_ >= count) return;
    for (int64_t i = 0; i < count;) {
      const int64_t at = row_ * layout_.row_stride + run_;
      const int64_t in_row = std::min(layout_.row_length - column_, count - i);
      if (layout_.run_length == 1) {
        std::copy_n(from_scales_ + at, in_row, scales_ + i);
        if (from_zero_points_) std::copy_n(from_zero_points_ + at, in_row, zero_points_ + i);
        i += in_row;
        advance(in_row);
        continue;
      }
      const int64_t in_run = std::min(layout_.run_length - in_run_, in_row);
      std::fill_n(scales_ + i, in_run, from_scales_[at]);
      if (from_zero_points_) std::fill_n(zero_points_ + i, in_run, from_zero_points_[at]);
      i += in_run;
      advance(in_run);
    }
    filled_ = count;
  }

  // Whether there is one scale, and its quotient has the bits of the division.
  bool has_quotient() const { return is_one_ && quotient_.is_exact; }

  // Call `use` with a function that subtracts the zero point and divides by the one scale.
  template <class Use>
  auto with_quotient(const Use& use) const {
    const Quotient quotient = quotient_;
    if (!from_zero_points_) return use([=](float x) { return quotient(x); });
    const float zero_point = float(from_zero_points_[0]);
    return use([=](float x) { return quotient(x - zero_point); });
  }

  void divide(const Lane* in, Lane* out, int64_t count) const {
    if constexpr (std::is_same_v<Lane, float>) {
      if (has_quotient()) {
        return with_quotient([=](const auto& scaled) { divide_by_one(scaled, in, out, count); });
      }
    }
    if (from_zero_points_) {
#pragma omp simd
      for (int64_t i = 0; i < count; ++i) out[i] = (in[i] - zero_points_[i]) / scales_[i];
    } else {
#pragma omp simd
      for (int64_t i = 0; i < count; ++i) out[i] = in[i] / scales_[i];
    }
  }

  void multiply(Lane* lanes, int64_t count) const {
    if (from_zero_points_) {
#pragma omp simd
      for (int64_t i = 0; i < count; ++i) lanes[i] = lanes[i] * scales_[i] + zero_points_[i];
    } else {
#pragma omp simd
      for (int64_t i = 0; i < count; ++i) lanes[i] *= scales_[i];
    }
  }

 private:
  // `scaled` is a copy, which `out` cannot alias: else the loop is not vectorized.
  template <class Scaled>
  static void divide_by_one(const Scaled scaled, const float* in, float* out, int64_t count) {
#pragma omp simd
    for (int64_t i = 0; i < count; ++i) out[i] = scaled(in[i]);
  }

  void advance(int64_t count) {
    column_ += count, in_run_ += count;
    if (column_ == layout_.row_length) {
      ++row_, column_ = run_ = in_run_ = 0;
    } else if (layout_.run_length == 1) {
      run_ = column_, in_run_ = 0;
    } else if (in_run_ == layout_.run_length) {
      ++run_, in_run_ = 0;
    }
  }

  const Lane *from_scales_, *from_zero_points_;
  Layout layout_;
  Lane *scales_, *zero_points_;
  bool is_one_;
  Quotient quotient_;
  int64_t row_ = 0, column_ = 0, run_ = 0, in_run_ = 0, filled_ = 0;
};

}  // namespace
}  // namespace fpformats
