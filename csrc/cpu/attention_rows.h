#pragma once

// Which keys each query row sees.

#include "../attention.h"

#include <cstdint>

#include "simd/simd.h"

namespace gpt4fast::cpu::GPT4FAST_LEVEL {

inline constexpr int64_t kKeyBlock = 64;  // keys of a tile; with 64 floats each, keys and values fit in L1 (2 x 16 KiB)
inline constexpr double kLog2E = 1.44269504088896341;
inline constexpr double kLn2 = 0.69314718055994531;

// One batch row, or one of the packed sequences.
struct Sequence {
  int64_t index;    // among B
  int64_t storage;  // index into the tensors' first dimension
  int64_t first_query, queries;
  int64_t first_key, keys;
  int64_t offset;      // position of query 0 among the keys
  int64_t begin, end;  // keys that starts and lengths leave visible

  Sequence() = default;

  Sequence(const AttentionParams& p, int64_t b) : index(b) {
    const bool packed = p.cu_seqlens_q != nullptr;
    storage = packed ? 0 : b;
    first_query = packed ? p.cu_seqlens_q[b] : 0;
    queries = packed ? p.cu_seqlens_q[b + 1] - first_query : p.query_length;
    first_key = packed ? p.cu_seqlens_k[b] : 0;
    keys = packed ? p.cu_seqlens_k[b + 1] - first_key : p.kv_length;
    offset = p.query_offsets ? p.query_offsets[b] : p.query_offset;
    begin = most<int64_t>(p.kv_starts ? p.kv_starts[b] : 0, 0);
    end = p.kv_lengths ? least(p.kv_lengths[b], keys) : keys;
  }
};

// One query row. The query heads that share a key/value head are rows of one matrix, so that keys and values are read
// once for all of them; the heads of one query are neighbours, so a block of rows spans few queries.
struct Row {
  int64_t query;  // within its sequence
  int64_t head;
  int64_t position;    // among the keys
  int64_t begin, end;  // visible keys, but for a mask; begin >= end: none
  float slope;         // ALiBi

  Row() = default;

  Row(const AttentionParams& p, const Sequence& sequence, int64_t kv_head, int64_t index) {
    const int64_t group = p.query_heads / p.kv_heads;
    query = group == 1 ? index : index / group;  // a division takes as long as the rest
    head = kv_head * group + index - query * group;
    position = query + sequence.offset;
    begin = sequence.begin;
    end = sequence.end;
    if (p.window_left >= 0) {
      begin = most(begin, position - p.window_left);
    }
    if (p.is_causal) {
      end = least(end, position + 1);
    }
    if (p.window_right >= 0) {
      end = least(end, position + p.window_right + 1);
    }
    slope = 0.0f;
    if (p.alibi_slopes) {
      slope = p.alibi_slopes[sequence.index * p.alibi_strides[0] + head * p.alibi_strides[1]];
    }
  }
};

struct Range {
  int64_t first, last;

  bool empty() const { return first >= last; }
};

// The columns, in [0, kKeyBlock], of the tile that starts at key that the row sees.
inline Range visible_columns(const Row& row, int64_t key) {
  const int64_t first = least(most<int64_t>(row.begin - key, 0), kKeyBlock);
  return {first, least(most<int64_t>(row.end - key, 0), kKeyBlock)};
}

// Those that any of the rows sees.
inline Range visible_columns(const Row* rows, int64_t count, int64_t key) {
  Range all = {kKeyBlock, 0};
  for (int64_t i = 0; i < count; ++i) {
    const Range columns = visible_columns(rows[i], key);
    if (!columns.empty()) {
      all = {least(all.first, columns.first), most(all.last, columns.last)};
    }
  }
  return all;
}

// Whether each of the rows sees each column.
inline bool all_see_all(const Row* rows, int64_t count, int64_t key) {
  bool all = true;
  for (int64_t i = 0; i < count; ++i) {
    all = all && rows[i].begin <= key && key + kKeyBlock <= rows[i].end;
  }
  return all;
}

// The key tiles that any of the rows sees.
inline Range visible_tiles(const Row* rows, int64_t count) {
  Range keys = {INT64_MAX, 0};
  for (int64_t i = 0; i < count; ++i) {
    if (rows[i].begin < rows[i].end) {
      keys = {least(keys.first, rows[i].begin), most(keys.last, rows[i].end)};
    }
  }
  return keys.empty() ? Range{0, 0} : Range{keys.first / kKeyBlock, (keys.last + kKeyBlock - 1) / kKeyBlock};
}

}  // namespace gpt4fast::cpu::GPT4FAST_LEVEL
