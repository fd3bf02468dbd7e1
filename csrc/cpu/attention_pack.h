#pragma once

// Brings queries, keys and values into the layouts of tile_product.h.

#include <cstdint>

#include "attention_rows.h"
#include "pack_row.h"

namespace gpt4fast::cpu::GPT4FAST_LEVEL {

// A matrix in a tensor: rows at any stride, the numbers of a row at any stride.
template <typename scalar_t>
struct Rows {
  const scalar_t* data;
  int64_t row_stride;
  int64_t stride;
  int64_t columns;
};

// Left operand: rows as they are, (count, padded_depth).
template <typename T, typename scalar_t>
inline void pack_left(Rows<scalar_t> source, int64_t count, T* target) {
  const int64_t width = padded_depth<T>(source.columns);
  for (int64_t row = 0; row < count; ++row) {
    pack_row(source.data + row * source.row_stride, source.stride, source.columns, width, target + row * width);
  }
}

// Right operand of a product over the rows' numbers (query @ key^T): (padded_depth / kDepth, rows, kDepth), kDepth
// numbers of all rows at the distance target_step. Rows past count are zeros in whole vectors and then not written.
// What moves is kDepth numbers at once, in 32 bits.
template <typename T, typename scalar_t>
inline void pack_transposed(Rows<scalar_t> source, int64_t count, T* target,
                            int64_t target_step = kKeyBlock * kDepth<T>) {
  constexpr int64_t kStep = kLanes * kDepth<T>;  // numbers of a row that one vector holds
  const int64_t depth = padded_depth<T>(source.columns);
  for (int64_t key = 0; key < count; key += kLanes) {
    for (int64_t d = 0; d < depth; d += kStep) {
      const int64_t width = least(kStep, depth - d);
      Vector block[kLanes];
      for (int64_t i = 0; i < kLanes; ++i) {
        block[i] = Vector{};
        if (key + i < count) {
          const scalar_t* from = source.data + (key + i) * source.row_stride + d * source.stride;
          const int64_t given = least(kStep, source.columns - d);
          if (source.stride != 1 || given < kStep) {
            T row[kStep];
            pack_row(from, source.stride, given, kStep, row);
            std::memcpy(&block[i], row, sizeof(Vector));
          } else if constexpr (kDepth<T> == 1) {
            block[i] = load(from);
          } else {
            std::memcpy(&block[i], from, sizeof(Vector));
          }
        }
      }
      transpose(block);
      for (int64_t i = 0; i < width / kDepth<T>; ++i) {
        std::memcpy(target + (d / kDepth<T> + i) * target_step + key * kDepth<T>, &block[i], sizeof(Vector));
      }
    }
  }
}

// Right operand of a product over the rows (weights @ value): (height / kDepth, padded_columns, kDepth), rows past
// count are zeros up to height.
template <typename T, typename scalar_t>
inline void pack_right(Rows<scalar_t> source, int64_t count, int64_t height, T* target) {
  const int64_t width = padded_columns(source.columns);
  for (int64_t row = 0; row < height; row += kDepth<T>) {
    for (int64_t d = 0; d < width; d += kLanes) {
      T copies[kDepth<T>][kLanes];
      const T* numbers[kDepth<T>];
      for (int64_t i = 0; i < kDepth<T>; ++i) {
        const scalar_t* from = source.data + (row + i) * source.row_stride + d * source.stride;
        const int64_t given = row + i < count ? least(kLanes, source.columns - d) : 0;
        numbers[i] = copies[i];
        if (source.stride != 1 || given < kLanes) {
          pack_row(from, source.stride, given, kLanes, copies[i]);
        } else if constexpr (sizeof(T) == sizeof(scalar_t)) {
          numbers[i] = from;
        } else {
          store(copies[i], load(from));
        }
      }
      T* to = target + row * width + d * kDepth<T>;
      if constexpr (kDepth<T> == 1) {
        store(to, load(numbers[0]));
      } else {
        store_interleaved(to, numbers[0], numbers[1]);
      }
    }
  }
}

}  // namespace gpt4fast::cpu::GPT4FAST_LEVEL
