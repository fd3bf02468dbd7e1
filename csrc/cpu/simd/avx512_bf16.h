#pragma once

#include "avx512.h"

// AVX512 with products of bfloat16 pairs (Zen 4, Cooper Lake and later).
namespace gpt4fast::cpu::GPT4FAST_LEVEL {

#define GPT4FAST_HAS_BFLOAT16_PRODUCTS 1

// acc[lane] += a[2 lane] * b[2 lane] + a[2 lane + 1] * b[2 lane + 1], each rounded to float32.
inline Vector multiply_add_pairs(__m512bh a, __m512bh b, Vector acc) {
  return _mm512_dpbf16_ps(acc, a, b);
}

inline __m512bh load_pairs(const BFloat16* source) {
  return (__m512bh)_mm512_loadu_si512(source);
}

inline __m512bh broadcast_pair(const BFloat16* source) {
  int32_t pair;
  std::memcpy(&pair, source, sizeof(pair));
  return (__m512bh)_mm512_set1_epi32(pair);
}

// 32 numbers rounded to bfloat16, in their order.
inline void store_rounded(BFloat16* target, Vector low, Vector high) {
  _mm512_storeu_si512(target, (__m512i)_mm512_cvtne2ps_pbh(high, low));
}

// low[0], high[0], low[1], high[1], ... rounded to bfloat16: pairs along the rows that low and high are.
inline void store_interleaved(BFloat16* target, Vector low, Vector high) {
  const __m512i a = _mm512_cvtepu16_epi32((__m256i)_mm512_cvtneps_pbh(low));
  const __m512i b = _mm512_cvtepu16_epi32((__m256i)_mm512_cvtneps_pbh(high));
  _mm512_storeu_si512(target, _mm512_or_si512(a, _mm512_slli_epi32(b, 16)));
}

// The same for sixteen numbers each of two rows in memory.
inline void store_interleaved(BFloat16* target, const BFloat16* low, const BFloat16* high) {
  const __m512i a = _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(low)));
  const __m512i b = _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(high)));
  _mm512_storeu_si512(target, _mm512_or_si512(a, _mm512_slli_epi32(b, 16)));
}

}  // namespace gpt4fast::cpu::GPT4FAST_LEVEL
