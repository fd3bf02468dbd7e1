#pragma once

// The two matrix products of attention on one block of queries and keys: scores = query @ key^T and out = probabilities
// @ value. The accumulators stay in registers; keys and values are read as they lie in memory or from a float copy.

#include <algorithm>
#include <cstdint>

#include "simd/scalar.h"

namespace gpt4fast::cpu {

using simd::broadcast;
using simd::kLanes;
using simd::load;
using simd::multiply_add;
using simd::round_up;
using simd::store;
using simd::Vector;

inline constexpr int64_t kQueryBlock = 32;  // rows; with kKeyBlock keys of 64 floats the scratch memory fits in L2
inline constexpr int64_t kKeyBlock = 64;

// One query row of a block.
struct Row {
  int64_t position;      // among the keys
  int64_t begin, end;    // keys that causality, window, starts and lengths leave visible
  int64_t head, query;   // (Hq, Lq)
  float slope;           // ALiBi
  float maximum, total;  // of the keys so far
  int64_t first, last;   // columns of the present key block inside [begin, end)
};

// A (rows, columns) tile in memory: row stride in elements, columns adjacent.
template <typename T>
struct Tile {
  const T* data;
  int64_t stride;
};

template <typename scalar_t>
void copy_tile(const scalar_t* source, const int64_t* strides, int64_t rows, int64_t columns, float* target) {
  const int64_t width = round_up(columns);
  for (int64_t row = 0; row < rows; ++row) {
    const scalar_t* from = source + row * strides[0];
    float* to = target + row * width;
    int64_t column = 0;
    if (strides[1] == 1) {
      for (; column + kLanes <= columns; column += kLanes) {
        store(to + column, load(from + column));
      }
    }
    for (; column < columns; ++column) {
      to[column] = static_cast<float>(from[column * strides[1]]);
    }
    std::fill(to + columns, to + width, 0.0f);
  }
}

// scores[row][key] = query[row] . key[key] for kRows rows and 4 keys.
template <int kRows, typename T>
inline void score_four(const float* query, int64_t width, const T* const (&keys)[4], float* scores) {
  Vector sum_of[kRows][4] = {};
  for (int64_t d = 0; d < width; d += kLanes) {
    for (int k = 0; k < 4; ++k) {
      const Vector key = load(keys[k] + d);
      for (int row = 0; row < kRows; ++row) {
        sum_of[row][k] = multiply_add(load(query + row * width + d), key, sum_of[row][k]);
      }
    }
  }
  for (int row = 0; row < kRows; ++row) {
    store(scores + row * kKeyBlock, simd::sums(sum_of[row]));
  }
}

template <typename T>
void compute_scores(const float* query, int64_t rows, int64_t width, Tile<T> key, int64_t keys, float* scores) {
  for (int64_t k = 0; k < keys; k += 4) {
    const T* four[4];
    for (int64_t i = 0; i < 4; ++i) {
      four[i] = key.data + std::min(k + i, keys - 1) * key.stride;  // the last key again instead of memory behind it
    }
    int64_t row = 0;
    for (; row + 2 <= rows; row += 2) {
      score_four<2>(query + row * width, width, four, scores + row * kKeyBlock + k);
    }
    if (row < rows) {
      score_four<1>(query + row * width, width, four, scores + row * kKeyBlock + k);
    }
  }
}

// out[row] = rescale[row] * out[row] + probabilities[row] @ value for kRows rows and kVectors * kLanes columns.
template <int kRows, int kVectors, typename T>
inline void add_values(const float* probabilities, Tile<T> value, int64_t first, int64_t last, const float* rescale,
                       float* out, int64_t width) {
  Vector sum_of[kRows][kVectors] = {};
  for (int64_t k = first; k < last; ++k) {
    const T* source = value.data + k * value.stride;
    Vector values[kVectors];
    for (int v = 0; v < kVectors; ++v) {
      values[v] = load(source + v * kLanes);
    }
    for (int row = 0; row < kRows; ++row) {
      const Vector weight = broadcast(probabilities[row * kKeyBlock + k]);
      for (int v = 0; v < kVectors; ++v) {
        sum_of[row][v] = multiply_add(weight, values[v], sum_of[row][v]);
      }
    }
  }
  for (int row = 0; row < kRows; ++row) {
    Vector finite = {};
    for (int v = 0; v < kVectors; ++v) {
      finite += sum_of[row][v] * 0.0f;
    }
    if (simd::sum(finite) != 0.0f) {
      // An infinity or NaN came in, perhaps from a value that this row does not see (0 * NaN is NaN): leave those out.
      for (int v = 0; v < kVectors; ++v) {
        sum_of[row][v] = Vector{};
        for (int64_t k = first; k < last; ++k) {
          const float weight = probabilities[row * kKeyBlock + k];
          if (weight != 0.0f) {
            const Vector values = load(value.data + k * value.stride + v * kLanes);
            sum_of[row][v] = multiply_add(broadcast(weight), values, sum_of[row][v]);
          }
        }
      }
    }
    for (int v = 0; v < kVectors; ++v) {
      float* target = out + row * width + v * kLanes;
      store(target, multiply_add(load(target), broadcast(rescale[row]), sum_of[row][v]));
    }
  }
}

// The same for all columns (a multiple of kLanes), and only the keys that one of the rows sees.
template <int kRows, int kVectors, typename T>
void compute_out(const float* probabilities, const Row* row, Tile<T> value, const float* rescale, float* out,
                 int64_t columns) {
  int64_t first = kKeyBlock, last = 0;
  for (int i = 0; i < kRows; ++i) {
    if (row[i].first < row[i].last) {
      first = std::min(first, row[i].first);
      last = std::max(last, row[i].last);
    }
  }
  if (first >= last) {
    return;
  }
  int64_t at = 0;
  for (; at + kVectors * kLanes <= columns; at += kVectors * kLanes) {
    add_values<kRows, kVectors, T>(probabilities, {value.data + at, value.stride}, first, last, rescale, out + at,
                                   columns);
  }
  for (; at < columns; at += kLanes) {
    add_values<kRows, 1, T>(probabilities, {value.data + at, value.stride}, first, last, rescale, out + at, columns);
  }
}

template <typename T>
void compute_out(const float* probabilities, const Row* row, int64_t rows, Tile<T> value, const float* rescale,
                 float* out, int64_t columns) {
  int64_t i = 0;
  for (; i + 4 <= rows; i += 4) {
    compute_out<4, 2>(probabilities + i * kKeyBlock, row + i, value, rescale + i, out + i * columns, columns);
  }
  for (; i + 2 <= rows; i += 2) {
    compute_out<2, 4>(probabilities + i * kKeyBlock, row + i, value, rescale + i, out + i * columns, columns);
  }
  if (i < rows) {
    compute_out<1, 8>(probabilities + i * kKeyBlock, row + i, value, rescale + i, out + i * columns, columns);
  }
}

}  // namespace gpt4fast::cpu
