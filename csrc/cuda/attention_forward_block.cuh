#pragma once

// What the kernels of attention's forward pass have in common around their products: how scores are changed, and
// how their sums are written.

#include "attention_block.cuh"
#include "attention_weights.cuh"

namespace gpt4fast {

struct AttentionLaunch : AttentionForwardParams {
  Dropout dropout;
  int64_t tiles;                                                // of queries: of a sequence, or of all packed ones
  bool query_is_wide, key_is_wide, value_is_wide, out_is_wide;  // rows can be moved 16 bytes at a time
};

// scale, softcap and ALiBi, in units of log2. `distance`: of a lane's first query from the first of its columns.
template <int kParts, int kTiles>
__device__ __forceinline__ void bend_scores(const AttentionLaunch& p, float (&scores)[kParts][kTiles][4], int64_t batch,
                                            uint32_t head, float distance) {
  if (p.softcap != 0.0f) {
    const float scale = p.scale / p.softcap, cap = p.softcap * kLog2E;
    for_each_score(scores, [&](float& score, int, int) { score = cap * tanhf(scale * score); });
  } else {
    const float scale = p.scale * kLog2E;
    for_each_score(scores, [&](float& score, int, int) { score *= scale; });
  }
  if (p.alibi_slopes) {
    const float slope = kLog2E * p.alibi_slopes[batch * p.alibi_strides[0] + head * p.alibi_strides[1]];
    for_each_score(scores, [&](float& score, int i, int column) {
      score -= slope * fabsf(distance + static_cast<float>(8 * i - column));
    });
  }
}

// The columns [from, to) behind a lane's first one that each of its rows sees by position.
template <int kParts, int kKeys>
__device__ __forceinline__ void see_columns(const Positions& positions, int first_row, int first_column,
                                            int (&from)[2 * kParts], int (&to)[2 * kParts]) {
#pragma unroll
  for (int i = 0; i < 2 * kParts; ++i) {
    const int64_t row = first_row + 8 * i;  // with 32 bits nvcc 13.0 spilled five registers more
    from[i] = within(positions.lower(row) - first_column, kKeys);
    to[i] = within(positions.upper(row) - first_column, kKeys);
  }
}

// Writes the logarithms of the sums from `lse` on, where the sequence's first query has its own, and gives the shares
// by which the rows of the output are still to be multiplied.
template <int kParts>
__device__ __forceinline__ void write_lse(float* lse, int first_row, int query_length, float scale,
                                          const float (&peaks)[2 * kParts], const float (&totals)[2 * kParts],
                                          float (&shares)[2 * kParts]) {
#pragma unroll
  for (int i = 0; i < 2 * kParts; ++i) {
    float total = totals[i];
    total += __shfl_xor_sync(0xFFFFFFFFu, total, 1);
    total += __shfl_xor_sync(0xFFFFFFFFu, total, 2);
    shares[i] = total == 0.0f ? 0.0f : scale / total;
    const int row = first_row + 8 * i;
    if (threadIdx.x % 4 == 0 && row < query_length) {
      lse[row] = total == 0.0f ? -kInfinity : (peaks[i] + log2f(total)) * kLn2;
    }
  }
}

// How many blocks take all queries of all heads, so many rows each. Packed sequences may each end with a tile that is
// not full.
inline int64_t query_blocks(AttentionLaunch& p, int64_t rows) {
  p.tiles = ceil_div(p.query_length, rows) + (p.cu_seqlens_q ? p.batch : 0);
  return (p.cu_seqlens_q ? 1 : p.batch) * p.tiles * p.query_heads;
}

}  // namespace gpt4fast
