// Counter-based random words: Philox4x32-10 as in philox.py, the first word of each block.
#pragma once

#if defined(__AVX2__)
#include <immintrin.h>
#endif

#include "job.hpp"

namespace fpformats {
namespace {

constexpr uint64_t multipliers[2] = {0xD2511F53, 0xCD9E8D57};
constexpr uint32_t key_steps[2] = {0x9E3779B9, 0xBB67AE85};
constexpr uint64_t low_half = 0xFFFFFFFF;

// Eight, four or one 64-bit lanes, each with a 32-bit word in its low half. `high` moves the high
// half to the low half, and `mixed` is the exclusive or of three words.
#if defined(__AVX512F__)
struct Words {
  static constexpr int lanes = 8;
  __m512i v;
  static Words fill(uint64_t word) { return {_mm512_set1_epi64(int64_t(word))}; }
  static Words count(uint64_t from) {
    return {_mm512_add_epi64(_mm512_set1_epi64(int64_t(from)),
                             _mm512_set_epi64(7, 6, 5, 4, 3, 2, 1, 0))};
  }
  Words times(Words factor) const { return {_mm512_mul_epu32(v, factor.v)}; }
  Words high() const { return {_mm512_shuffle_epi32(v, _MM_PERM_DDBB)}; }
  Words mixed(Words b, Words c) const { return {_mm512_ternarylogic_epi64(v, b.v, c.v, 0x96)}; }
  Words shifted(int by) const { return {_mm512_srli_epi64(v, unsigned(by))}; }
  Words low() const { return {_mm512_and_si512(v, _mm512_set1_epi64(int64_t(low_half)))}; }
  void put(uint64_t* to) const { _mm512_storeu_si512(to, v); }
  void put(uint32_t* to) const { _mm256_storeu_si256((__m256i*)to, _mm512_cvtepi64_epi32(v)); }
};
#elif defined(__AVX2__)
struct Words {
  static constexpr int lanes = 4;
  __m256i v;
  static Words fill(uint64_t word) { return {_mm256_set1_epi64x(int64_t(word))}; }
  static Words count(uint64_t from) {
    return {_mm256_add_epi64(_mm256_set1_epi64x(int64_t(from)), _mm256_set_epi64x(3, 2, 1, 0))};
  }
  Words times(Words factor) const { return {_mm256_mul_epu32(v, factor.v)}; }
  Words high() const { return {_mm256_shuffle_epi32(v, 0xF5)}; }
  Words mixed(Words b, Words c) const { return {_mm256_xor_si256(_mm256_xor_si256(v, b.v), c.v)}; }
  Words shifted(int by) const { return {_mm256_srli_epi64(v, by)}; }
  Words low() const { return {_mm256_and_si256(v, _mm256_set1_epi64x(int64_t(low_half)))}; }
  void put(uint64_t* to) const { _mm256_storeu_si256((__m256i*)to, v); }
  void put(uint32_t* to) const {
    const __m256i order = _mm256_set_epi32(7, 5, 3, 1, 6, 4, 2, 0);
    const __m256i halves = _mm256_permutevar8x32_epi32(v, order);
    _mm_storeu_si128((__m128i*)to, _mm256_castsi256_si128(halves));
  }
};
#else
struct Words {
  static constexpr int lanes = 1;
  uint64_t v;
  static Words fill(uint64_t word) { return {word}; }
  static Words count(uint64_t from) { return {from}; }
  // The product of the low halves, as in the vector instructions.
  Words times(Words factor) const { return {(v & low_half) * (factor.v & low_half)}; }
  Words high() const { return {v >> 32}; }
  Words mixed(Words b, Words c) const { return {v ^ b.v ^ c.v}; }
  Words shifted(int by) const { return {v >> by}; }
  Words low() const { return {v & low_half}; }
  void put(uint64_t* to) const { *to = v; }
  void put(uint32_t* to) const { *to = uint32_t(v); }
};
#endif

struct Keys {
  Words first[10], second[10];
  explicit Keys(uint64_t seed) {
    uint32_t key[2] = {uint32_t(seed), uint32_t(seed >> 32)};
    for (int round = 0; round < 10; ++round) {
      first[round] = Words::fill(key[0]), second[round] = Words::fill(key[1]);
      key[0] += key_steps[0], key[1] += key_steps[1];
    }
  }
};

// Leftover bits in the high halves do no harm: `times` reads only the low halves.
inline Words first_words(uint64_t index, const Keys& keys) {
  const Words factor_a = Words::fill(multipliers[0]), factor_c = Words::fill(multipliers[1]);
  const Words counter = Words::count(index), product = counter.times(factor_a);
  // The first round, where two words of the counter are zero.
  Words a = counter.high().mixed(keys.first[0], Words::fill(0)), b = Words::fill(0);
  Words c = product.high().mixed(keys.second[0], b), d = product;
  for (int round = 1; round < 9; ++round) {
    const Words from_a = a.times(factor_a), from_c = c.times(factor_c);
    a = from_c.high().mixed(b, keys.first[round]), b = from_c;
    c = from_a.high().mixed(d, keys.second[round]), d = from_a;
  }
  // The first word of the last round.
  return c.times(factor_c).high().mixed(b, keys.first[9]).low();
}

// Write the words of `count` elements from `begin` on, in the low bits, with room for 16 more.
template <class Word>
void draw(const Random& random, int64_t begin, int64_t count, Word* words) {
  if (random.words) {
    for (int64_t i = 0; i < count; ++i) words[i] = Word(random.words[begin + i]);
    return;
  }
  const Keys keys(random.seed);
  for (int64_t i = 0; i < count; i += 2 * Words::lanes) {
    const Words now = first_words(uint64_t(begin + i), keys);
    const Words next = first_words(uint64_t(begin + i + Words::lanes), keys);
    now.shifted(32 - random.bits).put(words + i);
    next.shifted(32 - random.bits).put(words + i + Words::lanes);
  }
}

}  // namespace
}  // namespace fpformats
