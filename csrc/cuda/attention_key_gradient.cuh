#pragma once

// The gradients of keys and values: a tile of them past the queries that see them, of all heads that share them.

#include "attention_backward_scores.cuh"

namespace gpt4fast {

// What the gradients take of a query beside its numbers: in the 16 bytes that pad their row in shared memory, which has
// no room left. kept: which weights of the 64 keys are, as kept_keys gives them, where there is dropout.
struct QueryNotes {
  float lse, delta;
  uint32_t kept[2];
};

// Of scores a lane has keys in rows, and queries in columns.
template <typename scalar_t, int kWidth>
__global__ void __launch_bounds__(KeyGradientConfig<scalar_t, kWidth>::kThreads, 1)
    attention_key_gradient_kernel(const BackwardLaunch p) {
  using Config = KeyGradientConfig<scalar_t, kWidth>;
  using HeadRows = Rows<scalar_t, kWidth, Config::kThreads>;
  constexpr int kKeys = Config::kRows, kQueries = Config::kTile, kParts = Config::kParts;
  constexpr int kStride = padded_width<scalar_t>(kWidth);
  constexpr bool kApart = Config::kWarps > Config::kRowWarps;  // a warp sums up the gradients of keys, or of values
  auto& shared = shared_memory<BackwardShared<scalar_t, kWidth, Config>>();
  auto &shared_key = shared.rows[0], &shared_value = shared.rows[1];
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int first_warp_row = warp % Config::kRowWarps * Config::kWarpRows;
  const bool sums_keys = !kApart || warp < Config::kRowWarps, sums_values = !kApart || !sums_keys;
  const auto kv_heads = static_cast<uint32_t>(p.kv_heads), group = static_cast<uint32_t>(p.query_heads) / kv_heads;
  const uint32_t kv_head = blockIdx.x % kv_heads;
  const Sequence sequence(p, blockIdx.x / kv_heads, p.key_tiles, kKeys, true);
  if (sequence.tile * kKeys >= sequence.key_length) {
    return;
  }
  const int64_t batch = sequence.batch;
  const auto first_key = static_cast<int>(sequence.tile) * kKeys;
  const auto key_length = static_cast<int>(sequence.key_length), query_length = static_cast<int>(sequence.query_length);
  const Positions positions(p, sequence);
  const auto range = seeing_queries<kQueries, kKeys>(positions, sequence, first_key);

  const BackwardRows<HeadRows> rows(p, sequence);
  const int begin = as_row(positions.start, key_length), end = as_row(positions.length, key_length);
  rows.keys(kv_head).template load<kKeys>(shared_key, first_key, begin, end);
  rows.values(kv_head).template load<kKeys>(shared_value, first_key, begin, end);

  const auto notes_of = [&](scalar_t* query_tile, int row) -> QueryNotes& {
    static_assert(sizeof(QueryNotes) == (kStride - kWidth) * sizeof(scalar_t));
    return *reinterpret_cast<QueryNotes*>(query_tile + row * kStride + kWidth);
  };
  // All tiles of one head, then those of the next.
  const auto count = static_cast<uint32_t>(range.tiles - range.first_tile), steps = count * group;
  const auto head_of = [&](uint32_t step) { return kv_head * group + step / count; };
  const auto tile_of = [&](uint32_t step) { return range.first_tile + static_cast<int>(step % count); };
  // The block's keys together: of the four that share a draw, each is another warp's.
  const auto draw_kept = [&](scalar_t* query_tile, uint32_t head, int first) {
    constexpr int kAtOnce = Config::kThreads / 16;  // queries
    static_assert(kQueries % kAtOnce == 0 && 64 % kKeys == 0);
    const int key = threadIdx.x % 16;
#pragma unroll 2
    for (int i = 0; i < kQueries; i += kAtOnce) {
      const int row = i + threadIdx.x / 16;
      const uint32_t kept = kept_keys(p.dropout, batch, head, first + row, first_key + key);
      if (key % 8 == 0) {
        notes_of(query_tile, row).kept[key / 8] = kept;
      }
    }
  };
  const auto request = [&](uint32_t step) {
    if (step < steps) {
      const uint32_t head = head_of(step);
      const int first = tile_of(step) * kQueries, row = threadIdx.x;
      scalar_t *query_tile = shared.tiles[0][step % kBackwardStages],
               *grad_out_tile = shared.tiles[1][step % kBackwardStages];
      rows.query(head).template load<kQueries>(query_tile, first, range.begin, range.end);
      rows.grad_out(head).template load<kQueries>(grad_out_tile, first, range.begin, range.end);
      if (row < kQueries) {
        const bool valid = range.begin <= first + row && first + row < range.end;
        const int64_t place = rows.first_of_head(head) + first + row;
        copy_async<4>(&notes_of(query_tile, row).lse, p.lse + place, valid);
        copy_async<4>(&notes_of(query_tile, row).delta, p.deltas + place, valid);
      }
      if (p.dropout.seed) {
        draw_kept(query_tile, head, first);
      }
    }
    commit_copies();
  };
  const bool plain = is_plain(p);
  const float factor = p.scale * kLog2E;
  const int first_row = first_key + first_warp_row + lane / 4;  // of a lane, which has each 8th below
  float sums[kApart ? 1 : 2][kParts][kWidth / 8][4] = {};       // of values, and of keys
  request(0);
#pragma unroll 1
  for (uint32_t step = 0; step < steps; ++step) {
    wait_for_copies<0>();
    __syncthreads();  // everyone's copies are there, and everyone is done with the tiles that are overwritten next
    request(step + 1);
    const uint32_t head = head_of(step);
    const int tile = tile_of(step), first_column = tile * kQueries + lane % 4 * 2;
    scalar_t *query_tile = shared.tiles[0][step % kBackwardStages],
             *grad_out_tile = shared.tiles[1][step % kBackwardStages];
    if (p.mask) {  // 0 * NaN: a query that sees nothing may be that, and is not multiplied
      for (int row = warp; row < kQueries; row += Config::kWarps) {
        for (int column = lane; notes_of(query_tile, row).lse == -kInfinity && column < kWidth; column += 32) {
          query_tile[row * kStride + column] = grad_out_tile[row * kStride + column] = static_cast<scalar_t>(0.0f);
        }
      }
      __syncthreads();
    }
    float scores[kParts][kQueries / 8][4] = {}, grads[kParts][kQueries / 8][4] = {};
    add_scores<scalar_t, kWidth, kQueries, kParts>(scores, shared_key + first_warp_row * kStride, query_tile);
    if (sums_keys) {
      add_scores<scalar_t, kWidth, kQueries, kParts>(grads, shared_value + first_warp_row * kStride, grad_out_tile);
    }
    const auto notes = [&](int column) -> const QueryNotes& { return notes_of(query_tile, lane % 4 * 2 + column); };
    if (plain) {
      for_each_pair(scores, grads, [&](float& score, float& grad, int, int column) {
        score = exp2_fast(score * factor - level_of(notes(column).lse));
        grad = score * (grad - notes(column).delta);
      });
    }
    if (!plain || !range.is_whole(tile)) {
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
          const bool is_kept = !p.dropout.seed || (notes(column).kept[i % 2] >> (row % 64 / 16 * 8 + row % 8) & 1) != 0;
          is_seen = scoring.differentiate(score, grad, query, row, distance + static_cast<float>(column - 8 * i),
                                          is_kept, level_of(notes(column).lse), notes(column).delta, nullptr);
        }
        score = is_seen ? score : 0.0f;
        grad = is_seen ? grad : 0.0f;
      });
    }
    if constexpr (kApart) {
      for_each_pair(scores, grads, [&](float& score, float& grad, int, int) { score = sums_keys ? grad : score; });
      add_values<scalar_t, kWidth, kQueries, kParts>(sums[0], scores, sums_keys ? query_tile : grad_out_tile);
    } else {
      add_values<scalar_t, kWidth, kQueries, kParts>(sums[0], scores, grad_out_tile);
      add_values<scalar_t, kWidth, kQueries, kParts>(sums[1], grads, query_tile);
    }
  }

  wait_for_copies<0>();  // of keys that no query met
  __syncthreads();
  const auto write = [&](const auto& sums, float number, scalar_t* shared_rows, void* gradient,
                         const int64_t (&strides)[4], int64_t columns, bool is_wide) {
    float factors[2 * kParts];
#pragma unroll
    for (float& each : factors) {
      each = number;
    }
    const int first = first_key + first_warp_row;
    auto* target = static_cast<scalar_t*>(gradient) + rows.batch * strides[0] + kv_head * strides[1] +
                   (sequence.key_begin + first) * strides[2];
    write_rows<scalar_t, kWidth, kParts>(sums, factors, shared_rows + first_warp_row * kStride, target, strides,
                                         min(Config::kWarpRows, key_length - first), static_cast<int>(columns),
                                         is_wide);
  };
  if (sums_values) {
    write(sums[0], 1.0f, shared_value, p.grad_value, p.grad_value_strides, p.value_dim, p.grad_value_is_wide);
  }
  if (sums_keys) {
    write(sums[kApart ? 0 : 1], p.scale, shared_key, p.grad_key, p.grad_key_strides, p.head_dim, p.grad_key_is_wide);
  }
}

}  // namespace gpt4fast
