#pragma once

#include <cstdint>
#include <cstring>

#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

// The level that every processor has. Four lanes in the vector notation that GCC and Clang share; the compiler lowers
// it to what the target's baseline offers (SSE2, NEON, or four scalars), so nothing here names an instruction set.
namespace gpt4fast::simd {

using Vector = float __attribute__((vector_size(16)));
using IntVector = int32_t __attribute__((vector_size(16)));
using UintVector = uint32_t __attribute__((vector_size(16)));
using ShortVector = uint16_t __attribute__((vector_size(8)));

inline constexpr int64_t kLanes = 4;

inline constexpr int64_t round_up(int64_t size) {
  return (size + kLanes - 1) / kLanes * kLanes;
}

inline Vector broadcast(float value) {
  return Vector{value, value, value, value};
}

// Casts between vector types of one size keep the bits.
inline Vector select(IntVector condition, Vector yes, Vector no) {
  return (Vector)((condition & (IntVector)yes) | (~condition & (IntVector)no));
}

inline Vector load(const float* source) {
  Vector result;
  std::memcpy(&result, source, sizeof(result));
  return result;
}

inline Vector load(const torch::headeronly::BFloat16* source) {
  ShortVector bits;
  std::memcpy(&bits, source, sizeof(bits));
  return (Vector)(__builtin_convertvector(bits, UintVector) << 16);
}

inline Vector load(const torch::headeronly::Half* source) {
  ShortVector bits;
  std::memcpy(&bits, source, sizeof(bits));
  const IntVector half = (IntVector) __builtin_convertvector(bits, UintVector);
  const IntVector sign = (half & 0x8000) << 16;
  const IntVector magnitude = (half & 0x7fff) << 13;
  // Moves the exponent from bias 15 to bias 127. Infinity and NaN need the same step once more; subnormal numbers are
  // made normal by adding and taking away the smallest normal number.
  const IntVector normal = magnitude + (112 << 23) + ((magnitude >= 0x0f800000) & (112 << 23));
  const Vector subnormal = (Vector)(magnitude + (113 << 23)) - (Vector)(IntVector{} + (113 << 23));
  return (Vector)((IntVector)select(magnitude < (1 << 23), subnormal, (Vector)normal) | sign);
}

inline void store(float* target, Vector value) {
  std::memcpy(target, &value, sizeof(value));
}

inline Vector multiply_add(Vector a, Vector b, Vector c) {
  return a * b + c;
}

inline Vector maximum(Vector a, Vector b) {
  return select((IntVector)(b > a), b, a);
}

inline float sum(Vector value) {
  return (value[0] + value[2]) + (value[1] + value[3]);
}

inline float largest(Vector value) {
  const float low = value[0] > value[1] ? value[0] : value[1];
  const float high = value[2] > value[3] ? value[2] : value[3];
  return low > high ? low : high;
}

// The sums of the lanes of four vectors.
inline Vector sums(const Vector (&rows)[4]) {
  const auto &a = rows[0], &b = rows[1], &c = rows[2], &d = rows[3];
  const Vector ab = Vector{a[0], b[0], a[1], b[1]} + Vector{a[2], b[2], a[3], b[3]};
  const Vector cd = Vector{c[0], d[0], c[1], d[1]} + Vector{c[2], d[2], c[3], d[3]};
  return Vector{ab[0], ab[1], cd[0], cd[1]} + Vector{ab[2], ab[3], cd[2], cd[3]};
}

// e^x within 2 units in the last place for x in [-87.3, 88]; 0 below, NaN for NaN. Coefficients: Cephes' expf.
inline Vector exp(Vector x) {
  constexpr float kRound = 12582912.0f;  // 1.5 * 2^23: adding it leaves the nearest integer in the low bits
  const Vector shifted = x * 1.44269504088896341f + kRound;
  const Vector count = shifted - kRound;
  const Vector rest = x - count * 0.693359375f + count * 2.12194440e-4f;
  Vector series = rest * 1.9875691500e-4f + 1.3981999507e-3f;
  series = series * rest + 8.3334519073e-3f;
  series = series * rest + 4.1665795894e-2f;
  series = series * rest + 1.6666665459e-1f;
  series = series * rest + 5.0000001201e-1f;
  series = series * rest * rest + rest + 1.0f;
  const Vector power = (Vector)(((UintVector)shifted + 127u) << 23);
  return select((IntVector)(x < -87.3f), Vector{}, series * power);
}

// tanh within 3 units in the last place. Coefficients of the series around 0: Cephes' tanhf.
inline Vector tanh(Vector x) {
  const UintVector sign = (UintVector)x & 0x80000000u;
  const Vector size = (Vector)((UintVector)x & 0x7fffffffu);
  const Vector square = x * x;
  Vector series = square * -5.70498872745e-3f + 2.06390887954e-2f;
  series = series * square - 5.37397155531e-2f;
  series = series * square + 1.33314422036e-1f;
  series = series * square - 3.33332819422e-1f;
  series = series * square * x + x;
  const Vector limited = select((IntVector)(size > 10.0f), broadcast(10.0f), size);
  const Vector far = 1.0f - 2.0f / (exp(limited + limited) + 1.0f);
  return select((IntVector)(size < 0.625f), series, (Vector)((UintVector)far | sign));
}

}  // namespace gpt4fast::simd
