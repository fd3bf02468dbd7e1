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

inline __m512bh load_pairs(const BFloat16* source, int64_t count) {
  const auto lanes = static_cast<__mmask32>((uint64_t{1} << count) - 1);
  return (__m512bh)_mm512_maskz_loadu_epi16(lanes, source);
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

// low[0], high[0], low[1], high[1], ... of 16 + 16 numbers: pairs along the rows that low and high are.
inline __m512i interleave(__m512i low_high) {
  const __m512i order = _mm512_set_epi16(31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24, 8, 23, 7, 22, 6, 21,
                                         5, 20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
  return _mm512_permutexvar_epi16(order, low_high);
}

// Sixteen numbers each of two rows, rounded to bfloat16, interleaved.
inline void store_interleaved(BFloat16* target, Vector low, Vector high) {
  _mm512_storeu_si512(target, interleave((__m512i)_mm512_cvtne2ps_pbh(high, low)));
}

// The same, and also the rows themselves.
inline void store_interleaved(BFloat16* target, BFloat16* low_row, BFloat16* high_row, Vector low, Vector high) {
  const __m512i rows = (__m512i)_mm512_cvtne2ps_pbh(high, low);
  _mm512_storeu_si512(target, interleave(rows));
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(low_row), _mm512_castsi512_si256(rows));
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(high_row), _mm512_extracti64x4_epi64(rows, 1));
}

// The same for sixteen numbers each of two rows in memory.
inline void store_interleaved(BFloat16* target, const BFloat16* low, const BFloat16* high) {
  const __m512i a = _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(low)));
  const __m512i b = _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(high)));
  _mm512_storeu_si512(target, _mm512_or_si512(a, _mm512_slli_epi32(b, 16)));
}

// Pairs of the numbers of two rows that stand in the same column. pairs[0] has columns 0-3, 8-11, 16-19 and 24-27 of
// the 32, pairs[1] the others: unpacking stays within 128 bits.
inline void pair_rows(__m512bh a, __m512bh b, __m512bh (&pairs)[2]) {
  pairs[0] = (__m512bh)_mm512_unpacklo_epi16((__m512i)a, (__m512i)b);
  pairs[1] = (__m512bh)_mm512_unpackhi_epi16((__m512i)a, (__m512i)b);
}

// 32 numbers between memory and the order of pair_rows.
inline void load_paired(const float* source, Vector (&columns)[2]) {
  const Vector a = load(source), b = load(source + 16);
  const __m512i low = _mm512_setr_epi32(0, 1, 2, 3, 8, 9, 10, 11, 16, 17, 18, 19, 24, 25, 26, 27);
  const __m512i high = _mm512_setr_epi32(4, 5, 6, 7, 12, 13, 14, 15, 20, 21, 22, 23, 28, 29, 30, 31);
  columns[0] = _mm512_permutex2var_ps(a, low, b);
  columns[1] = _mm512_permutex2var_ps(a, high, b);
}

inline void store_paired(float* target, const Vector (&columns)[2]) {
  const __m512i first = _mm512_setr_epi32(0, 1, 2, 3, 16, 17, 18, 19, 4, 5, 6, 7, 20, 21, 22, 23);
  const __m512i second = _mm512_setr_epi32(8, 9, 10, 11, 24, 25, 26, 27, 12, 13, 14, 15, 28, 29, 30, 31);
  store(target, _mm512_permutex2var_ps(columns[0], first, columns[1]));
  store(target + 16, _mm512_permutex2var_ps(columns[0], second, columns[1]));
}

}  // namespace gpt4fast::cpu::GPT4FAST_LEVEL
