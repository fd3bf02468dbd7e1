#pragma once

#include <cstdint>

namespace gpt4fast {

enum class ElementType { float32, bfloat16, float16, int8 };
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
  float dropout_p;       // 0: off
  uint64_t dropout_seed;
};

struct AttentionForwardParams : AttentionParams {
  void* out;  // (B, Hq, Lq, Dv), last stride 1
  int64_t out_strides[4];
  float* lse;  // (B, Hq, Lq), contiguous
};

namespace cpu {

// A kernel as one CPU level offers it. The result does not depend on the number of threads.
struct AttentionForwardKernel {
  int64_t (*workspace)(const AttentionForwardParams&);  // bytes of scratch memory that one thread needs
  void (*run)(const AttentionForwardParams&, void* workspace, int64_t thread, int64_t threads);
};

}  // namespace cpu
}  // namespace gpt4fast
