#pragma once

// What the kernels of attention's gradients have in common: parameters, shared memory, and what becomes of a score and
// the gradient of its weight.

#include "attention_backward_config.h"
#include "attention_block.cuh"
#include "attention_weights.cuh"

namespace gpt4fast {

struct BackwardLaunch : AttentionBackwardParams {
  Dropout dropout;
  int64_t query_tiles, key_tiles;  // of a sequence, or of all packed ones
  float* deltas;                   // (B, Hq, Lq), contiguous: sum(grad_out * out) - grad_lse
  float* grad_scores;  // (B, Hq, Lq, Lk), contiguous and 0: the mask's gradient before it is summed; or null
  bool query_is_wide, key_is_wide, value_is_wide, grad_out_is_wide, out_is_wide;  // 16 bytes at a time
  bool grad_query_is_wide, grad_key_is_wide, grad_value_is_wide;
};

// A block's own rows of two tensors, and tiles of two others that go by.
template <typename scalar_t, int kWidth, typename Config>
struct alignas(16) BackwardShared {
  static constexpr int kStride = padded_width<scalar_t>(kWidth);
  scalar_t rows[2][Config::kRows * kStride];
  scalar_t tiles[2][kBackwardStages][Config::kTile * kStride];
};

template <typename HeadRows>
struct BackwardRows : SequenceRows<BackwardLaunch, HeadRows> {
  using Base = SequenceRows<BackwardLaunch, HeadRows>;
  using Base::Base, Base::batch, Base::p, Base::sequence;

  __device__ __forceinline__ HeadRows out(uint32_t head) const {
    return {p.out, p.out_strides, batch, head, sequence.query_begin, p.value_dim, p.out_is_wide};
  }
  __device__ __forceinline__ HeadRows grad_out(uint32_t head) const {
    return {p.grad_out, p.grad_out_strides, batch, head, sequence.query_begin, p.value_dim, p.grad_out_is_wide};
  }
};

// In units of log 2; +inf for a query that sees nothing, whose weights are then 0.
__device__ __forceinline__ float level_of(float lse) {
  return lse == -kInfinity ? kInfinity : lse * kLog2E;
}

// What a score's gradient takes beyond its products.
struct Scores {
  const BackwardLaunch& p;
  const MaskOfHead mask;
  const float slope;  // of ALiBi, in units of log 2

  __device__ __forceinline__ Scores(const BackwardLaunch& p, int64_t batch, int64_t head)
      : p(p),
        mask(p, batch, head),
        slope(p.alibi_slopes ? kLog2E * p.alibi_slopes[batch * p.alibi_strides[0] + head * p.alibi_strides[1]] : 0.0f) {
  }

  // The general case: turns query . key into the weight that value is multiplied by, and grad_out . value into the
  // gradient of query . key, but for the scale. Returns whether the key is seen, and else leaves zeros.
  __device__ __forceinline__ bool differentiate(float& score, float& grad, int query, int key, float distance,
                                                bool is_kept, float level, float delta, float* grad_score) const {
    float capped = 0.0f;
    score *= p.scale;
    if (p.softcap != 0.0f) {
      capped = tanhf(score / p.softcap);
      score = p.softcap * capped;
    }
    score = score * kLog2E - slope * fabsf(distance);
    if (p.mask) {
      const float bias = mask.read(query, key);
      score = bias == -kInfinity ? bias : score + bias;
    }
    if (score == -kInfinity) {
      score = grad = 0.0f;
      return false;
    }
    const float weight = exp2_fast(score - level), share = is_kept ? p.dropout.scale : 0.0f;
    grad = weight * ((is_kept ? grad * share : 0.0f) - delta);
    if (grad_score) {
      *grad_score = grad;
    }
    grad *= 1.0f - capped * capped;
    score = weight * share;
    return true;
  }
};

// Calls change(score, grad, i, column) for each of a lane's pairs, as for_each_score does.
template <int kParts, int kTiles, typename Change>
__device__ __forceinline__ void for_each_pair(float (&scores)[kParts][kTiles][4], float (&grads)[kParts][kTiles][4],
                                              Change change) {
  for_each_score(scores, [&](float& score, int i, int column) {
    change(score, grads[i / 2][column / 8][2 * (i % 2) + column % 2], i, column);
  });
}

__device__ __forceinline__ bool is_plain(const BackwardLaunch& p) {
  return p.softcap == 0.0f && !p.alibi_slopes && !p.mask && !p.dropout.seed;
}

}  // namespace gpt4fast
