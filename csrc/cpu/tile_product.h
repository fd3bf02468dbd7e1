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

template <int kRows, bool kAdd, typename T>
void multiply_columns(LeftOperand<T> a, RightOperand<T> b, int64_t steps, int64_t vectors, float* c, int64_t c_row) {
  // As many equal parts as the registers demand: of 5 vectors 3 and 2, since a part of 1 would wait for its own sums.
  for (int64_t parts = (vectors + kTileVectors - 1) / kTileVectors; parts > 0; --parts) {
    const int64_t count = (vectors + parts - 1) / parts;
    switch (count) {
      case 1: multiply_tile<kRows, 1, kAdd>(a, b, steps, c, c_row); break;
      case 2: multiply_tile<kRows, 2, kAdd>(a, b, steps, c, c_row); break;
      default:
        if constexpr (kTileVectors == 4) {
          if (count == 3) {
            multiply_tile<kRows, 3, kAdd>(a, b, steps, c, c_row);
          } else {
            multiply_tile<kRows, 4, kAdd>(a, b, steps, c, c_row);
          }
        }
    }
    b.data += count * kLanes * Product<T>::kDepth;
    c += count * kLanes;
    vectors -= count;
  }
}

// C (rows <= kTileRows, vectors * kLanes columns) = or, with kAdd, += A @ B over steps * kDepth of depth. The product is
// summed by itself and then added: rounding errors grow with the number of tiles instead of that of their rows.
template <bool kAdd, typename T>
void multiply(int64_t rows, LeftOperand<T> a, RightOperand<T> b, int64_t steps, int64_t vectors, float* c,
              int64_t c_row) {
  switch (rows) {
    case 1: return multiply_columns<1, kAdd>(a, b, steps, vectors, c, c_row);
    case 2: return multiply_columns<2, kAdd>(a, b, steps, vectors, c, c_row);
    case 3: return multiply_columns<3, kAdd>(a, b, steps, vectors, c, c_row);
    case 4: return multiply_columns<4, kAdd>(a, b, steps, vectors, c, c_row);
    case 5: return multiply_columns<5, kAdd>(a, b, steps, vectors, c, c_row);
    default: return multiply_columns<kTileRows, kAdd>(a, b, steps, vectors, c, c_row);
  }
}

}  // namespace gpt4fast::cpu::GPT4FAST_LEVEL
