#pragma once

// A head of a key-value cache on a GPU, contiguous or in blocks: who sees what of it, reading it, and appending to it.

#include <torch/headeronly/util/Float8_e4m3fn.h>

#include "../attention.h"
#include "attention_decode_config.h"
#include "launch.h"
#include "ptx.cuh"

namespace gpt4fast {

// What a launch takes besides the operator's parameters, of which kv_lengths are the given ones.
struct DecodeLaunch : AttentionDecodeParams {
  int64_t parts, splits;            // of a head's query rows and of its keys
  float* part_out;                  // (B, Hq, Lq, splits, Dv), contiguous, or null where splits is 1
  float* part_lse;                  // (B, Hq, Lq, splits), likewise
  bool key_is_wide, value_is_wide;  // rows can be copied 16 bytes at a time
  bool has_whole_tiles;             // 16 keys, at a multiple of 16, lie one after another
};

// A query row of a block, and the keys that it sees. In 32 bits: a division of 64 takes the time of a memory access.
struct Row {
  bool exists;
  int head, token, position, lower, upper;

  __device__ __forceinline__ Row(const DecodeLaunch& p, uint32_t kv_head, uint32_t part, int row, int first,
                                 int length) {
    const auto tokens = static_cast<uint32_t>(p.query_length);
    const uint32_t group = static_cast<uint32_t>(p.query_heads) / static_cast<uint32_t>(p.kv_heads);
    const uint32_t index = part * kDecodeRows + row;
    exists = index < group * tokens;
    head = static_cast<int>(kv_head * group + index / tokens);
    token = static_cast<int>(index % tokens);
    position = length - static_cast<int>(p.query_length) + token;
    lower = p.window_left < 0 ? first : max(first, position - static_cast<int>(p.window_left));
    upper = exists ? position + 1 : 0;
  }
};

// Where an entry lies in a cache, but for the head.
struct Entry {
  int64_t block, within;

  __device__ __forceinline__ int64_t offset(int64_t block_stride, int64_t stride) const {
    return block * block_stride + within * stride;
  }
};

__device__ __forceinline__ Entry find_entry(const DecodeLaunch& p, int64_t batch, int64_t key) {
  if (!p.block_table) {
    return {batch, key};
  }
  const auto index = static_cast<uint32_t>(key), size = static_cast<uint32_t>(p.block_size);  // 32-bit division
  return {p.block_table[batch * p.blocks_per_row + index / size], index % size};
}

// 16 keys, of which those from `from` up to `to` are there. A lane knows where key lane % 16 lies.
struct Tile {
  int from, to;
  Entry entry;

  __device__ __forceinline__ Tile(const DecodeLaunch& p, int64_t batch, int key, int first, int length)
      : from(first - key), to(length - key), entry{0, 0} {
    const int row = threadIdx.x % kDecodeKeys;
    if (p.has_whole_tiles ? from < kDecodeKeys && to > 0 : has(row)) {
      entry = find_entry(p, batch, key + row);
    }
  }

  __device__ __forceinline__ bool has(int row) const { return from <= row && row < to; }
};

// The keys of a head in a cache, or its values.
template <typename cache_t, int kWidth>
struct CacheRows {
  static constexpr int kCount = 16 / sizeof(cache_t), kEach = kWidth / kCount, kStride = padded_width<cache_t>(kWidth);
  const cache_t* head;
  int64_t block_stride, stride, column_stride;
  int columns;
  bool is_wide;

  __device__ __forceinline__ CacheRows(const void* cache, const int64_t (&strides)[4], int64_t head, int64_t columns,
                                       bool is_wide)
      : head(static_cast<const cache_t*>(cache) + head * strides[1]),
        block_stride(strides[0]),
        stride(strides[2]),
        column_stride(strides[3]),
        columns(static_cast<int>(columns)),
        is_wide(is_wide) {}

  // A warp copies a tile, with zeros for keys that are not there and behind the last column.
  __device__ __forceinline__ void load(cache_t* target, const Tile& tile, bool has_whole_tiles) const {
    const int lane = threadIdx.x % 32, first_row = lane / kEach, first_column = lane % kEach * kCount;
    const int64_t offset = tile.entry.offset(block_stride, stride);
    const auto copy = [&](auto source_of) {
#pragma unroll
      for (int i = 0; i < kDecodeKeys * kEach; i += 32) {
        const int row = first_row + i / kEach, column = first_column + i % kEach * kCount;
        copy_async<16>(target + row * kStride + column, source_of(i, row) + column, tile.has(row) && column < columns);
      }
    };
    if (!is_wide) {
#pragma unroll 1
      for (int i = lane; i < kDecodeKeys * kWidth; i += 32) {
        const int row = i / kWidth, column = i % kWidth;
        const int64_t from = __shfl_sync(0xFFFFFFFFu, offset, row) + column * column_stride;
        target[row * kStride + column] = tile.has(row) && column < columns ? head[from] : static_cast<cache_t>(0.0f);
      }
    } else if (has_whole_tiles) {
      const cache_t* source = head + offset + (first_row - lane % kDecodeKeys) * stride;
      copy([&](int i, int) { return source + i / kEach * stride; });
    } else {
      copy([&](int, int row) { return head + __shfl_sync(0xFFFFFFFFu, offset, row); });
    }
  }
};

// A number of a row, turned by the row's position (RoFormer; Su et al., 2021) where there are tables for it.
template <typename scalar_t>
__device__ __forceinline__ float read_turned(const DecodeLaunch& p, const scalar_t* row, int64_t stride, int column,
                                             int64_t position) {
  const auto x = static_cast<float>(row[column * stride]);
  if (!p.cos || column >= p.rotary_dim || position < 0 || position >= p.rotary_positions) {
    return x;
  }
  const int half = static_cast<int>(p.rotary_dim) / 2;
  const bool is_first = p.rotary_interleaved ? column % 2 == 0 : column < half;
  const int distance = p.rotary_interleaved ? 1 : half;
  const int angle = p.rotary_interleaved ? column / 2 : is_first ? column : column - half;
  const auto other = static_cast<float>(row[(is_first ? column + distance : column - distance) * stride]);
  const float cos = p.cos[position * half + angle], sin = p.sin[position * half + angle];
  return x * cos + (is_first ? -other : other) * sin;
}

__device__ __forceinline__ float largest_of_warp(float value) {
  for (int distance = 16; distance > 0; distance /= 2) {
    value = fmaxf(value, __shfl_xor_sync(0xFFFFFFFFu, value, distance));
  }
  return value;
}

__device__ __forceinline__ float sum_of_warp(float value) {
  for (int distance = 16; distance > 0; distance /= 2) {
    value += __shfl_xor_sync(0xFFFFFFFFu, value, distance);
  }
  return value;
}

// A warp writes one row of the cache; where that has scales, its numbers times the one that is written stand for it.
template <typename cache_t, int kWidth, typename Read>
__device__ __forceinline__ void write_row(cache_t* row, int64_t stride, int64_t columns, float* scale,
                                          ElementType cache_dtype, Read read) {
  const int lane = threadIdx.x % 32;
  float numbers[kWidth / 32], largest = 0.0f, zero = 0.0f;  // NaN where a number is infinite or NaN
#pragma unroll
  for (int i = 0; i < kWidth / 32; ++i) {
    const int column = lane + 32 * i;
    numbers[i] = column < columns ? read(column) : 0.0f;
    largest = fmaxf(largest, fabsf(numbers[i]));
    zero += numbers[i] * 0.0f;
  }
  float quotient = 1.0f;
  if constexpr (sizeof(cache_t) == 1) {
    zero = sum_of_warp(zero);
    quotient = largest_of_warp(largest) / (cache_dtype == ElementType::int8 ? 127.0f : 448.0f);
    quotient = quotient == 0.0f ? 1.0f : quotient;
    if (lane == 0) {
      *scale = quotient + zero;
    }
  }
#pragma unroll
  for (int i = 0; i < kWidth / 32; ++i) {
    const int column = lane + 32 * i;
    if (column < columns) {
      if constexpr (sizeof(cache_t) == 1) {
        const float number = numbers[i] / quotient;
        if (cache_dtype == ElementType::int8) {
          row[column * stride] = number == number ? static_cast<cache_t>(rintf(number)) : cache_t(0);
        } else {
          row[column * stride] = static_cast<cache_t>(torch::headeronly::Float8_e4m3fn(number).x);
        }
      } else {
        row[column * stride] = static_cast<cache_t>(numbers[i]);
      }
    }
  }
}

// Writes the new tokens among the keys [first, last), and those before `first` if they are nobody else's. Every block
// writes what it reads itself, so that none waits for another: those of other query rows write the same.
template <typename scalar_t, typename cache_t, int kWidth>
__device__ __forceinline__ void append(const DecodeLaunch& p, int64_t batch, int64_t head, int64_t first, int64_t last,
                                       int warps) {
  const int64_t start = p.kv_lengths[batch];
  for (int64_t token = threadIdx.x / 32; token < p.query_length; token += warps) {
    const int64_t position = start + token;
    if (position < first || position >= last || position < 0 || position >= p.kv_length) {
      continue;
    }
    const Entry entry = find_entry(p, batch, position);
    const auto write = [&](const void* fresh, const int64_t (&fresh_strides)[4], void* cache,
                           const int64_t (&strides)[4], float* scales, const int64_t (&scale_strides)[3],
                           int64_t columns, auto read) {
      const auto* from = static_cast<const scalar_t*>(fresh) + batch * fresh_strides[0] + head * fresh_strides[1] +
                         token * fresh_strides[2];
      auto* to = static_cast<cache_t*>(cache) + entry.offset(strides[0], strides[2]) + head * strides[1];
      float* scale =
          scales ? scales + entry.offset(scale_strides[0], scale_strides[2]) + head * scale_strides[1] : nullptr;
      write_row<cache_t, kWidth>(to, strides[3], columns, scale, p.cache_dtype,
                                 [&](int column) { return read(from, column); });
    };
    write(p.new_key, p.new_key_strides, p.key_cache, p.key_strides, p.key_scales, p.key_scale_strides, p.head_dim,
          [&](const scalar_t* row, int column) { return read_turned(p, row, p.new_key_strides[3], column, position); });
    write(p.new_value, p.new_value_strides, p.value_cache, p.value_strides, p.value_scales, p.value_scale_strides,
          p.value_dim,
          [&](const scalar_t* row, int column) { return static_cast<float>(row[column * p.new_value_strides[3]]); });
  }
}

}  // namespace gpt4fast
