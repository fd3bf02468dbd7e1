#pragma once

// What attention's kernels have in common: which tile of which sequence a block takes, who sees whom by position, and
// rows of a head on their way between global and shared memory.

#include <algorithm>
#include <optional>

#include <torch/csrc/stable/tensor.h>

#include "../attention.h"
#include "../attention_arguments.h"
#include "attention_products.cuh"
#include "launch.h"

namespace gpt4fast {

// A sequence's queries and keys: [begin, begin + length) of the tensors, and one of its tiles.
struct Sequence {
  int64_t batch, tile, query_begin, query_length, key_begin, key_length;

  // Tile number `index` of those of all sequences, `tiles` for each that is not packed, of so many rows: of keys, or of
  // queries. Without any rows where there is none.
  __device__ __forceinline__ Sequence(const AttentionParams& p, uint32_t index, int64_t tiles, int rows, bool of_keys)
      : batch(index / static_cast<uint32_t>(tiles)),  // in 32 bits: 64 take the time of a memory access
        tile(index % static_cast<uint32_t>(tiles)),
        query_begin(0),
        query_length(p.query_length),
        key_begin(0),
        key_length(p.kv_length) {
    if (!p.cu_seqlens_q) {
      return;
    }
    const int64_t* bounds = of_keys ? p.cu_seqlens_k : p.cu_seqlens_q;
    for (batch = 0; batch < p.batch; ++batch) {
      const int64_t tiles = (bounds[batch + 1] - bounds[batch] + rows - 1) / rows;
      if (tile < tiles) {
        query_begin = p.cu_seqlens_q[batch];
        query_length = p.cu_seqlens_q[batch + 1] - query_begin;
        key_begin = p.cu_seqlens_k[batch];
        key_length = p.cu_seqlens_k[batch + 1] - key_begin;
        return;
      }
      tile -= tiles;
    }
    query_length = key_length = 0;
  }
};

// Who sees whom by position alone. Numbers may be as large as 2^60.
struct Positions {
  const AttentionParams& p;  // whose window takes no registers
  int64_t offset, start, length;

  __device__ __forceinline__ Positions(const AttentionParams& p, const Sequence& sequence)
      : p(p),
        offset(p.query_offsets ? p.query_offsets[sequence.batch] : p.query_offset),
        start(p.kv_starts ? max(p.kv_starts[sequence.batch], int64_t{0}) : 0),
        length(p.kv_lengths ? min(p.kv_lengths[sequence.batch], sequence.key_length) : sequence.key_length) {}

  // Query i sees the keys [lower, upper).
  __device__ __forceinline__ int64_t lower(int64_t query) const {
    return p.window_left < 0 ? start : max(start, query + offset - p.window_left);
  }
  __device__ __forceinline__ int64_t upper(int64_t query) const {
    const int64_t last = p.is_causal ? min(length, query + offset + 1) : length;
    return p.window_right < 0 ? last : min(last, query + offset + p.window_right + 1);
  }

  // Key j is seen by the queries [first, last).
  __device__ __forceinline__ int64_t first(int64_t key) const {
    const int64_t right = p.is_causal ? 0 : p.window_right;
    return right < 0 ? 0 : key - offset - right;
  }
  __device__ __forceinline__ int64_t last(int64_t key, int64_t queries) const {
    if (key < start || key >= length) {
      return 0;
    }
    return p.window_left < 0 ? queries : min(queries, key - offset + p.window_left + 1);
  }
};

// A place among `length` rows, in 32 bits.
__device__ __forceinline__ int as_row(int64_t place, int64_t length) {
  return static_cast<int>(min(max(place, int64_t{0}), length));
}

// Likewise a place relative to a tile, exact as far as [-reach, reach].
__device__ __forceinline__ int within(int64_t place, int reach) {
  return static_cast<int>(min(max(place, int64_t{-reach}), int64_t{reach}));
}

// A tile in shared memory whose rows are 16 bytes longer than their numbers (see padded_width).
template <typename scalar_t, int kWidth>
struct PaddedTile {
  static constexpr int kStride = padded_width<scalar_t>(kWidth), kPeriod = 1;

  __device__ __forceinline__ static int place(int row, int column) { return row * kStride + column; }
};

// Rows of a head's queries, keys or values, of which a thread copies the same 16 bytes of every kStep-th.
template <typename scalar_t, int kWidth, int kThreads>
struct Rows {
  static constexpr int kCount = 16 / sizeof(scalar_t), kEach = kWidth / kCount, kStep = kThreads / kEach;
  const scalar_t* matrix;
  int64_t row_stride, stride;
  int first_row, column, columns;  // of them the thread's first row and column
  bool is_wide;

  __device__ __forceinline__ Rows(const void* tensor, const int64_t (&strides)[4], int64_t batch, int64_t head,
                                  int64_t begin, int64_t columns, bool is_wide)
      : matrix(static_cast<const scalar_t*>(tensor) + batch * strides[0] + head * strides[1] + begin * strides[2]),
        row_stride(strides[2]),
        stride(strides[3]),
        first_row(static_cast<int>(threadIdx.x) / kEach),
        column(static_cast<int>(threadIdx.x) % kEach * kCount),
        columns(static_cast<int>(columns)),
        is_wide(is_wide) {}

  // Copies kRows rows from `first` on, with zeros outside [begin, end) and behind the last column.
  template <int kRows, typename Tile = PaddedTile<scalar_t, kWidth>>
  __device__ __forceinline__ void load(scalar_t* tile, int first, int begin, int end) const {
    static_assert(kRows % kStep == 0 && kStep % Tile::kPeriod == 0);
    const int from = begin - first, to = end - first;
    const scalar_t* source = matrix + (first + first_row) * row_stride + column * stride;
    scalar_t* target = tile + Tile::place(first_row, column);
    if (is_wide) {
      const bool is_column = column < columns;
#pragma unroll
      for (int i = 0; i < kRows; i += kStep) {
        const bool valid = is_column && from <= first_row + i && first_row + i < to;
        copy_async<16>(target + i * Tile::kStride, source, valid);
        source += kStep * row_stride;
      }
    } else {
#pragma unroll 1
      for (int i = 0; i < kRows / kStep * kCount; ++i) {
        const int row = i / kCount * kStep, k = i % kCount;
        const bool valid = from <= first_row + row && first_row + row < to && column + k < columns;
        target[row * Tile::kStride + k] = valid ? source[row * row_stride + k * stride] : static_cast<scalar_t>(0.0f);
      }
    }
  }
};

// A warp writes its sums, times a number for each of a lane's rows, to rows of a tensor from `target` on, of which
// there are `count`: through shared memory of its own, so that whole rows are written.
template <typename scalar_t, int kWidth, int kParts>
__device__ __forceinline__ void write_rows(const float (&sums)[kParts][kWidth / 8][4],
                                           const float (&factors)[2 * kParts], scalar_t* shared, scalar_t* target,
                                           const int64_t (&strides)[4], int count, int columns, bool is_wide) {
  constexpr int kStride = padded_width<scalar_t>(kWidth), kCount = 16 / sizeof(scalar_t), kEach = kWidth / kCount;
  const int lane = threadIdx.x % 32;
#pragma unroll
  for (int i = 0; i < 2 * kParts; ++i) {
#pragma unroll
    for (int n = 0; n < kWidth / 8; ++n) {
#pragma unroll
      for (int j = 0; j < 2; ++j) {
        shared[(lane / 4 + 8 * i) * kStride + 8 * n + lane % 4 * 2 + j] =
            static_cast<scalar_t>(sums[i / 2][n][2 * (i % 2) + j] * factors[i]);
      }
    }
  }
  __syncwarp();
  if (is_wide) {
    for (int i = lane; i < count * kEach; i += 32) {
      const int row = i / kEach, column = i % kEach * kCount;
      if (column < columns) {
        *reinterpret_cast<uint4*>(target + row * strides[2] + column) =
            *reinterpret_cast<const uint4*>(shared + row * kStride + column);
      }
    }
  } else {
    for (int row = 0; row < count; ++row) {
      for (int column = lane; column < columns; column += 32) {
        target[row * strides[2] + column * strides[3]] = shared[row * kStride + column];
      }
    }
  }
}

// What the emulation must know of the tensors that every kernel of attention reads.
inline void allow_attention(const torch::stable::Tensor& query, const torch::stable::Tensor& key,
                            const torch::stable::Tensor& value, const AttentionSettings& settings) {
  for (const torch::stable::Tensor* tensor : {&query, &key, &value}) {
    allow_access(*tensor, false);
  }
  for (const std::optional<torch::stable::Tensor>* tensor :
       {&settings.attn_mask, &settings.dropout_seed, &settings.query_offsets, &settings.kv_lengths, &settings.kv_starts,
        &settings.alibi_slopes, &settings.cu_seqlens_q, &settings.cu_seqlens_k}) {
    if (*tensor) {
      allow_access(**tensor, false);
    }
  }
}

// The width that both heads fit.
inline int64_t checked_width(const AttentionParams& p, int64_t widest) {
  STD_TORCH_CHECK(std::max(p.query_length, p.kv_length) < INT32_MAX / 2,
                  "expected query and key to have fewer than 2^30 rows, but they have ", p.query_length, " and ",
                  p.kv_length);
  const int64_t width = std::max(p.head_dim, p.value_dim);
  STD_TORCH_CHECK(width <= widest, "expected the last dimension of query and value to be at most ", widest,
                  ", but it is ", width);
  return width;
}

}  // namespace gpt4fast
