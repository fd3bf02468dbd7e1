#pragma once

#include <immintrin.h>

#include <cstdint>

#include "elements.h"

// AVX2, FMA and F16C: eight lanes, sixteen registers. The interface is the one of scalar.h.
namespace gpt4fast::cpu::GPT4FAST_LEVEL {

using Vector = __m256;
using UintVector = uint32_t __attribute__((vector_size(32)));
using Mask = __m256i;  // of each lane all bits or none

inline constexpr int64_t kLanes = 8;
inline constexpr int kTileRows = 6;  // 6 x 2 accumulators, 2 vectors of the right operand and one of the left
inline constexpr int kTileVectors = 2;

inline Vector broadcast(float value) {
  return _mm256_set1_ps(value);
}

inline Mask lanes_between(int64_t first, int64_t last) {
  const auto limit = [](int64_t lane) {
    return _mm256_set1_epi32(static_cast<int32_t>(lane < 0 ? 0 : lane > 8 ? 8 : lane));
  };
  const __m256i lanes = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
  return _mm256_andnot_si256(_mm256_cmpgt_epi32(limit(first), lanes), _mm256_cmpgt_epi32(limit(last), lanes));
}

inline bool any(Mask mask) {
  return _mm256_movemask_epi8(mask) != 0;
}

inline Vector select(Mask mask, Vector yes, Vector no) {
  return _mm256_blendv_ps(no, yes, _mm256_castsi256_ps(mask));
}

inline Mask greater(Vector a, Vector b) {
  return _mm256_castps_si256(_mm256_cmp_ps(a, b, _CMP_GT_OQ));
}

inline Mask equal(Vector a, Vector b) {
  return _mm256_castps_si256(_mm256_cmp_ps(a, b, _CMP_EQ_OQ));
}

inline Mask at_least(UintVector a, uint32_t b) {
  const __m256i bound = _mm256_set1_epi32(static_cast<int>(b));
  return _mm256_cmpeq_epi32(_mm256_max_epu32((__m256i)a, bound), (__m256i)a);
}

inline Vector from_bfloat16(__m128i bits) {
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(bits), 16));
}

inline Vector load(const float* source) {
  return _mm256_loadu_ps(source);
}

inline Vector load(const BFloat16* source) {
  return from_bfloat16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(source)));
}

inline Vector load(const Half* source) {
  return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(source)));
}

inline Vector load(const int8_t* source) {
  return _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(source))));
}

inline Vector load(const float* source, int64_t count) {
  return _mm256_maskload_ps(source, lanes_between(0, count));
}

template <typename T>
inline Vector load(const T* source, int64_t count) {
  alignas(16) T values[8] = {};
  std::memcpy(values, source, static_cast<size_t>(count) * sizeof(T));
  return load(values);
}

inline __m128i to_bfloat16(Vector value) {
  const __m256i bits = _mm256_castps_si256(value);
  const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
  const __m256i rounded =
      _mm256_srli_epi32(_mm256_add_epi32(_mm256_add_epi32(bits, _mm256_set1_epi32(0x7fff)), odd), 16);
  const __m256i is_nan = _mm256_castps_si256(_mm256_cmp_ps(value, value, _CMP_UNORD_Q));
  const __m256i result = _mm256_blendv_epi8(rounded, _mm256_set1_epi32(0x7fc0), is_nan);
  return _mm_packus_epi32(_mm256_castsi256_si128(result), _mm256_extracti128_si256(result, 1));
}

// Keeps a value in a register, where the compiler would read it from memory once for each use.
template <typename Value>
inline void keep_in_register(Value& value) {
  asm("" : "+x"(value));
}

inline void store(float* target, Vector value) {
  _mm256_storeu_ps(target, value);
}

inline void store(BFloat16* target, Vector value) {
  _mm_storeu_si128(reinterpret_cast<__m128i*>(target), to_bfloat16(value));
}

inline void store(Half* target, Vector value) {
  _mm_storeu_si128(reinterpret_cast<__m128i*>(target), _mm256_cvtps_ph(value, _MM_FROUND_TO_NEAREST_INT));
}

inline void store(float* target, Vector value, int64_t count) {
  _mm256_maskstore_ps(target, lanes_between(0, count), value);
}

template <typename T>
inline void store(T* target, Vector value, int64_t count) {
  T values[8];
  store(values, value);
  std::memcpy(target, values, static_cast<size_t>(count) * sizeof(T));
}

inline Vector multiply_add(Vector a, Vector b, Vector c) {
  return _mm256_fmadd_ps(a, b, c);
}

inline Vector maximum(Vector a, Vector b) {
  return _mm256_max_ps(b, a);  // a where either is NaN
}

inline float sum(Vector value) {
  const __m128 four = _mm_add_ps(_mm256_castps256_ps128(value), _mm256_extractf128_ps(value, 1));
  const __m128 two = _mm_add_ps(four, _mm_movehl_ps(four, four));
  return _mm_cvtss_f32(_mm_add_ss(two, _mm_movehdup_ps(two)));
}

inline float largest(Vector value) {
  const __m128 four = _mm_max_ps(_mm256_castps256_ps128(value), _mm256_extractf128_ps(value, 1));
  const __m128 two = _mm_max_ps(four, _mm_movehl_ps(four, four));
  return _mm_cvtss_f32(_mm_max_ss(two, _mm_movehdup_ps(two)));
}

inline Vector fraction(Vector x) {
  return _mm256_sub_ps(x, _mm256_floor_ps(x));
}

inline Vector scale_by_power(Vector value, Vector x) {
  const __m256i whole = _mm256_cvtps_epi32(_mm256_floor_ps(_mm256_min_ps(x, _mm256_set1_ps(127.0f))));
  const __m256i power = _mm256_slli_epi32(_mm256_add_epi32(whole, _mm256_set1_epi32(127)), 23);
  const Vector result = _mm256_mul_ps(value, _mm256_castsi256_ps(power));
  return _mm256_blendv_ps(result, _mm256_setzero_ps(), _mm256_cmp_ps(x, _mm256_set1_ps(-126.0f), _CMP_LT_OQ));
}

inline void transpose(Vector (&rows)[8]) {
  __m256 a[8], b[8];
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    a[2 * i] = _mm256_unpacklo_ps(rows[2 * i], rows[2 * i + 1]);
    a[2 * i + 1] = _mm256_unpackhi_ps(rows[2 * i], rows[2 * i + 1]);
  }
#pragma GCC unroll 2
  for (int i = 0; i < 2; ++i) {
#pragma GCC unroll 2
    for (int j = 0; j < 2; ++j) {
      b[4 * i + 2 * j] = _mm256_shuffle_ps(a[4 * i + j], a[4 * i + 2 + j], 0x44);
      b[4 * i + 2 * j + 1] = _mm256_shuffle_ps(a[4 * i + j], a[4 * i + 2 + j], 0xee);
    }
  }
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    rows[i] = _mm256_permute2f128_ps(b[i], b[4 + i], 0x20);
    rows[4 + i] = _mm256_permute2f128_ps(b[i], b[4 + i], 0x31);
  }
}

// a[0], b[0], a[1], b[1], ...
inline void interleave(Vector a, Vector b, Vector& low, Vector& high) {
  const __m256 even = _mm256_unpacklo_ps(a, b), odd = _mm256_unpackhi_ps(a, b);
  low = _mm256_permute2f128_ps(even, odd, 0x20);
  high = _mm256_permute2f128_ps(even, odd, 0x31);
}

inline Vector sum_fours(Vector a, Vector b, Vector c, Vector d) {
  const __m256 ab = _mm256_add_ps(_mm256_unpacklo_ps(a, b), _mm256_unpackhi_ps(a, b));
  const __m256 cd = _mm256_add_ps(_mm256_unpacklo_ps(c, d), _mm256_unpackhi_ps(c, d));
  return _mm256_add_ps(_mm256_shuffle_ps(ab, cd, 0x44), _mm256_shuffle_ps(ab, cd, 0xee));
}

inline Vector sum_groups(const Vector (&parts)[2]) {
  return _mm256_add_ps(_mm256_permute2f128_ps(parts[0], parts[1], 0x20),
                       _mm256_permute2f128_ps(parts[0], parts[1], 0x31));
}

inline UintVector multiply_high(UintVector a, UintVector b) {
  const __m256i even = _mm256_mul_epu32((__m256i)a, (__m256i)b);
  const __m256i odd = _mm256_mul_epu32(_mm256_srli_epi64((__m256i)a, 32), _mm256_srli_epi64((__m256i)b, 32));
  return (UintVector)_mm256_blend_epi32(_mm256_srli_epi64(even, 32), odd, 0xaa);
}

}  // namespace gpt4fast::cpu::GPT4FAST_LEVEL
