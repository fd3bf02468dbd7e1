#pragma once

// What a block of attention's kernels starts from: where the rows of its sequence lie, and which keys its queries see,
// or which queries see its keys.

#include "attention_tiles.cuh"

namespace gpt4fast {

// A head and its keys' head, of a block that takes queries.
struct BlockHead {
  uint32_t query, key;

  __device__ __forceinline__ explicit BlockHead(const AttentionParams& p)
      : query(blockIdx.x % static_cast<uint32_t>(p.query_heads)),
        key(query / (static_cast<uint32_t>(p.query_heads) / static_cast<uint32_t>(p.kv_heads))) {}
};

// Which of `tiles` tiles of queries the block takes, and of which sequence: the last ones first, since causal ones have
// most to do.
__device__ __forceinline__ Sequence block_sequence(const AttentionParams& p, int64_t tiles, int rows) {
  const auto heads = static_cast<uint32_t>(p.query_heads);
  return {p, gridDim.x / heads - 1 - blockIdx.x / heads, tiles, rows, false};
}

// Rows that a block goes past, kTile at a time.
template <int kTile>
struct Range {
  int begin, end;           // those that go with any of the block's own rows
  int first_tile, tiles;    // which [first_tile, tiles) have
  int first_whole, wholes;  // [first_whole, wholes): tiles of which each row goes with all of the block's own

  __device__ __forceinline__ Range(int begin, int end, int whole_begin, int whole_end)
      : begin(begin),
        end(end),
        first_tile(begin / kTile),
        tiles(begin < end ? (end + kTile - 1) / kTile : first_tile),
        first_whole((whole_begin + kTile - 1) / kTile),
        wholes(whole_end / kTile) {}

  __device__ __forceinline__ bool is_whole(int tile) const { return first_whole <= tile && tile < wholes; }
};

// The keys that the queries [first, first + kRows) see.
template <int kTile, int kRows>
__device__ __forceinline__ Range<kTile> seen_keys(const Positions& positions, const Sequence& sequence, int first) {
  const auto as_key = [&](int64_t key) { return as_row(key, sequence.key_length); };
  const int last = min(first + kRows, static_cast<int>(sequence.query_length)) - 1;
  return {as_key(positions.lower(first)), as_key(positions.upper(last)), as_key(positions.lower(last)),
          as_key(positions.upper(first))};
}

// The queries that see the keys [first, first + kRows). Those that see any lie side by side.
template <int kTile, int kRows>
__device__ __forceinline__ Range<kTile> seeing_queries(const Positions& positions, const Sequence& sequence,
                                                       int first) {
  const auto key_length = static_cast<int>(sequence.key_length);
  const auto as_query = [&](int64_t query) { return as_row(query, sequence.query_length); };
  const int64_t first_seen = max(int64_t{first}, positions.start),
                last_seen = min(int64_t{min(first + kRows, key_length)}, positions.length) - 1;
  const bool any_seen = first_seen <= last_seen;
  const bool all_exist = positions.start <= first && first + kRows <= positions.length;
  return {any_seen ? as_query(positions.first(first_seen)) : 0,
          any_seen ? as_query(positions.last(last_seen, sequence.query_length)) : 0,
          as_query(positions.first(first + kRows - 1)),
          all_exist ? as_query(positions.last(first, sequence.query_length)) : 0};
}

// A sequence's rows in memory, of any head. Packed sequences lie in one batch.
template <typename Launch, typename HeadRows>
struct SequenceRows {
  const Launch& p;
  const Sequence& sequence;
  int64_t batch;

  __device__ __forceinline__ SequenceRows(const Launch& p, const Sequence& sequence)
      : p(p), sequence(sequence), batch(p.cu_seqlens_q ? 0 : sequence.batch) {}

  __device__ __forceinline__ HeadRows query(uint32_t head) const {
    return {p.query, p.query_strides, batch, head, sequence.query_begin, p.head_dim, p.query_is_wide};
  }
  __device__ __forceinline__ HeadRows keys(uint32_t kv_head) const {
    return {p.key, p.key_strides, batch, kv_head, sequence.key_begin, p.head_dim, p.key_is_wide};
  }
  __device__ __forceinline__ HeadRows values(uint32_t kv_head) const {
    return {p.value, p.value_strides, batch, kv_head, sequence.key_begin, p.value_dim, p.value_is_wide};
  }

  // Of the first query, in tensors (B, Hq, Lq).
  __device__ __forceinline__ int64_t first_of_head(uint32_t head) const {
    return (batch * p.query_heads + head) * p.query_length + sequence.query_begin;
  }
};

}  // namespace gpt4fast
