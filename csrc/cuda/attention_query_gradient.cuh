#pragma once

// The gradient of queries: a tile of them past the keys that they see. With it come the sums that the gradients of keys
// take, deltas, and the gradient of a mask before it is summed where that is broadcast.

#include "attention_backward_scores.cuh"

namespace gpt4fast {

template <typename scalar_t, int kWidth>
__global__ void __launch_bounds__(QueryGradientConfig<scalar_t, kWidth>::kThreads, 1)
    attention_query_gradient_kernel(const BackwardLaunch p) {
  using Config = QueryGradientConfig<scalar_t, kWidth>;
  using HeadRows = Rows<scalar_t, kWidth, Config::kThreads>;
  constexpr int kRows = Config::kRows, kKeys = Config::kTile, kParts = Config::kParts;
  constexpr int kStride = padded_width<scalar_t>(kWidth);
  auto& shared = shared_memory<BackwardShared<scalar_t, kWidth, Config>>();
  auto &shared_query = shared.rows[0], &shared_grad_out = shared.rows[1];
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const auto [head, kv_head] = BlockHead(p);
  const Sequence sequence = block_sequence(p, p.query_tiles, kRows);
  if (sequence.tile * kRows >= sequence.query_length) {
    return;
  }
  const int64_t batch = sequence.batch;
  const auto first_query = static_cast<int>(sequence.tile) * kRows;
  const auto query_length = static_cast<int>(sequence.query_length);
  const Positions positions(p, sequence);
  const auto range = seen_keys<kKeys, kRows>(positions, sequence, first_query);

  const BackwardRows<HeadRows> rows(p, sequence);
  const HeadRows query = rows.query(head), grad_out = rows.grad_out(head), out = rows.out(head),
                 keys = rows.keys(kv_head), values = rows.values(kv_head);
  query.template load<kRows>(shared_query, first_query, 0, query_length);
  grad_out.template load<kRows>(shared_grad_out, first_query, 0, query_length);
  static_assert(kRows <= 2 * kBackwardStages * kKeys);  // where tiles go by, there is room for the output before
  scalar_t* shared_out = &shared.tiles[0][0][0];
  out.template load<kRows>(shared_out, first_query, 0, query_length);
  commit_copies();
  wait_for_copies<0>();
  __syncthreads();

  const int first_row = first_query + Config::kWarpRows * warp + lane / 4;  // of a lane, which has each 8th below
  const int64_t row_of_lse = rows.first_of_head(head);
  float levels[2 * kParts], deltas[2 * kParts];
#pragma unroll
  for (int i = 0; i < 2 * kParts; ++i) {
    const int row = first_row + 8 * i, place = (row - first_query) * kStride + lane % 4 * 2;
    float delta = 0.0f;
#pragma unroll 4
    for (int d = 0; d < kWidth; d += 8) {
      for (int j = 0; j < 2; ++j) {
        delta += static_cast<float>(shared_grad_out[place + d + j]) * static_cast<float>(shared_out[place + d + j]);
      }
    }
    delta += __shfl_xor_sync(0xFFFFFFFFu, delta, 1);
    delta += __shfl_xor_sync(0xFFFFFFFFu, delta, 2);
    levels[i] = kInfinity;
    if (row < query_length) {
      if (p.grad_lse) {
        delta -= p.grad_lse[rows.batch * p.grad_lse_strides[0] + head * p.grad_lse_strides[1] +
                            (sequence.query_begin + row) * p.grad_lse_strides[2]];
      }
      levels[i] = level_of(p.lse[row_of_lse + row]);
      if (lane % 4 == 0) {
        p.deltas[row_of_lse + row] = delta;
      }
    }
    deltas[i] = delta;
  }
  __syncthreads();  // everyone is done with the output

  const auto request = [&](int tile) {
    if (tile < range.tiles) {
      keys.template load<kKeys>(shared.tiles[0][tile % kBackwardStages], tile * kKeys, range.begin, range.end);
      values.template load<kKeys>(shared.tiles[1][tile % kBackwardStages], tile * kKeys, range.begin, range.end);
    }
    commit_copies();
  };
  const Scores scoring(p, batch, head);
  const SeenKeys<scalar_t, kWidth, Config::kWarpRows, Config::kWarps> seen{shared_query};
  const bool plain = is_plain(p);
  const float factor = p.scale * kLog2E;
  float sums[kParts][kWidth / 8][4] = {};
  uint64_t kept = 0;  // of the weights for the 64 keys among which a tile lies
  request(range.first_tile);
#pragma unroll 1
  for (int tile = range.first_tile; tile < range.tiles; ++tile) {
    wait_for_copies<0>();
    __syncthreads();  // everyone's copies are there, and everyone is done with the tiles that are overwritten next
    request(tile + 1);
    scalar_t *key_tile = shared.tiles[0][tile % kBackwardStages], *value_tile = shared.tiles[1][tile % kBackwardStages];
    float scores[kParts][kKeys / 8][4] = {}, grads[kParts][kKeys / 8][4] = {};
    add_scores<scalar_t, kWidth, kKeys, kParts>(scores, shared_query + Config::kWarpRows * warp * kStride, key_tile);
    add_scores<scalar_t, kWidth, kKeys, kParts>(grads, shared_grad_out + Config::kWarpRows * warp * kStride,
                                                value_tile);
    const int first_column = tile * kKeys + lane % 4 * 2;
    if (plain) {
      for_each_pair(scores, grads, [&](float& score, float& grad, int i, int) {
        grad = exp2_fast(score * factor - levels[i]) * (grad - deltas[i]);
      });
    }
    if (!plain || !range.is_whole(tile)) {
      int from[2 * kParts], to[2 * kParts];  // of this tile, in 32 bits
#pragma unroll
      for (int i = 0; i < 2 * kParts; ++i) {
        const int row = first_row + 8 * i;
        from[i] = within(positions.lower(row) - first_column, kKeys);
        to[i] = row < query_length ? within(positions.upper(row) - first_column, kKeys) : -kKeys;
      }
      if (plain) {
        for_each_score(
            grads, [&](float& grad, int i, int column) { grad = from[i] <= column && column < to[i] ? grad : 0.0f; });
      } else {
        const int place = tile * kKeys % 64;  // among them
        if (p.dropout.seed && (place == 0 || tile == range.first_tile)) {
          kept = kept_weights<kParts, 8>(p.dropout, batch, head, first_row, first_column - place);
        }
        const uint64_t kept_here = kept >> place / 4;
        const auto distance = static_cast<float>(first_row + positions.offset - first_column);
        for_each_pair(scores, grads, [&](float& score, float& grad, int i, int column) {
          const int row = first_row + 8 * i, key = first_column + column;
          bool is_seen = from[i] <= column && column < to[i];
          if (is_seen) {
            float* target = p.grad_scores ? p.grad_scores + (row_of_lse + row) * p.kv_length + key : nullptr;
            is_seen =
                scoring.differentiate(score, grad, row, key, distance + static_cast<float>(8 * i - column),
                                      !p.dropout.seed || (kept_here >> (16 * i + column / 8 * 2 + column % 2) & 1),
                                      levels[i], deltas[i], target);
          }
          grad = is_seen ? grad : 0.0f;
          score = is_seen ? score : -kInfinity;
        });
        if (p.mask) {
          seen.note(scores);
          __syncthreads();
          seen.template clear_others<kKeys>(key_tile);
          __syncthreads();
        }
      }
    }
    add_values<scalar_t, kWidth, kKeys, kParts>(sums, grads, key_tile);
  }

  __syncwarp();  // nobody reads the warp's rows of the query any more
  float factors[2 * kParts];
#pragma unroll
  for (float& number : factors) {
    number = p.scale;
  }
  const int first_warp_row = first_query + Config::kWarpRows * warp;
  auto* target = static_cast<scalar_t*>(p.grad_query) + rows.batch * p.grad_query_strides[0] +
                 head * p.grad_query_strides[1] + (sequence.query_begin + first_warp_row) * p.grad_query_strides[2];
  write_rows<scalar_t, kWidth, kParts>(sums, factors, shared_query + Config::kWarpRows * warp * kStride, target,
                                       p.grad_query_strides, min(Config::kWarpRows, query_length - first_warp_row),
                                       static_cast<int>(p.head_dim), p.grad_query_is_wide);
}

}  // namespace gpt4fast
