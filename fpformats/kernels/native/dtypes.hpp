// Conversion between the dtypes in memory and the lanes for computation: float32 and float64.
#pragma once

#include <cstring>
#if defined(__AVX2__)
#include <immintrin.h>
#endif

#include "bits.hpp"
#include "job.hpp"

namespace fpformats {
namespace {

inline float widen_half(uint16_t half) {
  const uint32_t sign = uint32_t(half & 0x8000) << 16, magnitude = uint32_t(half & 0x7FFF) << 13;
  // This product is exact: it changes the exponent, and makes subnormal numbers normal.
  uint32_t moved = bit_cast<uint32_t>(bit_cast<float>(magnitude) * 0x1p112f);
  if (magnitude >= 0x0F800000u) moved = magnitude | Bits<float>::exponent;
  return bit_cast<float>(sign | moved);
}

inline uint16_t narrow_half(float x) {
  const uint32_t pattern = bit_cast<uint32_t>(x), magnitude = pattern & ~Bits<float>::sign;
  const uint16_t sign = uint16_t(pattern >> 16 & 0x8000);
  if (magnitude > Bits<float>::exponent) return sign | 0x7E00 | uint16_t(magnitude >> 13 & 0x3FF);
  if (magnitude >= 0x47800000u) return sign | 0x7C00;  // 2**16 and more
  if (magnitude < 0x38800000u) {                       // below 2**-14, where the spacing is 2**-24
    const float sum = bit_cast<float>(magnitude) + 0.5f;
    return sign | uint16_t(bit_cast<uint32_t>(sum) - 0x3F000000u);
  }
  const uint32_t rounded = magnitude + 0xFFF + (magnitude >> 13 & 1);
  return sign | uint16_t((rounded - 0x38000000u) >> 13);
}

inline uint16_t narrow_bfloat16(float x) {
  const uint32_t pattern = bit_cast<uint32_t>(x);
  const uint32_t rounded = (pattern + 0x7FFF + (pattern >> 16 & 1)) >> 16;
  return uint16_t(x != x ? pattern >> 16 | 0x40 : rounded);
}

inline void load_halves(const uint16_t* in, float* out, int64_t count) {
  int64_t i = 0;
#if defined(__AVX512F__)
  for (; i + 16 <= count; i += 16)
    _mm512_storeu_ps(out + i, _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)(in + i))));
#elif defined(__F16C__)
  for (; i + 8 <= count; i += 8)
    _mm256_storeu_ps(out + i, _mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)(in + i))));
#endif
  for (; i < count; ++i) out[i] = widen_half(in[i]);
}

inline void store_halves(const float* in, uint16_t* out, int64_t count) {
  int64_t i = 0;
#if defined(__AVX512F__)
  for (; i + 16 <= count; i += 16)
    _mm256_storeu_si256((__m256i*)(out + i),
                        _mm512_cvtps_ph(_mm512_loadu_ps(in + i), _MM_FROUND_TO_NEAREST_INT));
#elif defined(__F16C__)
  for (; i + 8 <= count; i += 8)
    _mm_storeu_si128((__m128i*)(out + i),
                     _mm256_cvtps_ph(_mm256_loadu_ps(in + i), _MM_FROUND_TO_NEAREST_INT));
#endif
  for (; i < count; ++i) out[i] = narrow_half(in[i]);
}

// The lanes of a block that starts at `begin`. If memory already holds lanes, no copy is made.
inline const float* load(const Job& job, int64_t begin, int64_t count, float* buffer) {
  if (job.dtype == FloatDtype::float32) return static_cast<const float*>(job.in) + begin;
  const uint16_t* in = static_cast<const uint16_t*>(job.in) + begin;
  if (job.dtype == FloatDtype::float16) {
    load_halves(in, buffer, count);
  } else {
#pragma omp simd
    for (int64_t i = 0; i < count; ++i) buffer[i] = bit_cast<float>(uint32_t(in[i]) << 16);
  }
  return buffer;
}

inline const double* load(const Job& job, int64_t begin, int64_t, double*) {
  return static_cast<const double*>(job.in) + begin;
}

// Copy bytes to memory that is not read again soon, without loading it into the caches.
inline void stream(const void* from, void* to, int64_t bytes) {
  const char* in = static_cast<const char*>(from);
  char* out = static_cast<char*>(to);
#if defined(__AVX2__)
  const int64_t lead = int64_t(-uintptr_t(out) & 63);
  if (lead < bytes) {
    std::memcpy(out, in, lead);
    in += lead, out += lead, bytes -= lead;
    for (; bytes >= 64; in += 64, out += 64, bytes -= 64) {
#if defined(__AVX512F__)
      _mm512_stream_si512((__m512i*)out, _mm512_loadu_si512(in));
#else
      _mm256_stream_si256((__m256i*)out, _mm256_loadu_si256((const __m256i*)in));
      _mm256_stream_si256((__m256i*)(out + 32), _mm256_loadu_si256((const __m256i*)(in + 32)));
#endif
    }
  }
#endif
  std::memcpy(out, in, bytes);
}

// Where to put the lanes of a block: directly in memory, if it holds lanes and is not streamed to.
inline float* place(const Job& job, int64_t begin, float* buffer) {
  const bool direct = job.dtype == FloatDtype::float32 && !job.streams;
  return direct ? static_cast<float*>(job.out) + begin : buffer;
}

inline double* place(const Job& job, int64_t begin, double* buffer) {
  return job.streams ? buffer : static_cast<double*>(job.out) + begin;
}

inline void store(const Job& job, int64_t begin, int64_t count, const float* lanes) {
  if (job.dtype == FloatDtype::float32) {
    float* out = static_cast<float*>(job.out) + begin;
    if (job.streams) stream(lanes, out, count * 4);
    return;
  }
  uint16_t* out = static_cast<uint16_t*>(job.out) + begin;
  if (job.dtype == FloatDtype::float16) {
    store_halves(lanes, out, count);
  } else {
#pragma omp simd
    for (int64_t i = 0; i < count; ++i) out[i] = narrow_bfloat16(lanes[i]);
  }
}

inline void store(const Job& job, int64_t begin, int64_t count, const double* lanes) {
  if (job.streams) stream(lanes, static_cast<double*>(job.out) + begin, count * 8);
}

}  // namespace
}  // namespace fpformats
