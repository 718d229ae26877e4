// Codes in memory: whole bytes, or packed side by side from the lowest bit, as in bit_packing.py.
#pragma once

#if defined(__BMI2__)
#include <immintrin.h>
#endif

#include <algorithm>
#include <cstring>
#include <limits>

#include "bits.hpp"
#include "job.hpp"
#include "rounding.hpp"

namespace fpformats {
namespace {

// Put the low `bits` bits of eight bytes side by side; `spread` is the inverse.
inline uint64_t squeeze(uint64_t bytes, int bits) {
  const uint64_t mask = 0x0101010101010101u * ((1u << bits) - 1);
#if defined(__BMI2__)
  return _pext_u64(bytes, mask);
#else
  uint64_t packed = 0;
  for (int i = 0; i < 8; ++i) packed |= ((bytes & mask) >> (8 * i) & 0xFF) << (bits * i);
  return packed;
#endif
}

inline uint64_t spread(uint64_t packed, int bits) {
  const uint64_t mask = 0x0101010101010101u * ((1u << bits) - 1);
#if defined(__BMI2__)
  return _pdep_u64(packed, mask);
#else
  uint64_t bytes = 0;
  for (int i = 0; i < 8; ++i) bytes |= (packed >> (bits * i) & ((1u << bits) - 1)) << (8 * i);
  return bytes;
#endif
}

// Each group of eight codes is stored as a whole word, which the next group partly overwrites. At
// the end, only the bytes that exist are stored. `bytes` has room for 7 more after the codes.
inline void pack(const uint8_t* bytes, char* out, int64_t count, int bits) {
  const int64_t size = (count * bits + 7) / 8;
  for (int64_t i = 0, at = 0; i < count; i += 8, at += bits) {
    uint64_t eight;
    std::memcpy(&eight, bytes + i, 8);
    eight = squeeze(eight, bits);
    if (at + 8 <= size) {
      std::memcpy(out + at, &eight, 8);
    } else {
      std::memcpy(out + at, &eight, size_t(std::min<int64_t>(bits, size - at)));
    }
  }
}

inline void unpack(const char* in, uint8_t* bytes, int64_t count, int bits) {
  const int64_t size = (count * bits + 7) / 8;
  for (int64_t i = 0, at = 0; i < count; i += 8, at += bits) {
    uint64_t eight = 0;
    if (at + 8 <= size) {
      std::memcpy(&eight, in + at, 8);
    } else {
      std::memcpy(&eight, in + at, size_t(std::min<int64_t>(bits, size - at)));
    }
    eight = spread(eight, bits);
    std::memcpy(bytes + i, &eight, 8);
  }
}

template <class Code>
void narrow_codes(const uint32_t* in, Code* out, int64_t count) {
#pragma omp simd
  for (int64_t i = 0; i < count; ++i) out[i] = Code(in[i]);
}

inline void store_codes(const Job& job, int64_t begin, int64_t count, const uint32_t* codes) {
  char* out = static_cast<char*>(job.out);
  if (job.packed_bits) {
    uint8_t bytes[block + 8];
    narrow_codes(codes, bytes, count);
    std::memset(bytes + count, 0, 8);
    pack(bytes, out + begin / 8 * job.packed_bits, count, job.packed_bits);
  } else if (job.code_bytes == 1) {
    narrow_codes(codes, reinterpret_cast<uint8_t*>(out) + begin, count);
  } else if (job.code_bytes == 2) {
    narrow_codes(codes, reinterpret_cast<uint16_t*>(out) + begin, count);
  } else {
    narrow_codes(codes, reinterpret_cast<uint32_t*>(out) + begin, count);
  }
}

template <class Code>
unsigned widen_codes(const Code* in, uint32_t* out, int64_t count, uint32_t last) {
  uint32_t beyond = 0;
#pragma omp simd reduction(| : beyond)
  for (int64_t i = 0; i < count; ++i) {
    out[i] = uint32_t(in[i]);
    beyond |= uint32_t(in[i]) & ~last;
  }
  return beyond ? bad_code : 0;
}

inline unsigned load_codes(const Job& job, int64_t begin, int64_t count, uint32_t* codes) {
  const char* in = static_cast<const char*>(job.in);
  const int bits = job.plan->magnitude_bits + job.plan->is_signed;
  const uint32_t last = uint32_t((uint64_t(1) << bits) - 1);
  if (job.packed_bits) {
    uint8_t bytes[block + 8];
    unpack(in + begin / 8 * job.packed_bits, bytes, count, job.packed_bits);
    return widen_codes(bytes, codes, count, last);
  }
  if (job.code_bytes == 1)
    return widen_codes(reinterpret_cast<const uint8_t*>(in) + begin, codes, count, last);
  if (job.code_bytes == 2)
    return widen_codes(reinterpret_cast<const uint16_t*>(in) + begin, codes, count, last);
  return widen_codes(reinterpret_cast<const uint32_t*>(in) + begin, codes, count, last);
}

// Replace NaN by its code; if there is none, return flags for the NaN that was found.
template <class Lane>
unsigned name_nan(const Job& job, int64_t count, const Lane* in, uint32_t* codes) {
  unsigned met = 0;
  const bool has_code = job.nan_code >= 0;
  const uint32_t code = has_code ? uint32_t(job.nan_code) : 0;
#pragma omp simd reduction(| : met)
  for (int64_t i = 0; i < count; ++i) {
    const bool is_nan = codes[i] == not_a_number;
    met |= is_nan ? nan_out : 0;
    met |= in[i] != in[i] ? nan_in : 0;
    codes[i] = is_nan ? code : codes[i];
  }
  return has_code ? 0 : met;
}

}  // namespace
}  // namespace fpformats
