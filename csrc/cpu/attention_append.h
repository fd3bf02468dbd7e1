#pragma once

// Rows on their way into a key-value cache: rotary embedding and conversion to the cache's type.

#include <cstdint>

#include "attention_pack.h"

namespace gpt4fast::cpu::GPT4FAST_LEVEL {

// Rotary embedding (Su et al., 2021) of a row of float32, in place.
inline void rotate(const AttentionDecodeParams& p, int64_t position, float* row) {
  const int64_t half = p.rotary_dim / 2;
  const float* const cos = p.cos + position * half;
  const float* const sin = p.sin + position * half;
  int64_t i = 0;
  if (!p.rotary_interleaved) {
    for (; i + kLanes <= half; i += kLanes) {
      const Vector a = load(row + i), b = load(row + half + i), c = load(cos + i), s = load(sin + i);
      store(row + i, a * c - b * s);
      store(row + half + i, a * s + b * c);
    }
  }
  const int64_t step = p.rotary_interleaved ? 2 : 1, other = p.rotary_interleaved ? 1 : half;
  for (; i < half; ++i) {
    const float a = row[i * step], b = row[i * step + other];
    row[i * step] = a * cos[i] - b * sin[i];
    row[i * step + other] = a * sin[i] + b * cos[i];
  }
}

// Rounds a row to the type of its target.
template <typename cache_t>
inline void store_row(const float* row, int64_t count, cache_t* target, int64_t stride) {
  int64_t i = 0;
  for (; stride == 1 && i + kLanes <= count; i += kLanes) {
    store(target + i, load(row + i));
  }
  for (; i < count; ++i) {
    store(target + i * stride, broadcast(row[i]), 1);
  }
}

// int8 numbers times the scale that is returned stand for the row: the largest becomes 127 or -127, and the others the
// nearest whole numbers, ties to even.
inline float quantize_row(const float* row, int64_t count, int8_t* target, int64_t stride) {
  float largest = 0.0f, zero = 0.0f;  // NaN where a number is infinite or NaN
  for (int64_t i = 0; i < count; ++i) {
    largest = most(largest, __builtin_fabsf(row[i]));
    zero += row[i] * 0.0f;
  }
  float scale = largest / 127.0f;
  scale = scale == 0.0f ? 1.0f : scale;
  for (int64_t i = 0; i < count; ++i) {
    const float shifted = row[i] / scale + 12582912.0f;  // 1.5 * 2^23: the last byte is the rounded number
    std::memcpy(target + i * stride, &shifted, 1);
  }
  return scale + zero;
}

}  // namespace gpt4fast::cpu::GPT4FAST_LEVEL
