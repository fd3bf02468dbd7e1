#pragma once

// One head of a key-value cache, contiguous or in blocks.

#include <cstdint>

#include "attention_rows.h"

namespace gpt4fast::cpu::GPT4FAST_LEVEL {

inline constexpr int64_t kAlignment = 16;  // of the first key of a tile: a multiple of kLanes at every level

// Rows of a cache, stride numbers apart. While a number is used, the one that lies `ahead` behind it can be fetched.
template <typename Item>
struct Run {
  Item* data;
  int64_t stride;
  int64_t count;
  int64_t ahead;
};

// A head as one sequence sees it.
template <typename Item>
struct CacheHead {
  Item* data;
  const int64_t* blocks;  // of the sequence, or null: data is where it begins
  int64_t block_size, block_stride, stride;

  // Strides are those of the cache (B, Hk, kv_length, ...) or (blocks, Hk, block_size, ...).
  template <typename Data, size_t kCount>
  CacheHead(const AttentionDecodeParams& p, Data* cache, const int64_t (&strides)[kCount], int64_t sequence,
            int64_t kv_head)
      : data(static_cast<Item*>(cache) + kv_head * strides[1]),
        blocks(p.block_table ? p.block_table + sequence * p.blocks_per_row : nullptr),
        block_size(p.block_size),
        block_stride(strides[0]),
        stride(strides[2]) {
    data += blocks ? 0 : sequence * block_stride;
  }

  Item* at(int64_t key) const {
    return blocks ? data + blocks[key / block_size] * block_stride + key % block_size * stride : data + key * stride;
  }

  // Calls use(run, index) for those of the given keys that lie one after another. Ahead are the keys `distance` rows
  // on, or in small blocks that many whole blocks on if these are before `last`.
  template <typename Use>
  void for_each_run(Range keys, int64_t distance, int64_t last, Use use) const {
    if (!blocks) {
      use(Run<Item>{data + keys.first * stride, stride, keys.last - keys.first, distance * stride}, 0);
      return;
    }
    const int64_t jump = block_size < 4 * distance ? (distance + block_size - 1) / block_size : 0;
    int64_t block = keys.first / block_size, within = keys.first % block_size;
    for (int64_t key = keys.first; key < keys.last; ++block, within = 0) {
      int64_t ahead = distance * stride;
      if (jump) {
        ahead = (block + jump) * block_size < last ? (blocks[block + jump] - blocks[block]) * block_stride : 0;
      }
      const int64_t count = least(keys.last - key, block_size - within);
      use(Run<Item>{data + blocks[block] * block_stride + within * stride, stride, count, ahead}, key - keys.first);
      key += count;
    }
  }
};

// Whether rows can be multiplied where they lie: the numbers of each are neighbours, and blocks hold whole vectors.
inline bool is_in_place(const AttentionDecodeParams& p, const int64_t (&strides)[4]) {
  return strides[3] == 1 && (!p.block_table || p.block_size % kAlignment == 0);
}

}  // namespace gpt4fast::cpu::GPT4FAST_LEVEL
