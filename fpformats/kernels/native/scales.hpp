// The scales and zero points of a block, spread so that each lane has its own.
#pragma once

#include <algorithm>
#include <cstring>

#include "job.hpp"

namespace fpformats {
namespace {

template <class Lane>
class Scales {
 public:
  Scales(const Job& job, int64_t begin, Lane* scales, Lane* zero_points)
      : from_scales_(static_cast<const Lane*>(job.scales)),
        from_zero_points_(static_cast<const Lane*>(job.zero_points)),
        layout_(job.layout),
        scales_(scales),
        zero_points_(zero_points) {
    if (!from_scales_) return;
    row_ = begin / layout_.row_length;
    column_ = begin % layout_.row_length;
    run_ = column_ / layout_.run_length;
    in_run_ = column_ % layout_.run_length;
  }

  // Spread the scales of the next `count` elements; call this for each block in turn.
  void fill(int64_t count) {
    const bool is_one = layout_.run_length == layout_.row_length && layout_.row_stride == 0;
    if (is_one && filled_ >= count) return;
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

  void divide(const Lane* in, Lane* out, int64_t count) const {
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
  int64_t row_ = 0, column_ = 0, run_ = 0, in_run_ = 0, filled_ = 0;
};

}  // namespace
}  // namespace fpformats
