#pragma once

// The product of tile_product.h for rows that lie anywhere: rows of C gain those of A @ B. A convolution is made of it,
// whose rows are pixels. Separate, since code that addresses six rows by one stride is 3% faster for attention.

#include <cstdint>

#include "tile_product.h"

namespace gpt4fast::cpu::GPT4FAST_LEVEL {

// Where a row of A and one of C begin, in elements.
struct RowPlace {
  int64_t left, sums;
};

// Which rows of C gain row i of A @ B: that at places[i].sums alone, ...
struct OneTarget {
  template <typename Use>
  [[gnu::always_inline]] void each(Use use) const {
    use(int64_t{0});
  }
};

// ... or those at so many distances from it.
struct Targets {
  int64_t count, distances[8];

  template <typename Use>
  [[gnu::always_inline]] void each(Use use) const {
    for (int64_t i = 0; i < count; ++i) {
      use(distances[i]);
    }
  }
};

template <int kRows, int kVectors, typename T, typename To>
[[gnu::always_inline]] inline void add_placed_tile(const T* a, const RowPlace* places, const T* b, int64_t steps,
                                                   float* c, const To& targets) {
  constexpr int64_t kDepth = Product<T>::kDepth;
  const T* left[kRows];
  Vector sums[kRows][kVectors];
#pragma GCC unroll 8
  for (int row = 0; row < kRows; ++row) {
    left[row] = a + places[row].left;
#pragma GCC unroll 8
    for (int v = 0; v < kVectors; ++v) {
      sums[row][v] = Vector{};
    }
  }
  for (int64_t step = 0; step < steps; ++step) {
    decltype(Product<T>::load(nullptr)) right[kVectors];
#pragma GCC unroll 8
    for (int v = 0; v < kVectors; ++v) {
      right[v] = Product<T>::load(b + (step * kVectors + v) * kLanes * kDepth);
    }
#pragma GCC unroll 8
    for (int row = 0; row < kRows; ++row) {
      const auto value = Product<T>::broadcast(left[row] + step * kDepth);
#pragma GCC unroll 8
      for (int v = 0; v < kVectors; ++v) {
        sums[row][v] = Product<T>::add(value, right[v], sums[row][v]);
      }
    }
  }
#pragma GCC unroll 8
  for (int row = 0; row < kRows; ++row) {
    targets.each([&](int64_t distance) {
      float* to = c + places[row].sums + distance;
#pragma GCC unroll 8
      for (int v = 0; v < kVectors; ++v) {
        store(to + v * kLanes, load(to + v * kLanes) + sums[row][v]);
      }
    });
  }
}

template <int kVectors, typename T, typename To>
void add_placed_rows(int64_t count, const T* a, const RowPlace* places, const T* b, int64_t steps, float* c,
                     const To& targets) {
  for (; count >= kTileRows; count -= kTileRows, places += kTileRows) {
    add_placed_tile<kTileRows, kVectors>(a, places, b, steps, c, targets);
  }
  switch (count) {
    case 1: return add_placed_tile<1, kVectors>(a, places, b, steps, c, targets);
    case 2: return add_placed_tile<2, kVectors>(a, places, b, steps, c, targets);
    case 3: return add_placed_tile<3, kVectors>(a, places, b, steps, c, targets);
    default:
      if constexpr (kTileRows == 6) {
        if (count == 4) {
          add_placed_tile<4, kVectors>(a, places, b, steps, c, targets);
        } else if (count == 5) {
          add_placed_tile<5, kVectors>(a, places, b, steps, c, targets);
        }
      }
  }
}

// C's placed rows += A's placed rows @ B (steps, vectors * kLanes, kDepth). vectors is at most kTileVectors. The
// product is summed by itself and then added: rounding errors grow with steps instead of all that is added up.
template <typename T, typename To = OneTarget>
void add_product(int64_t vectors, int64_t count, const T* a, const RowPlace* places, const T* b, int64_t steps,
                 float* c, const To& targets = {}) {
  switch (vectors) {
    case 1: return add_placed_rows<1>(count, a, places, b, steps, c, targets);
    case 2: return add_placed_rows<2>(count, a, places, b, steps, c, targets);
    default:
      if constexpr (kTileVectors == 4) {
        if (vectors == 3) {
          add_placed_rows<3>(count, a, places, b, steps, c, targets);
        } else {
          add_placed_rows<4>(count, a, places, b, steps, c, targets);
        }
      }
  }
}

}  // namespace gpt4fast::cpu::GPT4FAST_LEVEL
