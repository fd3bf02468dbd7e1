#pragma once

// Products of a few query rows with keys and values as they lie in a cache. Each key and value is read from memory once
// for several query rows, and nothing is packed. Instructions are few for each cache line, because a processor runs
// only so many ahead while it waits for memory.

#include <cstdint>

#include "attention_cache.h"
#include "tile_product.h"

namespace gpt4fast::cpu::GPT4FAST_LEVEL {

inline constexpr int kRegisters = kTileVectors == 4 ? 32 : 16;
inline constexpr int kDotRows = kTileRows * kTileVectors / 4;  // of a block of products with keys, for 4 keys at once
inline constexpr int64_t kCacheLine = 64;

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

// Whether row[d] begins a cache line, if the row does: one of the vectors in each line fetches the one ahead.
template <typename cache_t>
[[gnu::always_inline]] inline constexpr bool begins_line(int64_t d) {
  return d * static_cast<int64_t>(sizeof(cache_t)) % kCacheLine == 0;
}

// Scores (kRows, keys.count) = queries (kRows, depth) @ keys^T. The count is a multiple of kLanes; behind dim the
// queries are zeros; kSteps vectors make up dim, where that is not 0. Sums run along the vectors; those of four keys at
// a time are then turned into lanes.
template <int kRows, int kSteps, typename T, typename cache_t>
void multiply_keys(const T* queries, int64_t depth, const Run<const cache_t>& keys, int64_t dim, float* scores,
                   int64_t scores_row) {
  using Register = decltype(Product<T>::load(nullptr));
  constexpr int64_t kStep = kLanes * Product<T>::kDepth;
  Register kept[most(kSteps, 1)][kRows];
  for (int step = 0; step < kSteps; ++step) {
    for (int row = 0; row < kRows; ++row) {
      kept[step][row] = Product<T>::load(queries + row * depth + step * kStep);
    }
  }
  const cache_t* data = keys.data;
  const int64_t stride = keys.stride, ahead = keys.ahead;
  for (int64_t first = 0; first < keys.count; first += kLanes) {
    Vector parts[kRows][kLanes / 4];
    for (int part = 0; part < kLanes / 4; ++part) {
      Vector sums[kRows][4] = {};
      const cache_t* key[4];
      for (int k = 0; k < 4; ++k) {
        key[k] = data + k * stride;
      }
      data += 4 * stride;
      const auto add = [&](const Register(&query)[kRows], int64_t d, auto... count) __attribute__((always_inline)) {
#pragma GCC unroll 4
        for (int k = 0; k < 4; ++k) {
          const Register numbers = read<T>(key[k] + d, count...);
          if (begins_line<cache_t>(d)) {
            __builtin_prefetch(key[k] + ahead + d);
          }
#pragma GCC unroll 8
          for (int row = 0; row < kRows; ++row) {
            sums[row][k] = Product<T>::add(query[row], numbers, sums[row][k]);
          }
        }
      };
      if constexpr (kSteps > 0) {
#pragma GCC unroll 8
        for (int step = 0; step < kSteps; ++step) {
          add(kept[step], step * kStep);
        }
      } else {
        const auto add_at = [&](int64_t d, auto... count) __attribute__((always_inline)) {
          Register query[kRows];
#pragma GCC unroll 8
          for (int row = 0; row < kRows; ++row) {
            query[row] = Product<T>::load(queries + row * depth + d);
          }
          add(query, d, count...);
        };
        int64_t d = 0;
        for (; d + kStep <= dim; d += kStep) {
          add_at(d);
        }
        if (d < dim) {
          add_at(d, dim - d);
        }
      }
#pragma GCC unroll 8
      for (int row = 0; row < kRows; ++row) {
        parts[row][part] = sum_fours(sums[row][0], sums[row][1], sums[row][2], sums[row][3]);
      }
    }
#pragma GCC unroll 8
    for (int row = 0; row < kRows; ++row) {
      store(scores + row * scores_row + first, sum_groups(parts[row]));
    }
  }
}

template <int kRows, typename T, typename cache_t>
void multiply_keys(const T* queries, int64_t depth, const Run<const cache_t>& keys, int64_t dim, float* scores,
                   int64_t scores_row) {
  constexpr int kStep = static_cast<int>(kLanes * Product<T>::kDepth);
  const auto fits = [](int steps) { return kRows * (steps + 4) + 1 < kRegisters; };
  if constexpr (fits(64 / kStep)) {
    if (dim == 64) {
      return multiply_keys<kRows, 64 / kStep>(queries, depth, keys, dim, scores, scores_row);
    }
  }
  if constexpr (fits(128 / kStep)) {
    if (dim == 128) {
      return multiply_keys<kRows, 128 / kStep>(queries, depth, keys, dim, scores, scores_row);
    }
  }
  multiply_keys<kRows, 0>(queries, depth, keys, dim, scores, scores_row);
}

// Out (kRows, kVectors * kLanes) += weights (kRows, values.count) @ values, from a column of them on; with `given`,
// only that many columns are there.
template <int kRows, int kVectors, typename T, typename cache_t, typename... Given>
void add_columns(const T* weights, int64_t weights_row, const Run<const cache_t>& values, int64_t column, float* out,
                 int64_t out_row, Given... given) {
  constexpr int kDepth = static_cast<int>(Product<T>::kDepth), kParts = kVectors / kDepth;
  constexpr int64_t kStep = kLanes * kDepth;
  constexpr int kSets = most(1, least(4, 8 / (kRows * kVectors)));  // of sums: an addition waits for the one before
  Vector sums[kSets][kRows][kParts][kDepth] = {};
#pragma GCC unroll 8
  for (int row = 0; row < kRows; ++row) {
#pragma GCC unroll 8
    for (int part = 0; part < kParts; ++part) {
      const float* from = out + row * out_row + part * kStep;
      if constexpr (kDepth == 1) {
        sums[0][row][part][0] = load(from);
      } else {
        load_paired(from, sums[0][row][part]);
      }
    }
  }
  const cache_t* data = values.data + column;
  const int64_t stride = values.stride, count = values.count, ahead = values.ahead;
  const auto add = [&](int64_t k, bool has_second, int set) __attribute__((always_inline)) {
    decltype(Product<T>::load(nullptr)) right[kParts][kDepth];
#pragma GCC unroll 8
    for (int part = 0; part < kParts; ++part) {
      const bool fetches = begins_line<cache_t>(part * kStep);
      if (fetches) {
        __builtin_prefetch(data + part * kStep + ahead);
      }
      const auto first = read<T>(data + part * kStep, given...);
      if constexpr (kDepth == 1) {
        right[part][0] = first;
      } else {
        auto second = decltype(first + first){};
        if (has_second) {
          if (fetches) {
            __builtin_prefetch(data + stride + part * kStep + ahead);
          }
          second = read<T>(data + stride + part * kStep, given...);
        }
        pair_rows(first, second, right[part]);
      }
    }
#pragma GCC unroll 8
    for (int row = 0; row < kRows; ++row) {
      const auto left = Product<T>::broadcast(weights + row * weights_row + k);
#pragma GCC unroll 8
      for (int part = 0; part < kParts; ++part) {
#pragma GCC unroll 2
        for (int i = 0; i < kDepth; ++i) {
          sums[set][row][part][i] = Product<T>::add(left, right[part][i], sums[set][row][part][i]);
        }
      }
    }
    data += kDepth * stride;
  };
  int64_t k = 0;
  for (; k + kSets * kDepth <= count; k += kSets * kDepth) {
#pragma GCC unroll 4
    for (int set = 0; set < kSets; ++set) {
      add(k + set * kDepth, true, set);
    }
  }
  for (; k < count; k += kDepth) {
    add(k, k + kDepth <= count, 0);
  }
#pragma GCC unroll 8
  for (int row = 0; row < kRows; ++row) {
#pragma GCC unroll 8
    for (int part = 0; part < kParts; ++part) {
#pragma GCC unroll 4
      for (int set = 1; set < kSets; ++set) {
#pragma GCC unroll 2
        for (int i = 0; i < kDepth; ++i) {
          sums[0][row][part][i] = sums[0][row][part][i] + sums[set][row][part][i];
        }
      }
      float* to = out + row * out_row + part * kStep;
      if constexpr (kDepth == 1) {
        store(to, sums[0][row][part][0]);
      } else {
        store_paired(to, sums[0][row][part]);
      }
    }
  }
}

// The most vectors, a power of 2, whose sums for the rows fit in the registers with the vectors themselves.
inline constexpr int widest_tile(int rows) {
  int vectors = 8;
  while ((rows + 1) * vectors + 1 > kRegisters) {
    vectors /= 2;
  }
  return vectors;
}

// Out (kRows, columns) += weights (kRows, values.count) @ values (values.count, columns), from a column on. Out is
// padded to whole kLanes * kDepth.
template <int kRows, int kVectors, typename T, typename cache_t>
void add_values(const T* weights, int64_t weights_row, const Run<const cache_t>& values, int64_t column,
                int64_t columns, float* out, int64_t out_row) {
  constexpr int64_t kWidth = kVectors * kLanes;
  for (; column + kWidth <= columns; column += kWidth) {
    add_columns<kRows, kVectors>(weights, weights_row, values, column, out + column, out_row);
  }
  if constexpr (kVectors > Product<T>::kDepth) {
    add_values<kRows, kVectors / 2>(weights, weights_row, values, column, columns, out, out_row);
  } else if (column < columns) {
    add_columns<kRows, kVectors>(weights, weights_row, values, column, out + column, out_row, columns - column);
  }
}

}  // namespace gpt4fast::cpu::GPT4FAST_LEVEL
