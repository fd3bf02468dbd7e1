#pragma once

#include <cstdint>
#include <cstring>

#include "elements.h"

// The level that every processor has, and the interface of all levels. Four lanes in the vector notation that GCC and
// Clang share; the compiler lowers it to what the target's baseline offers (SSE2, NEON, or four scalars), so nothing
// here names an instruction set.
namespace gpt4fast::cpu::GPT4FAST_LEVEL {

using Vector = float __attribute__((vector_size(16)));
using IntVector = int32_t __attribute__((vector_size(16)));
using UintVector = uint32_t __attribute__((vector_size(16)));
using WideVector = uint64_t __attribute__((vector_size(32)));
using ShortVector = uint16_t __attribute__((vector_size(8)));
using ByteVector = int8_t __attribute__((vector_size(4)));
using Mask = IntVector;  // of each lane all bits or none

inline constexpr int64_t kLanes = 4;
inline constexpr int kTileRows = 4;  // accumulators of a tile product: kTileRows x kTileVectors registers
inline constexpr int kTileVectors = 2;

inline Vector broadcast(float value) {
  return Vector{value, value, value, value};
}

// The lanes first <= i < last.
inline Mask lanes_between(int64_t first, int64_t last) {
  const auto limit = [](int64_t lane) { return static_cast<int32_t>(lane < 0 ? 0 : lane > 4 ? 4 : lane); };
  const IntVector lanes = {0, 1, 2, 3};
  return (lanes >= limit(first)) & (lanes < limit(last));
}

inline bool any(Mask mask) {
  return (mask[0] | mask[1] | mask[2] | mask[3]) != 0;
}

// Casts between vector types of one size keep the bits.
inline Vector select(Mask mask, Vector yes, Vector no) {
  return (Vector)((mask & (IntVector)yes) | (~mask & (IntVector)no));
}

inline Mask greater(Vector a, Vector b) {
  return (Mask)(a > b);
}

inline Mask equal(Vector a, Vector b) {
  return (Mask)(a == b);
}

inline Mask at_least(UintVector a, uint32_t b) {
  return (Mask)(a >= b);
}

inline Vector load(const float* source) {
  Vector result;
  std::memcpy(&result, source, sizeof(result));
  return result;
}

inline Vector load(const BFloat16* source) {
  ShortVector bits;
  std::memcpy(&bits, source, sizeof(bits));
  return (Vector)(__builtin_convertvector(bits, UintVector) << 16);
}

inline Vector load(const Half* source) {
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

inline Vector load(const int8_t* source) {
  ByteVector bytes;
  std::memcpy(&bytes, source, sizeof(bytes));
  return __builtin_convertvector(bytes, Vector);
}

// The first count <= kLanes numbers, then zeros; nothing behind them is read.
template <typename T>
inline Vector load(const T* source, int64_t count) {
  T values[4] = {};
  std::memcpy(values, source, static_cast<size_t>(count) * sizeof(T));
  return load(values);
}

// Keeps a value in a register, where the compiler would read it from memory once for each use. No name of one is
// portable.
template <typename Value>
inline void keep_in_register(Value&) {}

inline void store(float* target, Vector value) {
  std::memcpy(target, &value, sizeof(value));
}

// Rounds to nearest, ties to even.
inline void store(BFloat16* target, Vector value) {
  const UintVector bits = (UintVector)value;
  const UintVector rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  const UintVector quiet =
      (UintVector)select((Mask)(value == value), (Vector)rounded, (Vector)(UintVector{} + 0x7fc0u));
  const ShortVector result = __builtin_convertvector(quiet, ShortVector);
  std::memcpy(target, &result, sizeof(result));
}

inline void store(Half* target, Vector value) {
  const UintVector sign = ((UintVector)value >> 16) & 0x8000u;
  const UintVector bits = (UintVector)value & 0x7fffffffu;
  // Normal results drop 13 bits, rounding to even; subnormal ones are rounded by adding a number whose last bit is
  // worth 2^-24; what is too large becomes infinity.
  const UintVector normal = (bits - (112u << 23) + 0xfffu + ((bits >> 13) & 1u)) >> 13;
  const UintVector subnormal = (UintVector)((Vector)bits + 0.5f) - (UintVector)(Vector{} + 0.5f);
  UintVector half = (UintVector)select((Mask)(bits < (113u << 23)), (Vector)subnormal, (Vector)normal);
  half = (UintVector)select((Mask)(bits >= 0x477ff000u), (Vector)(UintVector{} + 0x7c00u), (Vector)half);
  half = (UintVector)select((Mask)(bits > 0x7f800000u), (Vector)(UintVector{} + 0x7e00u), (Vector)half);
  const ShortVector result = __builtin_convertvector(half | sign, ShortVector);
  std::memcpy(target, &result, sizeof(result));
}

template <typename T>
inline void store(T* target, Vector value, int64_t count) {
  T values[4];
  store(values, value);
  std::memcpy(target, values, static_cast<size_t>(count) * sizeof(T));
}

inline Vector multiply_add(Vector a, Vector b, Vector c) {
  return a * b + c;
}

// a where either is NaN.
inline Vector maximum(Vector a, Vector b) {
  return select((Mask)(b > a), b, a);
}

inline float sum(Vector value) {
  return (value[0] + value[2]) + (value[1] + value[3]);
}

inline float largest(Vector value) {
  const float low = value[0] > value[1] ? value[0] : value[1];
  const float high = value[2] > value[3] ? value[2] : value[3];
  return low > high ? low : high;
}

// x - floor(x) for |x| < 2^31.
inline Vector fraction(Vector x) {
  const Vector whole = __builtin_convertvector(__builtin_convertvector(x, IntVector), Vector);
  const Vector rest = x - whole;
  return select(rest < 0.0f, rest + 1.0f, rest);
}

// value * 2^floor(x), 0 where that is less than the smallest normal number.
inline Vector scale_by_power(Vector value, Vector x) {
  const Vector limited = select(x > 127.0f, broadcast(127.0f), x);
  const IntVector whole = __builtin_convertvector(limited - fraction(limited), IntVector);
  const Vector power = (Vector)((whole + 127) << 23);
  return select(x < -126.0f, Vector{}, value * power);
}

// Turns a block of kLanes x kLanes numbers about its diagonal.
inline void transpose(Vector (&rows)[4]) {
  const Vector a = rows[0], b = rows[1], c = rows[2], d = rows[3];
  for (int i = 0; i < 4; ++i) {
    rows[i] = Vector{a[i], b[i], c[i], d[i]};
  }
}

// a[0], b[0], a[1], b[1], ...
inline void interleave(Vector a, Vector b, Vector& low, Vector& high) {
  low = Vector{a[0], b[0], a[1], b[1]};
  high = Vector{a[2], b[2], a[3], b[3]};
}

// Lane i of each group of four: the sum of that group's lanes in a, b, c or d.
inline Vector sum_fours(Vector a, Vector b, Vector c, Vector d) {
  Vector rows[4] = {a, b, c, d};
  transpose(rows);
  return (rows[0] + rows[2]) + (rows[1] + rows[3]);
}

// Group i of the result: the sum of the groups of four lanes of parts[i].
inline Vector sum_groups(const Vector (&parts)[1]) {
  return parts[0];
}

// The upper halves of the 64-bit products.
inline UintVector multiply_high(UintVector a, UintVector b) {
  const WideVector product = __builtin_convertvector(a, WideVector) * __builtin_convertvector(b, WideVector);
  return __builtin_convertvector(product >> 32, UintVector);
}

}  // namespace gpt4fast::cpu::GPT4FAST_LEVEL
