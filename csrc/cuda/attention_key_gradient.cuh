#pragma once

// The gradients of keys and values: a tile of them past the queries that see them, of all heads that share them.

#include "attention_backward_scores.cuh"

namespace gpt4fast {

// Of scores a lane has keys in rows, and queries in columns.
template <typename scalar_t, int kWidth>
__global__ void __launch_bounds__(KeyGradientConfig<scalar_t, kWidth>::kThreads, 1)
    attention_key_gradient_kernel(const BackwardLaunch p) {
  using Config = KeyGradientConfig<scalar_t, kWidth>;
  using HeadRows = Rows<scalar_t, kWidth, Config::kThreads>;
  constexpr int kKeys = Config::kRows, kQueries = Config::kTile, kParts = Config::kParts;
  constexpr int kStride = padded_width<scalar_t>(kWidth);
  auto& shared = shared_memory<BackwardShared<scalar_t, kWidth, Config>>();
  auto &shared_key = shared.rows[0], &shared_value = shared.rows[1];
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const auto kv_heads = static_cast<uint32_t>(p.kv_heads), group = static_cast<uint32_t>(p.query_heads) / kv_heads;
  const uint32_t kv_head = blockIdx.x % kv_heads;
  const Sequence sequence(p, blockIdx.x / kv_heads, p.key_tiles, kKeys, true);
  if (sequence.tile * kKeys >= sequence.key_length) {
    return;
  }
  const int64_t batch = sequence.batch, batch_in_memory = p.cu_seqlens_q ? 0 : batch;
  const auto first_key = static_cast<int>(sequence.tile) * kKeys;
  const auto key_length = static_cast<int>(sequence.key_length), query_length = static_cast<int>(sequence.query_length);
  const Positions positions(p, sequence);
  const auto as_query = [&](int64_t query) { return as_row(query, query_length); };
  // The queries that see any of the tile's keys, which lie side by side, and the tiles of them.
  const int64_t first_seen = max(int64_t{first_key}, positions.start),
                last_seen = min(int64_t{min(first_key + kKeys, key_length)}, positions.length) - 1;
  const bool any_seen = first_seen <= last_seen;
  const int low = any_seen ? as_query(positions.first(first_seen)) : 0,
            high = any_seen ? as_query(positions.last(last_seen, query_length)) : 0;
  const int first_tile = low / kQueries, tiles = low < high ? (high + kQueries - 1) / kQueries : first_tile;
  // Tiles of which each query sees all of the block's keys.
  const bool all_exist = positions.start <= first_key && first_key + kKeys <= positions.length;
  const int first_whole = (as_query(positions.first(first_key + kKeys - 1)) + kQueries - 1) / kQueries,
            wholes = all_exist ? as_query(positions.last(first_key, query_length)) / kQueries : 0;

  const HeadRows keys(p.key, p.key_strides, batch_in_memory, kv_head, sequence.key_begin, p.head_dim, p.key_is_wide);
  const HeadRows values(p.value, p.value_strides, batch_in_memory, kv_head, sequence.key_begin, p.value_dim,
                        p.value_is_wide);
  const int begin = as_row(positions.start, key_length), end = as_row(positions.length, key_length);
  keys.template load<kKeys>(shared_key, first_key, begin, end);
  values.template load<kKeys>(shared_value, first_key, begin, end);

  // All tiles of one head, then those of the next.
  const auto count = static_cast<uint32_t>(tiles - first_tile), steps = count * group;
  const auto head_of = [&](uint32_t step) { return kv_head * group + step / count; };
  const auto tile_of = [&](uint32_t step) { return first_tile + static_cast<int>(step % count); };
  const auto request = [&](uint32_t step) {
    if (step < steps) {
      const uint32_t head = head_of(step), slot = step % kBackwardStages;
      const int first = tile_of(step) * kQueries;
      const HeadRows query(p.query, p.query_strides, batch_in_memory, head, sequence.query_begin, p.head_dim,
                           p.query_is_wide);
      const HeadRows grad_out(p.grad_out, p.grad_out_strides, batch_in_memory, head, sequence.query_begin, p.value_dim,
                              p.grad_out_is_wide);
      query.template load<kQueries>(shared.tiles[0][slot], first, low, high);
      grad_out.template load<kQueries>(shared.tiles[1][slot], first, low, high);
      const int64_t row_of_lse = (batch_in_memory * p.query_heads + head) * p.query_length + sequence.query_begin;
      const int row = threadIdx.x;
      if (row < kQueries) {
        const bool valid = low <= first + row && first + row < high;
        copy_async<4>(&shared.lse[slot][row], p.lse + row_of_lse + first + row, valid);
        copy_async<4>(&shared.deltas[slot][row], p.deltas + row_of_lse + first + row, valid);
      }
    }
    commit_copies();
  };
  const bool plain = is_plain(p);
  const float factor = p.scale * kLog2E;
  const int first_row = first_key + Config::kWarpRows * warp + lane / 4;  // of a lane, which has each 8th below
  const scalar_t *key_rows = shared_key + Config::kWarpRows * warp * kStride,
                 *value_rows = shared_value + Config::kWarpRows * warp * kStride;
  float key_sums[kParts][kWidth / 8][4] = {}, value_sums[kParts][kWidth / 8][4] = {};
  request(0);
#pragma unroll 1
  for (uint32_t step = 0; step < steps; ++step) {
    wait_for_copies<0>();
    __syncthreads();  // everyone's copies are there, and everyone is done with the tiles that are overwritten next
    request(step + 1);
    const uint32_t head = head_of(step), slot = step % kBackwardStages;
    const int tile = tile_of(step), first_column = tile * kQueries + lane % 4 * 2;
    scalar_t *query_tile = shared.tiles[0][slot], *grad_out_tile = shared.tiles[1][slot];
    const float *lse = shared.lse[slot] + lane % 4 * 2, *deltas = shared.deltas[slot] + lane % 4 * 2;
    if (p.mask) {  // 0 * NaN: a query that sees nothing may be that, and is not multiplied
      for (int row = warp; row < kQueries; row += Config::kWarps) {
        for (int column = lane; shared.lse[slot][row] == -kInfinity && column < kWidth; column += 32) {
          query_tile[row * kStride + column] = grad_out_tile[row * kStride + column] = static_cast<scalar_t>(0.0f);
        }
      }
      __syncthreads();
    }
    float scores[kParts][kQueries / 8][4] = {}, grads[kParts][kQueries / 8][4] = {};
    add_scores<scalar_t, kWidth, kQueries, kParts>(scores, key_rows, query_tile);
    add_scores<scalar_t, kWidth, kQueries, kParts>(grads, value_rows, grad_out_tile);
    if (plain) {
      for_each_pair(scores, grads, [&](float& score, float& grad, int, int column) {
        score = exp2_fast(score * factor - level_of(lse[column]));
        grad = score * (grad - deltas[column]);
      });
    }
    if (!plain || tile < first_whole || wholes <= tile) {
      int from[2 * kParts], to[2 * kParts];  // of this tile, in 32 bits
#pragma unroll
      for (int i = 0; i < 2 * kParts; ++i) {
        const int row = first_row + 8 * i;
        from[i] = within(positions.first(row) - first_column, kQueries);
        to[i] = within(positions.last(row, query_length) - first_column, kQueries);
      }
      const Scores scoring(p, batch, head);
      const auto distance = static_cast<float>(first_column + positions.offset - first_row);
      for_each_pair(scores, grads, [&](float& score, float& grad, int i, int column) {
        const int row = first_row + 8 * i, query = first_column + column;
        bool is_seen = from[i] <= column && column < to[i];
        if (is_seen && !plain) {
          bool is_kept = true;
          if (p.dropout.seed) {
            uint32_t words[4];
            draw_words(words, static_cast<uint64_t>(*p.dropout.seed), batch, head, query, row);
            is_kept = word_of(words, row) > p.dropout.last_dropped;
          }
          is_seen = scoring.differentiate(score, grad, query, row, distance + static_cast<float>(column - 8 * i),
                                          is_kept, level_of(lse[column]), deltas[column], nullptr);
        }
        score = is_seen ? score : 0.0f;
        grad = is_seen ? grad : 0.0f;
      });
    }
    add_values<scalar_t, kWidth, kQueries, kParts>(value_sums, scores, grad_out_tile);
    add_values<scalar_t, kWidth, kQueries, kParts>(key_sums, grads, query_tile);
  }

  wait_for_copies<0>();  // of keys that no query met
  __syncthreads();
  const int first_warp_row = first_key + Config::kWarpRows * warp;
  const auto write = [&](const auto& sums, float number, scalar_t* rows, void* gradient, const int64_t (&strides)[4],
                         int64_t columns, bool is_wide) {
    float factors[2 * kParts];
#pragma unroll
    for (float& each : factors) {
      each = number;
    }
    auto* target = static_cast<scalar_t*>(gradient) + batch_in_memory * strides[0] + kv_head * strides[1] +
                   (sequence.key_begin + first_warp_row) * strides[2];
    write_rows<scalar_t, kWidth, kParts>(sums, factors, rows + Config::kWarpRows * warp * kStride, target, strides,
                                         min(Config::kWarpRows, key_length - first_warp_row), static_cast<int>(columns),
                                         is_wide);
  };
  write(key_sums, p.scale, shared_key, p.grad_key, p.grad_key_strides, p.head_dim, p.grad_key_is_wide);
  write(value_sums, 1.0f, shared_value, p.grad_value, p.grad_value_strides, p.value_dim, p.grad_value_is_wide);
}

}  // namespace gpt4fast
