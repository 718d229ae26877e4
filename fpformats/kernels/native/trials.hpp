// Errors of quantized rows, without storing the quantized rows.
#pragma once

#include <algorithm>

#include "job.hpp"

namespace fpformats {
namespace {

template <class Lane>
struct TrialRow {
  const Lane* x;
  const double* weights;  // or null
  Lane scale, zero_point;
  bool is_shifted;
};

template <class Lane>
TrialRow<Lane> row_of(const Trial& trial, int64_t row, int64_t candidate) {
  const int64_t at = row * trial.candidates + candidate;
  const Lane* zero_points = static_cast<const Lane*>(trial.zero_points);
  return {
      static_cast<const Lane*>(trial.rows) + row * trial.length,
      trial.weights ? trial.weights + row * trial.length : nullptr,
      static_cast<const Lane*>(trial.scales)[at],
      zero_points ? zero_points[at] : Lane(0),
      zero_points != nullptr,
  };
}

template <class Lane>
void divide(const TrialRow<Lane>& row, int64_t from, int64_t count, Lane* v) {
  const Lane* x = row.x + from;
  const Lane scale = row.scale, zero_point = row.zero_point;
  if (row.is_shifted) {
#pragma omp simd
    for (int64_t i = 0; i < count; ++i) v[i] = (x[i] - zero_point) / scale;
  } else {
#pragma omp simd
    for (int64_t i = 0; i < count; ++i) v[i] = x[i] / scale;
  }
}

// The sum over a block of squared differences between the data and scale * q + zero_point.
template <class Lane>
double squared_error(const TrialRow<Lane>& row, int64_t from, int64_t count, const Lane* q) {
  const Lane* x = row.x + from;
  const Lane scale = row.scale, zero_point = row.is_shifted ? row.zero_point : Lane(-0.0);
  double sum = 0;
  if (row.weights) {
    const double* weights = row.weights + from;
#pragma omp simd reduction(+ : sum)
    for (int64_t i = 0; i < count; ++i) {
      const double difference = double(q[i] * scale + zero_point) - double(x[i]);
      sum += weights[i] * (difference * difference);
    }
  } else {
#pragma omp simd reduction(+ : sum)
    for (int64_t i = 0; i < count; ++i) {
      const double difference = double(q[i] * scale + zero_point) - double(x[i]);
      sum += difference * difference;
    }
  }
  return sum;
}

template <class Lane>
void add_sums(const TrialRow<Lane>& row, int64_t from, int64_t count, const Lane* q, double* sums) {
  const Lane* x = row.x + from;
  double sw = 0, sq = 0, sqq = 0, sx = 0, sxq = 0, sxx = 0;
#pragma omp simd reduction(+ : sw, sq, sqq, sx, sxq, sxx)
  for (int64_t i = 0; i < count; ++i) {
    const double w = row.weights ? row.weights[from + i] : 1.0, a = double(x[i]), b = double(q[i]);
    sw += w, sq += w * b, sqq += w * b * b, sx += w * a, sxq += w * a * b, sxx += w * a * a;
  }
  const double all[sum_count] = {sw, sq, sqq, sx, sxq, sxx};
  for (int i = 0; i < sum_count; ++i) sums[i] += all[i];
}

}  // namespace
}  // namespace fpformats
