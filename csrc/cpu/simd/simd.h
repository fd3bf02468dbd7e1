#pragma once

// The vector operations that kernels are written in. A kernel's source is compiled once for each CPU level, with that
// level's instructions, header and namespace: CMakeLists.txt sets GPT4FAST_LEVEL and GPT4FAST_SIMD. What a kernel
// includes must therefore be constexpr, or in a namespace of its level: see elements.h.
#include GPT4FAST_SIMD

#include <cstdint>
#include <limits>

namespace gpt4fast::cpu::GPT4FAST_LEVEL {

inline constexpr float kInfinity = std::numeric_limits<float>::infinity();

inline constexpr float kRamp[16] = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};

inline constexpr int64_t round_up(int64_t size, int64_t multiple) {
  return (size + multiple - 1) / multiple * multiple;
}

template <typename T>
inline constexpr T least(T a, T b) {
  return b < a ? b : a;
}

template <typename T>
inline constexpr T most(T a, T b) {
  return a < b ? b : a;
}

template <typename T>
inline float to_float(const T* source) {
  return load(source, 1)[0];
}

inline int64_t divide_down(int64_t a, int64_t b) {
  return a >= 0 ? a / b : -((-a + b - 1) / b);
}

inline int64_t divide_up(int64_t a, int64_t b) {
  return -divide_down(-a, b);
}

// The first count numbers, as many as a vector holds.
template <typename T>
inline Vector load_part(const T* source, int64_t count) {
  return count >= kLanes ? load(source) : load(source, count);
}

template <typename T>
inline void store_part(T* target, Vector value, int64_t count) {
  if (count >= kLanes) {
    store(target, value);
  } else {
    store(target, value, count);
  }
}

// The first count numbers at any stride, as many as a vector holds, then zeros.
template <typename T>
inline Vector read_vector(const T* source, int64_t stride, int64_t count) {
  if (stride == 1) {
    return load_part(source, count);
  }
  float values[kLanes] = {};
  for (int64_t i = 0; i < least(count, kLanes); ++i) {
    values[i] = to_float(source + i * stride);
  }
  return load(values);
}

// 2^x as a polynomial of the fraction of x times 2^floor(x). The coefficients are minimax for the relative error among
// polynomials that are 1 at 0 and 2 at 1: 3.4e-6 with kDegree 4, enough for what is rounded to bfloat16 next, and
// 9.3e-8 with 5.
template <int kDegree>
inline Vector exp2(Vector x) {
  static_assert(kDegree == 4 || kDegree == 5);
  const Vector f = fraction(x);
  Vector series;
  if constexpr (kDegree == 4) {
    series = multiply_add(broadcast(1.355574723e-02f), f, broadcast(5.203236901e-02f));
    series = multiply_add(series, f, broadcast(2.413797629e-01f));
    series = multiply_add(series, f, broadcast(6.930321208e-01f));
  } else {
    series = multiply_add(broadcast(1.879318648e-03f), f, broadcast(8.990995096e-03f));
    series = multiply_add(series, f, broadcast(5.581867596e-02f));
    series = multiply_add(series, f, broadcast(2.401592715e-01f));
    series = multiply_add(series, f, broadcast(6.931517388e-01f));
  }
  return scale_by_power(multiply_add(series, f, broadcast(1.0f)), x);
}

// tanh within 3 units in the last place. Coefficients of the series around 0: Cephes' tanhf.
inline Vector tanh(Vector x) {
  const Vector square = x * x;
  Vector series = multiply_add(square, broadcast(-5.70498872745e-3f), broadcast(2.06390887954e-2f));
  series = multiply_add(series, square, broadcast(-5.37397155531e-2f));
  series = multiply_add(series, square, broadcast(1.33314422036e-1f));
  series = multiply_add(series, square, broadcast(-3.33332819422e-1f));
  series = multiply_add(series * square, x, x);
  const Vector one = broadcast(1.0f);
  const Vector size = maximum(x, Vector{} - x);
  const Vector power = exp2<5>(size * 2.885390082f);  // e^(2 size)
  const Vector far = one - broadcast(2.0f) / (power + one);
  const Vector signed_far = select(greater(Vector{}, x), Vector{} - far, far);
  return select(greater(broadcast(0.625f), size), series, signed_far);
}

}  // namespace gpt4fast::cpu::GPT4FAST_LEVEL

namespace gpt4fast::cpu {
namespace simd = GPT4FAST_LEVEL;
}
