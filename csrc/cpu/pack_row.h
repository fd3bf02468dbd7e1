#pragma once

// Rows of operands in the layouts of tile_product.h.

#include <cstdint>
#include <cstring>

#include "tile_product.h"

namespace gpt4fast::cpu::GPT4FAST_LEVEL {

template <typename T>
inline constexpr int64_t kDepth = Product<T>::kDepth;

// The depth of a product over D numbers, with zeros to whole steps.
template <typename T>
inline constexpr int64_t padded_depth(int64_t depth) {
  return round_up(depth, kDepth<T>);
}

// Columns of a product's result, with zeros to whole vectors.
inline constexpr int64_t padded_columns(int64_t columns) {
  return round_up(columns, kLanes);
}

// Copies a row and fills up with zeros to width. Rows are short: calls of memcpy would take longer than the copy.
template <typename T, typename scalar_t>
inline void pack_row(const scalar_t* source, int64_t stride, int64_t count, int64_t width, T* target) {
  int64_t i = 0;
  for (; stride == 1 && i + kLanes <= count; i += kLanes) {
    if constexpr (sizeof(T) == sizeof(scalar_t)) {
      std::memcpy(target + i, source + i, kLanes * sizeof(T));
    } else {
      store(target + i, load(source + i));
    }
  }
  for (; i < count; ++i) {
    if constexpr (sizeof(T) == sizeof(scalar_t)) {
      std::memcpy(target + i, source + i * stride, sizeof(T));
    } else {
      target[i] = to_float(source + i * stride);
    }
  }
  for (; i < width; ++i) {
    target[i] = T{};
  }
}

}  // namespace gpt4fast::cpu::GPT4FAST_LEVEL
