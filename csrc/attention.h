#pragma once

#include <cstdint>

#include "element_type.h"

namespace gpt4fast {

enum class MaskKind { none, boolean, float32, bfloat16, float16 };

// softmax(softcap(scale * query @ key^T) + mask - slope * |distance|) @ value. B batch, Hq and Hk heads (Hq a multiple
// of Hk), Lq queries, Lk keys, D and Dv head dimensions. Strides are in elements, in the order of the shape. With
// cu_seqlens the tensors have batch size 1 and hold B sequences one after another, whose queries are
// [cu_seqlens_q[b], cu_seqlens_q[b + 1]) of Lq and whose keys likewise; positions count from a sequence's start.
struct AttentionParams {
  const void* query;             // (B, Hq, Lq, D)
  const void* key;               // (B, Hk, Lk, D)
  const void* value;             // (B, Hk, Lk, Dv)
  const void* mask;              // (B, Hq, Lq, Lk) of mask_kind, stride 0 where it is broadcast, or null
  const float* alibi_slopes;     // (B, Hq), or null
  const int64_t* query_offsets;  // (B), contiguous, or null: query_offset for every row
  const int64_t* kv_lengths;     // (B), contiguous, or null: Lk
  const int64_t* kv_starts;      // (B), contiguous, or null: 0
  const int64_t* cu_seqlens_q;   // (B + 1), contiguous, or null; both or none
  const int64_t* cu_seqlens_k;

  int64_t batch, query_heads, kv_heads, query_length, kv_length, head_dim, value_dim;
  int64_t query_strides[4];
  int64_t key_strides[4];
  int64_t value_strides[4];
  int64_t mask_strides[4];
  int64_t alibi_strides[2];

  ElementType dtype;  // of query, key, value, out and their gradients
  MaskKind mask_kind;
  bool is_causal;
  float scale;
  float softcap;         // 0: off
  int64_t query_offset;  // position of query 0 among the keys
  int64_t window_left;   // -1: open
  int64_t window_right;  // -1: open
  double dropout_p;      // 0: off
  uint64_t dropout_seed;
};

struct AttentionForwardParams : AttentionParams {
  void* out;  // (B, Hq, Lq, Dv), last stride 1
  int64_t out_strides[4];
  float* lse;  // (B, Hq, Lq), contiguous
};

// Attention over a cache: key and value are (B, Hk, kv_length, D) or, with a block_table, in blocks of it.
struct AttentionDecodeParams : AttentionForwardParams {
  ElementType cache_dtype;     // of key and value: dtype, or int8 or float8_e4m3fn with scales
  const int64_t* block_table;  // (B, blocks_per_row), contiguous: blocks of key and value (blocks, Hk, block_size, D),
                               // or null: row b is block b
  int64_t block_size, blocks_per_row;
  float* key_scales;    // (B or blocks, Hk, kv_length or block_size): a number stands for itself * scale; or null
  float* value_scales;  // likewise
  int64_t key_scale_strides[3];
  int64_t value_scale_strides[3];

  bool appends;           // first, at the queries' positions:
  void* key_cache;        // key, to be written
  void* value_cache;      // value, to be written
  const void* new_key;    // (B, Hk, Lq, D)
  const void* new_value;  // (B, Hk, Lq, Dv)
  int64_t new_key_strides[4];
  int64_t new_value_strides[4];
  const float* cos;  // (rotary_positions, rotary_dim / 2), contiguous: query and new_key are turned; or null
  const float* sin;
  int64_t rotary_positions, rotary_dim;
  bool rotary_interleaved;
};

struct AttentionBackwardParams : AttentionParams {
  const void* grad_out;   // (B, Hq, Lq, Dv)
  const float* grad_lse;  // (B, Hq, Lq), or null: 0
  const void* out;        // (B, Hq, Lq, Dv)
  const float* lse;       // (B, Hq, Lq), contiguous
  void* grad_query;       // shapes of query, key and value
  void* grad_key;
  void* grad_value;
  float* grad_mask;  // shape of the mask, stride 0 where that is broadcast, or null: not wanted
  int64_t grad_out_strides[4];
  int64_t grad_lse_strides[3];
  int64_t out_strides[4];
  int64_t grad_query_strides[4];
  int64_t grad_key_strides[4];
  int64_t grad_value_strides[4];
  int64_t grad_mask_strides[4];
};

namespace cpu {

// A kernel as one CPU level offers it. The result does not depend on the number of threads.
struct AttentionForwardKernel {
  int64_t (*workspace)(const AttentionForwardParams&);  // bytes of scratch memory that one thread needs
  void (*run)(const AttentionForwardParams&, void* workspace, int64_t thread, int64_t threads);
};

// A thread that is done with its own tasks takes those of others; the last task of a head writes the head's result.
struct AttentionDecodeKernel {
  int64_t (*threads)(const AttentionDecodeParams&);                     // worth waking
  int64_t (*workspace)(const AttentionDecodeParams&, int64_t threads);  // bytes of scratch memory for all threads
  // counters: threads + B * Hk zeros
  void (*run)(const AttentionDecodeParams&, void* workspace, int64_t* counters, int64_t thread, int64_t threads);
};

}  // namespace cpu
}  // namespace gpt4fast
