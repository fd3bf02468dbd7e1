#pragma once

// Products of a few query rows with keys and values as they lie in a cache. Each key and value is read from memory once
// for several query rows, and nothing is packed. Rows of a cache are given by their addresses, so that a paged cache is
// no different. While one list of rows is multiplied, the next (`ahead`) is brought into the caches.

#include <cstdint>

#include "tile_product.h"

namespace gpt4fast::cpu::GPT4FAST_LEVEL {

inline constexpr int kRegisters = kTileVectors == 4 ? 32 : 16;
inline constexpr int kDotRows = kTileRows * kTileVectors / 4;  // of a block of products with keys, for 4 keys at once

template <int kNumber>
struct Constant {
  static constexpr int value = kNumber;
};

// Calls use(Constant<rows>, first) for blocks of at most kMost rows, as equal as possible.
template <int kMost, typename Use>
inline void for_each_block(int64_t rows, Use use) {
  int64_t first = 0;
  for (int64_t blocks = (rows + kMost - 1) / kMost; blocks > 0; --blocks) {
    const int64_t count = (rows - first + blocks - 1) / blocks;
    switch (count) {
      case 1: use(Constant<1>{}, first); break;
      case 2: use(Constant<2>{}, first); break;
      case 3: use(Constant<least(3, kMost)>{}, first); break;
      case 4: use(Constant<least(4, kMost)>{}, first); break;
      case 5: use(Constant<least(5, kMost)>{}, first); break;
      default: use(Constant<least(6, kMost)>{}, first);
    }
    first += count;
  }
}

// kLanes * kDepth numbers of a row, or the first count and zeros, as T is multiplied.
template <typename T, typename cache_t, typename... Count>
[[gnu::always_inline]] inline auto read(const cache_t* source, Count... count) {
  if constexpr (Product<T>::kDepth == 1) {
    return load(source, count...);
  } else {
    return load_pairs(source, count...);
  }
}

// Scores (kRows, kLanes) = queries (kRows, depth) @ keys^T (kLanes, dim); behind dim the queries are zeros. Sums run
// along the vectors; those of four keys at a time are then turned into lanes.
template <int kRows, typename T, typename cache_t>
void multiply_keys(const T* queries, int64_t depth, const cache_t* const* keys, const cache_t* const* ahead,
                   int64_t dim, float* scores, int64_t scores_row) {
  constexpr int64_t kStep = kLanes * Product<T>::kDepth;
  constexpr int kKeys = [] {  // at once: accumulators, one vector of each query and one of a key must fit
    int keys = static_cast<int>(kLanes);
    while (keys > 4 && kRows * (keys + 1) + 1 > kRegisters) {
      keys /= 2;
    }
    return keys;
  }();
  Vector parts[kRows][kLanes / 4];
#pragma GCC unroll 4
  for (int first = 0; first < kLanes; first += kKeys) {
    Vector sums[kRows][kKeys] = {};
    const auto add = [&](int64_t d, auto... count) __attribute__((always_inline)) {
      decltype(Product<T>::load(nullptr)) query[kRows];
#pragma GCC unroll 8
      for (int row = 0; row < kRows; ++row) {
        query[row] = Product<T>::load(queries + row * depth + d);
      }
#pragma GCC unroll 16
      for (int k = 0; k < kKeys; ++k) {
        const auto key = read<T>(keys[first + k] + d, count...);
        __builtin_prefetch(ahead[first + k] + d);
#pragma GCC unroll 8
        for (int row = 0; row < kRows; ++row) {
          sums[row][k] = Product<T>::add(query[row], key, sums[row][k]);
        }
      }
    };
    int64_t d = 0;
    for (; d + kStep <= dim; d += kStep) {
      add(d);
    }
    if (d < dim) {
      add(d, dim - d);
    }
#pragma GCC unroll 8
    for (int row = 0; row < kRows; ++row) {
#pragma GCC unroll 4
      for (int k = 0; k < kKeys; k += 4) {
        parts[row][(first + k) / 4] = sum_fours(sums[row][k], sums[row][k + 1], sums[row][k + 2], sums[row][k + 3]);
      }
    }
  }
#pragma GCC unroll 8
  for (int row = 0; row < kRows; ++row) {
    store(scores + row * scores_row, sum_groups(parts[row]));
  }
}

// A list of a cache's rows to be multiplied, and the weights of each query row for them, weights_row numbers apart.
template <typename T, typename cache_t>
struct Weighted {
  const cache_t* const* values;
  const cache_t* const* ahead;
  int64_t count;
  const T* weights;
  int64_t weights_row;
};

// Out (kRows, kVectors * kLanes) += weights (kRows, count) @ values (count, ...) from a column on; with `given`, only
// that many columns are there.
template <int kRows, int kVectors, typename T, typename cache_t, typename... Given>
void add_value_tile(Weighted<T, cache_t> x, int64_t column, float* out, int64_t out_row, Given... given) {
  constexpr int kDepth = static_cast<int>(Product<T>::kDepth), kParts = kVectors / kDepth;
  constexpr int64_t kStep = kLanes * kDepth;
  Vector sums[kRows][kParts][kDepth];
#pragma GCC unroll 8
  for (int row = 0; row < kRows; ++row) {
#pragma GCC unroll 8
    for (int part = 0; part < kParts; ++part) {
      if constexpr (kDepth == 1) {
        sums[row][part][0] = load(out + row * out_row + part * kStep);
      } else {
        load_paired(out + row * out_row + part * kStep, sums[row][part]);
      }
    }
  }
  const auto add = [&](int64_t k, bool has_second) __attribute__((always_inline)) {
    decltype(Product<T>::load(nullptr)) right[kParts][kDepth];
#pragma GCC unroll 8
    for (int part = 0; part < kParts; ++part) {
      const int64_t d = column + part * kStep;
      __builtin_prefetch(x.ahead[k] + d);
      if constexpr (kDepth == 1) {
        right[part][0] = read<T>(x.values[k] + d, given...);
      } else {
        const auto first = read<T>(x.values[k] + d, given...);
        auto second = first;
        if (has_second) {
          __builtin_prefetch(x.ahead[k + 1] + d);
          second = read<T>(x.values[k + 1] + d, given...);
        } else {
          second = decltype(second){};
        }
        pair_rows(first, second, right[part]);
      }
    }
#pragma GCC unroll 8
    for (int row = 0; row < kRows; ++row) {
      const auto left = Product<T>::broadcast(x.weights + row * x.weights_row + k);
#pragma GCC unroll 8
      for (int part = 0; part < kParts; ++part) {
#pragma GCC unroll 2
        for (int i = 0; i < kDepth; ++i) {
          sums[row][part][i] = Product<T>::add(left, right[part][i], sums[row][part][i]);
        }
      }
    }
  };
  int64_t k = 0;
  for (; k + kDepth <= x.count; k += kDepth) {
    add(k, true);
  }
  if (k < x.count) {
    add(k, false);
  }
#pragma GCC unroll 8
  for (int row = 0; row < kRows; ++row) {
#pragma GCC unroll 8
    for (int part = 0; part < kParts; ++part) {
      if constexpr (kDepth == 1) {
        store(out + row * out_row + part * kStep, sums[row][part][0]);
      } else {
        store_paired(out + row * out_row + part * kStep, sums[row][part]);
      }
    }
  }
}

inline constexpr int widest_tile(int rows) {
  int vectors = 8;
  while ((rows + 1) * vectors + 1 > kRegisters) {
    vectors /= 2;
  }
  return vectors;
}

// Out (kRows, columns) += weights (kRows, count) @ values (count, columns). Out is padded to whole kLanes * kDepth.
template <int kRows, int kVectors, typename T, typename cache_t>
void add_values(Weighted<T, cache_t> x, int64_t columns, float* out, int64_t out_row, int64_t column = 0) {
  for (; column + kVectors * kLanes <= columns; column += kVectors * kLanes) {
    add_value_tile<kRows, kVectors>(x, column, out + column, out_row);
  }
  if constexpr (kVectors > Product<T>::kDepth) {
    add_values<kRows, kVectors / 2>(x, columns, out, out_row, column);
  } else if (column < columns) {
    add_value_tile<kRows, kVectors>(x, column, out + column, out_row, columns - column);
  }
}

}  // namespace gpt4fast::cpu::GPT4FAST_LEVEL
