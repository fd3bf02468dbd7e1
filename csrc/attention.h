#pragma once

#include <cstdint>

namespace gpt4fast {

enum class MaskKind { none, boolean, float32, bfloat16, float16 };

// softmax(softcap(scale * query @ key^T) + mask - slope * |distance|) @ value. B batch, Hq and Hk heads (Hq a multiple
// of Hk), Lq queries, Lk keys, D and Dv head dimensions. Strides are in elements, in the order of the shape.
struct AttentionForwardParams {
  const void* query;             // (B, Hq, Lq, D)
  const void* key;               // (B, Hk, Lk, D)
  const void* value;             // (B, Hk, Lk, Dv)
  const void* mask;              // (B, Hq, Lq, Lk) of mask_kind, or null
  const float* alibi_slopes;     // (B, Hq), or null
  const int64_t* query_offsets;  // (B), contiguous, or null: query_offset for every row
  const int64_t* kv_lengths;     // (B), contiguous, or null: Lk
  const int64_t* kv_starts;      // (B), contiguous, or null: 0
  void* out;                     // (B, Hq, Lq, Dv), contiguous
  float* lse;                    // (B, Hq, Lq), contiguous

  int64_t batch, query_heads, kv_heads, query_length, kv_length, head_dim, value_dim;
  int64_t query_strides[4];
  int64_t key_strides[4];
  int64_t value_strides[4];
  int64_t mask_strides[4];
  int64_t alibi_strides[2];

  MaskKind mask_kind;
  bool is_causal;
  float scale;
  float softcap;         // 0: off
  int64_t query_offset;  // position of query 0 among the keys
  int64_t window_left;   // -1: open
  int64_t window_right;  // -1: open
};

namespace cpu {

// Floats of scratch memory that one thread needs.
int64_t attention_forward_workspace(const AttentionForwardParams& params);

// workspace: (threads, attention_forward_workspace(params)). The result does not depend on threads.
template <typename scalar_t>
void attention_forward(const AttentionForwardParams& params, float* workspace, int64_t threads);

}  // namespace cpu
}  // namespace gpt4fast
