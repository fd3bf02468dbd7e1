#pragma once

// The matrix product that attention is made of: C (rows, columns) = A (rows, depth) @ B (depth, columns), float32 sums,
// for operands that fit in the caches. A tile of C stays in registers while the depth runs.

#include <cstdint>

#include "simd/simd.h"

namespace gpt4fast::cpu::GPT4FAST_LEVEL {

// How a type is multiplied. B lies in memory as (depth / kDepth, columns, kDepth), so that one vector holds kDepth
// steps of kLanes columns; kDepth steps of a row of A are neighbours too. A depth that is no multiple of kDepth is
// padded with zeros in both.
template <typename T>
struct Product;

template <>
struct Product<float> {
  static constexpr int64_t kDepth = 1;

  static Vector load(const float* b) { return GPT4FAST_LEVEL::load(b); }
  static Vector broadcast(const float* a) { return GPT4FAST_LEVEL::broadcast(*a); }
  static Vector add(Vector a, Vector b, Vector sum) { return multiply_add(a, b, sum); }
};

#if GPT4FAST_HAS_BFLOAT16_PRODUCTS
template <>
struct Product<BFloat16> {
  static constexpr int64_t kDepth = 2;

  static __m512bh load(const BFloat16* b) { return load_pairs(b); }
  static __m512bh broadcast(const BFloat16* a) { return broadcast_pair(a); }
  static Vector add(__m512bh a, __m512bh b, Vector sum) { return multiply_add_pairs(a, b, sum); }
};
#endif

// What a tensor of T is multiplied as at this level: bfloat16 itself where the processor can, else float32.
template <typename T>
struct ComputeType {
  using Type = float;
};

#if GPT4FAST_HAS_BFLOAT16_PRODUCTS
template <>
struct ComputeType<BFloat16> {
  using Type = BFloat16;
};
#endif

template <typename T>
using Compute = typename ComputeType<T>::Type;

// A as it lies in memory: the strides, in elements, from one row to the next and from kDepth steps to the next kDepth.
template <typename T>
struct LeftOperand {
  const T* data;
  int64_t row;
  int64_t step;
};

template <typename T>
struct RightOperand {
  const T* data;
  int64_t step;  // from kDepth steps to the next: columns * kDepth
};

template <int kRows, int kVectors, bool kAdd, typename T>
[[gnu::always_inline]] inline void multiply_tile(LeftOperand<T> a, RightOperand<T> b, int64_t steps, float* c,
                                                 int64_t c_row) {
  Vector sums[kRows][kVectors];
#pragma GCC unroll 8
  for (int row = 0; row < kRows; ++row) {
#pragma GCC unroll 8
    for (int v = 0; v < kVectors; ++v) {
      sums[row][v] = Vector{};
    }
  }
  for (int64_t step = 0; step < steps; ++step) {
    decltype(Product<T>::load(nullptr)) right[kVectors];
#pragma GCC unroll 8
    for (int v = 0; v < kVectors; ++v) {
      right[v] = Product<T>::load(b.data + step * b.step + v * kLanes * Product<T>::kDepth);
    }
#pragma GCC unroll 8
    for (int row = 0; row < kRows; ++row) {
      const auto left = Product<T>::broadcast(a.data + row * a.row + step * a.step);
#pragma GCC unroll 8
      for (int v = 0; v < kVectors; ++v) {
        sums[row][v] = Product<T>::add(left, right[v], sums[row][v]);
      }
    }
  }
#pragma GCC unroll 8
  for (int row = 0; row < kRows; ++row) {
#pragma GCC unroll 8
    for (int v = 0; v < kVectors; ++v) {
      float* to = c + row * c_row + v * kLanes;
      store(to, kAdd ? load(to) + sums[row][v] : sums[row][v]);
    }
  }
}

// Tiles below one another share the right operand, and the call: that takes as long as an eighth of a small tile.
template <int kVectors, bool kAdd, typename T>
void multiply_rows(int64_t rows, LeftOperand<T> a, RightOperand<T> b, int64_t steps, float* c, int64_t c_row) {
  for (; rows >= kTileRows; rows -= kTileRows) {
    multiply_tile<kTileRows, kVectors, kAdd>(a, b, steps, c, c_row);
    a.data += kTileRows * a.row;
    c += kTileRows * c_row;
  }
  switch (rows) {
    case 1: return multiply_tile<1, kVectors, kAdd>(a, b, steps, c, c_row);
    case 2: return multiply_tile<2, kVectors, kAdd>(a, b, steps, c, c_row);
    case 3: return multiply_tile<3, kVectors, kAdd>(a, b, steps, c, c_row);
    default:
      if constexpr (kTileRows == 6) {
        if (rows == 4) {
          multiply_tile<4, kVectors, kAdd>(a, b, steps, c, c_row);
        } else if (rows == 5) {
          multiply_tile<5, kVectors, kAdd>(a, b, steps, c, c_row);
        }
      }
  }
}

// C (rows, vectors * kLanes columns) = or, with kAdd, += A @ B over steps * kDepth of depth. The product is summed by
// itself and then added: rounding errors grow with the number of tiles instead of that of their rows.
template <bool kAdd, typename T>
void multiply(int64_t rows, LeftOperand<T> a, RightOperand<T> b, int64_t steps, int64_t vectors, float* c,
              int64_t c_row) {
  // As many equal parts as the registers demand: of 5 vectors 3 and 2, since a part of 1 would wait for its own sums.
  for (int64_t parts = (vectors + kTileVectors - 1) / kTileVectors; parts > 0; --parts) {
    const int64_t count = (vectors + parts - 1) / parts;
    switch (count) {
      case 1: multiply_rows<1, kAdd>(rows, a, b, steps, c, c_row); break;
      case 2: multiply_rows<2, kAdd>(rows, a, b, steps, c, c_row); break;
      default:
        if constexpr (kTileVectors == 4) {
          if (count == 3) {
            multiply_rows<3, kAdd>(rows, a, b, steps, c, c_row);
          } else {
            multiply_rows<4, kAdd>(rows, a, b, steps, c, c_row);
          }
        }
    }
    b.data += count * kLanes * Product<T>::kDepth;
    c += count * kLanes;
    vectors -= count;
  }
}

}  // namespace gpt4fast::cpu::GPT4FAST_LEVEL
