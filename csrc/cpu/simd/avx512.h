#pragma once

#include <immintrin.h>

#include <cstdint>

#include "elements.h"

// AVX512 F, DQ, BW and VL: sixteen lanes, thirty-two registers. The interface is the one of scalar.h.
namespace gpt4fast::cpu::GPT4FAST_LEVEL {

using Vector = __m512;
using UintVector = uint32_t __attribute__((vector_size(64)));
using Mask = __mmask16;

inline constexpr int64_t kLanes = 16;
inline constexpr int kTileRows = 6;  // 6 x 4 accumulators, 4 vectors of the right operand and one of the left
inline constexpr int kTileVectors = 4;

inline Vector broadcast(float value) {
  return _mm512_set1_ps(value);
}

inline Mask lanes_between(int64_t first, int64_t last) {
  const uint32_t below_last = last >= 16 ? 0xffffu : last <= 0 ? 0u : (1u << last) - 1;
  const uint32_t below_first = first >= 16 ? 0xffffu : first <= 0 ? 0u : (1u << first) - 1;
  return static_cast<Mask>(below_last & ~below_first);
}

inline bool any(Mask mask) {
  return mask != 0;
}

inline Vector select(Mask mask, Vector yes, Vector no) {
  return _mm512_mask_blend_ps(mask, no, yes);
}

inline Mask greater(Vector a, Vector b) {
  return _mm512_cmp_ps_mask(a, b, _CMP_GT_OQ);
}

inline Mask equal(Vector a, Vector b) {
  return _mm512_cmp_ps_mask(a, b, _CMP_EQ_OQ);
}

inline Mask at_least(UintVector a, uint32_t b) {
  return _mm512_cmpge_epu32_mask((__m512i)a, _mm512_set1_epi32(static_cast<int>(b)));
}

inline Vector load(const float* source) {
  return _mm512_loadu_ps(source);
}

inline Vector load(const BFloat16* source) {
  const __m256i bits = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(source));
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(bits), 16));
}

inline Vector load(const Half* source) {
  return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(source)));
}

inline Vector load(const int8_t* source) {
  return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(source))));
}

inline Vector load(const float* source, int64_t count) {
  return _mm512_maskz_loadu_ps(lanes_between(0, count), source);
}

inline Vector load(const BFloat16* source, int64_t count) {
  const __m256i bits = _mm256_maskz_loadu_epi16(lanes_between(0, count), source);
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(bits), 16));
}

inline Vector load(const Half* source, int64_t count) {
  return _mm512_cvtph_ps(_mm256_maskz_loadu_epi16(lanes_between(0, count), source));
}

inline Vector load(const int8_t* source, int64_t count) {
  return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_maskz_loadu_epi8(lanes_between(0, count), source)));
}

// Keeps a value in a register, where the compiler would read it from memory once for each use.
template <typename Value>
inline void keep_in_register(Value& value) {
  asm("" : "+v"(value));
}

inline void store(float* target, Vector value) {
  _mm512_storeu_ps(target, value);
}

inline __m256i to_bfloat16(Vector value) {
#ifdef __AVX512BF16__
  return (__m256i)_mm512_cvtneps_pbh(value);
#else
  const __m512i bits = _mm512_castps_si512(value);
  const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
  const __m512i rounded = _mm512_add_epi32(_mm512_add_epi32(bits, _mm512_set1_epi32(0x7fff)), odd);
  const Mask is_nan = _mm512_cmp_ps_mask(value, value, _CMP_UNORD_Q);
  return _mm512_cvtepi32_epi16(
      _mm512_mask_mov_epi32(_mm512_srli_epi32(rounded, 16), is_nan, _mm512_set1_epi32(0x7fc0)));
#endif
}

inline void store(BFloat16* target, Vector value) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(target), to_bfloat16(value));
}

inline void store(Half* target, Vector value) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(target), _mm512_cvtps_ph(value, _MM_FROUND_TO_NEAREST_INT));
}

inline void store(float* target, Vector value, int64_t count) {
  _mm512_mask_storeu_ps(target, lanes_between(0, count), value);
}

inline void store(BFloat16* target, Vector value, int64_t count) {
  _mm256_mask_storeu_epi16(target, lanes_between(0, count), to_bfloat16(value));
}

inline void store(Half* target, Vector value, int64_t count) {
  _mm256_mask_storeu_epi16(target, lanes_between(0, count), _mm512_cvtps_ph(value, _MM_FROUND_TO_NEAREST_INT));
}

inline Vector multiply_add(Vector a, Vector b, Vector c) {
  return _mm512_fmadd_ps(a, b, c);
}

inline Vector maximum(Vector a, Vector b) {
  return _mm512_max_ps(b, a);  // a where either is NaN
}

inline float sum(Vector value) {
  return _mm512_reduce_add_ps(value);
}

inline float largest(Vector value) {
  return _mm512_reduce_max_ps(value);
}

inline Vector fraction(Vector x) {
  return _mm512_reduce_ps(x, _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC);
}

inline Vector scale_by_power(Vector value, Vector x) {
  return _mm512_scalef_ps(value, x);
}

inline void transpose(Vector (&rows)[16]) {
  __m512 a[16], b[16];
#pragma GCC unroll 8
  for (int i = 0; i < 8; ++i) {
    a[2 * i] = _mm512_unpacklo_ps(rows[2 * i], rows[2 * i + 1]);
    a[2 * i + 1] = _mm512_unpackhi_ps(rows[2 * i], rows[2 * i + 1]);
  }
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    for (int j = 0; j < 2; ++j) {
      const __m512d low = _mm512_castps_pd(a[4 * i + j]), high = _mm512_castps_pd(a[4 * i + 2 + j]);
      b[4 * i + 2 * j] = _mm512_castpd_ps(_mm512_unpacklo_pd(low, high));
      b[4 * i + 2 * j + 1] = _mm512_castpd_ps(_mm512_unpackhi_pd(low, high));
    }
  }
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    a[i] = _mm512_shuffle_f32x4(b[i], b[4 + i], 0x88);
    a[4 + i] = _mm512_shuffle_f32x4(b[i], b[4 + i], 0xdd);
    a[8 + i] = _mm512_shuffle_f32x4(b[8 + i], b[12 + i], 0x88);
    a[12 + i] = _mm512_shuffle_f32x4(b[8 + i], b[12 + i], 0xdd);
  }
#pragma GCC unroll 8
  for (int i = 0; i < 8; ++i) {
    rows[i] = _mm512_shuffle_f32x4(a[i], a[8 + i], 0x88);
    rows[8 + i] = _mm512_shuffle_f32x4(a[i], a[8 + i], 0xdd);
  }
}

// a[0], b[0], a[1], b[1], ...
inline void interleave(Vector a, Vector b, Vector& low, Vector& high) {
  const __m512i first = _mm512_set_epi32(23, 7, 22, 6, 21, 5, 20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
  low = _mm512_permutex2var_ps(a, first, b);
  high = _mm512_permutex2var_ps(a, _mm512_add_epi32(first, _mm512_set1_epi32(8)), b);
}

inline Vector sum_fours(Vector a, Vector b, Vector c, Vector d) {
  const __m512 ab = _mm512_add_ps(_mm512_unpacklo_ps(a, b), _mm512_unpackhi_ps(a, b));
  const __m512 cd = _mm512_add_ps(_mm512_unpacklo_ps(c, d), _mm512_unpackhi_ps(c, d));
  return _mm512_add_ps(_mm512_shuffle_ps(ab, cd, 0x44), _mm512_shuffle_ps(ab, cd, 0xee));
}

inline Vector sum_groups(const Vector (&parts)[4]) {
  const auto halves = [](Vector a, Vector b) {
    return _mm512_add_ps(_mm512_shuffle_f32x4(a, b, 0x88), _mm512_shuffle_f32x4(a, b, 0xdd));
  };
  return halves(halves(parts[0], parts[1]), halves(parts[2], parts[3]));
}

// The upper halves of the 64-bit products.
inline UintVector multiply_high(UintVector a, UintVector b) {
  const __m512i even = _mm512_mul_epu32((__m512i)a, (__m512i)b);
  const __m512i odd = _mm512_mul_epu32(_mm512_srli_epi64((__m512i)a, 32), _mm512_srli_epi64((__m512i)b, 32));
  return (UintVector)_mm512_mask_mov_epi32(_mm512_srli_epi64(even, 32), 0xaaaa, odd);
}

}  // namespace gpt4fast::cpu::GPT4FAST_LEVEL
