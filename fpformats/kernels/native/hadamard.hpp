// Hadamard transforms of groups of numbers, by butterflies in a fixed order.
#pragma once

#include <algorithm>

#include "job.hpp"

namespace fpformats {
namespace {

constexpr int64_t hadamard_tile = 16;  // columns that are transformed together

// The butterflies of pairs of rows at a distance, over `columns` adjacent numbers each.
template <class Lane>
inline void butterflies(Lane* rows, int64_t size, int64_t distance, int64_t columns) {
  for (int64_t start = 0; start < size; start += 2 * distance) {
    Lane* low = rows + start * columns;
    Lane* high = low + distance * columns;
#pragma omp simd
    for (int64_t i = 0; i < distance * columns; ++i) {
      const Lane a = low[i], b = high[i];
      low[i] = a + b;
      high[i] = a - b;
    }
  }
}

// The butterflies at distances 1, 2 and 4 of eight adjacent numbers, for each eight of a group.
template <class Lane>
inline void first_butterflies(Lane* numbers, int64_t size) {
#pragma omp simd
  for (int64_t start = 0; start < size; start += 8) {
    Lane* v = numbers + start;
    const Lane a0 = v[0] + v[1], a1 = v[0] - v[1], a2 = v[2] + v[3], a3 = v[2] - v[3];
    const Lane a4 = v[4] + v[5], a5 = v[4] - v[5], a6 = v[6] + v[7], a7 = v[6] - v[7];
    const Lane b0 = a0 + a2, b1 = a1 + a3, b2 = a0 - a2, b3 = a1 - a3;
    const Lane b4 = a4 + a6, b5 = a5 + a7, b6 = a4 - a6, b7 = a5 - a7;
    v[0] = b0 + b4, v[1] = b1 + b5, v[2] = b2 + b6, v[3] = b3 + b7;
    v[4] = b0 - b4, v[5] = b1 - b5, v[6] = b2 - b6, v[7] = b3 - b7;
  }
}

template <class Lane>
inline void store_scaled(const Lane* from, Lane* to, int64_t count, Lane factor) {
#pragma omp simd
  for (int64_t i = 0; i < count; ++i) to[i] = from[i] * factor;
}

// Groups of `size` adjacent numbers.
template <class Lane>
inline void transform_adjacent(const Lane* in, Lane* out, int64_t size, int64_t groups,
                               Lane factor) {
  alignas(64) Lane rows[hadamard_most];
  for (int64_t group = 0; group < groups; ++group, in += size, out += size) {
    std::copy_n(in, size, rows);
    int64_t distance = 1;
    if (size >= 8) {
      first_butterflies(rows, size);
      distance = 8;
    }
    for (; distance < size; distance *= 2) butterflies(rows, size, distance, 1);
    store_scaled(rows, out, size, factor);
  }
}

// Some columns of a group of `size` rows of `inner` adjacent numbers.
template <class Lane>
inline void transform_columns(const Transform& job, const Lane* in, Lane* out, int64_t columns) {
  alignas(64) Lane rows[hadamard_most * hadamard_tile];
  for (int64_t row = 0; row < job.size; ++row)
    std::copy_n(in + row * job.inner, columns, rows + row * columns);
  for (int64_t distance = 1; distance < job.size; distance *= 2)
    butterflies(rows, job.size, distance, columns);
  for (int64_t row = 0; row < job.size; ++row)
    store_scaled(rows + row * columns, out + row * job.inner, columns, Lane(job.factor));
}

// A group of rows, some columns at a time.
template <class Lane>
void transform_rows(const Transform& job, const Lane* in, Lane* out) {
  int64_t column = 0;
  for (; column + hadamard_tile <= job.inner; column += hadamard_tile)
    transform_columns(job, in + column, out + column, hadamard_tile);  // a constant is faster
  if (column < job.inner) transform_columns(job, in + column, out + column, job.inner - column);
}

template <class Lane>
void transform_groups(const Transform& job, int64_t begin, int64_t end) {
  const Lane* in = static_cast<const Lane*>(job.in);
  Lane* out = static_cast<Lane*>(job.out);
  const int64_t group = job.size * job.inner, groups = end - begin;
  in += begin * group;
  out += begin * group;
  const Lane factor = Lane(job.factor);
  if (job.inner > 1) {
    for (int64_t index = 0; index < groups; ++index)
      transform_rows(job, in + index * group, out + index * group);
    return;
  }
  switch (job.size) {  // constants are faster
    case 16: return transform_adjacent(in, out, 16, groups, factor);
    case 64: return transform_adjacent(in, out, 64, groups, factor);
    case 256: return transform_adjacent(in, out, 256, groups, factor);
    default: return transform_adjacent(in, out, job.size, groups, factor);
  }
}

}  // namespace
}  // namespace fpformats
