// Attention of many queries by Hopper's products (wgmma), which a group of four warps starts for its 64 rows and which
// read keys and values from shared memory by themselves: as attention_forward.cu, but the products of a tile's weights
// and values go on, and the scores of the next tile are computed, while the weights of those are taken (the pipeline
// within a warpgroup of FlashAttention-3; Shah et al., 2024). Not yet run on a GPU.
#include "cuda/attention_forward_hopper.h"

#include "cuda/attention_forward_config.h"
#include "cuda/swizzled_tile.cuh"

namespace gpt4fast {
namespace {

template <typename scalar_t, int kWidth>
struct alignas(kSwizzleBytes) HopperShared {
  using Config = HopperAttentionConfig<kWidth>;
  scalar_t query[Config::kRows * kWidth];
  scalar_t keys[Config::kStages][Config::kKeys * kWidth], values[Config::kStages][Config::kKeys * kWidth];
};

template <typename scalar_t, int kWidth>
__global__ void __launch_bounds__(HopperAttentionConfig<kWidth>::kThreads, 1)
    attention_forward_hopper_kernel(const AttentionLaunch p) {
  using Config = HopperAttentionConfig<kWidth>;
  using HeadRows = Rows<scalar_t, kWidth, Config::kThreads>;
  using QueryTile = SwizzledTile<Config::kRows>;
  using KeyTile = SwizzledTile<Config::kKeys>;
  constexpr int kRows = Config::kRows, kKeys = Config::kKeys, kStages = Config::kStages;
  constexpr int kColumns = kWidth < 128 ? kWidth : 128;  // of one product's sums
  auto& shared = shared_memory<HopperShared<scalar_t, kWidth>>();
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const BlockHead head(p);
  const Sequence sequence = block_sequence(p, p.tiles, kRows);
  if (sequence.tile * kRows >= sequence.query_length) {
    return;
  }
  const Positions positions(p, sequence);
  const int first_query = static_cast<int>(sequence.tile) * kRows;
  const auto query_length = static_cast<int>(sequence.query_length);
  const auto range = seen_keys<kKeys, kRows>(positions, sequence, first_query);

  const SequenceRows<AttentionLaunch, HeadRows> rows(p, sequence);
  const HeadRows query = rows.query(head.query), keys = rows.keys(head.key), values = rows.values(head.key);
  const auto request = [&](const HeadRows& from, scalar_t(&stages)[kStages][kKeys* kWidth], int tile) {
    if (tile < range.tiles) {
      from.template load<kKeys, KeyTile>(stages[tile % kStages], tile * kKeys, range.begin, range.end);
    }
  };

  const bool is_plain = p.softcap == 0.0f && !p.alibi_slopes && p.scale > 0.0f;  // see attention_forward.cu
  const float factor = is_plain ? p.scale * kLog2E : 1.0f;
  const int first_row = first_query + 16 * warp + lane / 4;  // of a lane, which has the 8th below, too
  float peaks[2] = {-kInfinity, -kInfinity}, totals[2] = {}, shrinks[2];
  float scores[1][kKeys / 8][4], out[1][kWidth / 8][4] = {};
  uint32_t weights[kKeys / 16][4];

  const auto start_scores = [&](int tile) {
#pragma unroll
    for (int d = 0; d < kWidth; d += 16) {
      start_product<scalar_t, kKeys>(scores[0], QueryTile::descriptor(shared.query, warp / 4 * 64, d),
                                     KeyTile::descriptor(shared.keys[tile % kStages], 0, d), d > 0);
    }
    commit_products();
  };
  const auto start_values = [&](int tile) {
#pragma unroll
    for (int k = 0; k < kKeys / 16; ++k) {
#pragma unroll
      for (int column = 0; column < kWidth; column += kColumns) {
        start_product<scalar_t, kColumns>(reinterpret_cast<float (&)[kColumns / 8][4]>(out[0][column / 8]), weights[k],
                                          KeyTile::descriptor(shared.values[tile % kStages], 16 * k, column));
      }
    }
    commit_products();
  };
  // What the scores of a tile, which have arrived, weigh.
  const auto weigh = [&](int tile) {
    const int first_column = tile * kKeys + lane % 4 * 2;
    if (!is_plain) {
      bend_scores(p, scores, sequence.batch, head.query,
                  static_cast<float>(first_row + positions.offset - first_column));
    }
    if (!range.is_whole(tile)) {
      int from[2], to[2];
      see_columns<1, kKeys>(positions, first_row, first_column, from, to);
      for_each_score(scores, [&](float& score, int i, int column) {
        score = from[i] <= column && column < to[i] ? score : -kInfinity;
      });
    }
    exponentiate(scores, factor, peaks, totals, [&](int i, float by) { shrinks[i] = by; });
  };
  // Makes the scores that were weighed ready to be multiplied, once the products of those before are there. That is
  // where the loop begins, not where it ends: there nvcc 13.0 waits before it weighs.
  const auto take_weights = [&] {
    wait_for_products<0>();
    settle(out[0]);
    settle(weights);
    shrink_row(out, 0, shrinks[0]);
    shrink_row(out, 1, shrinks[1]);
#pragma unroll
    for (int k = 0; k < kKeys / 16; ++k) {
      pack_weights<scalar_t>(weights[k], scores[0][2 * k], scores[0][2 * k + 1]);
    }
    settle(out[0]);
    settle(weights);
  };
  const auto synchronize = [&] {
    publish_writes();
    __syncthreads();
  };

  query.template load<kRows, QueryTile>(shared.query, first_query, 0, query_length);
  request(keys, shared.keys, range.first_tile);
  commit_copies();
  request(values, shared.values, range.first_tile);
  request(keys, shared.keys, range.first_tile + 1);
  commit_copies();
  if (range.first_tile < range.tiles) {
    wait_for_copies<1>();
    synchronize();
    fence_products();
    start_scores(range.first_tile);
    wait_for_products<0>();
    settle(scores[0]);
    weigh(range.first_tile);
#pragma unroll 1
    for (int tile = range.first_tile; tile < range.tiles - 1; ++tile) {
      take_weights();
      wait_for_copies<0>();
      synchronize();  // everyone is done with the tiles that are overwritten next
      request(values, shared.values, tile + 1);
      request(keys, shared.keys, tile + 2);
      commit_copies();
      fence_products();
      start_scores(tile + 1);
      start_values(tile);
      wait_for_products<1>();
      settle(scores[0]);
      weigh(tile + 1);
    }
    take_weights();
    wait_for_copies<0>();
    synchronize();
    fence_products();
    start_values(range.tiles - 1);
    wait_for_products<0>();
    settle(out[0]);
  }

  // Through what held keys and values, to be written in whole rows.
  wait_for_copies<0>();  // of a query that no key met
  __syncthreads();
  float shares[2];
  write_lse<1>(p.lse + rows.first_of_head(head.query), first_row, query_length, 1.0f, peaks, totals, shares);
  static_assert(sizeof(shared.keys) + sizeof(shared.values) >=
                kRows * padded_width<scalar_t>(kWidth) * sizeof(scalar_t));
  scalar_t* staged = &shared.keys[0][0] + 16 * warp * padded_width<scalar_t>(kWidth);
  const int first_warp_row = first_query + 16 * warp;
  auto* result = static_cast<scalar_t*>(p.out) + rows.batch * p.out_strides[0] + head.query * p.out_strides[1] +
                 (sequence.query_begin + first_warp_row) * p.out_strides[2];
  write_rows<scalar_t, kWidth, 1>(out, shares, staged, result, p.out_strides, min(16, query_length - first_warp_row),
                                  static_cast<int>(p.value_dim), p.out_is_wide);
}

template <typename scalar_t, int kWidth>
void launch(const Device& device, AttentionLaunch& p) {
  using Config = HopperAttentionConfig<kWidth>;
  constexpr size_t kSharedBytes = sizeof(HopperShared<scalar_t, kWidth>);
  static_assert(kSharedBytes <= kHopperSharedBytes);
  device.launch(attention_forward_hopper_kernel<scalar_t, kWidth>, query_blocks(p, Config::kRows), Config::kThreads,
                kSharedBytes, p);
}

}  // namespace

template <typename scalar_t>
void attend_on_hopper(const Device& device, AttentionLaunch& p) {
  const int64_t width = std::max(p.head_dim, p.value_dim);
  (width <= 64 ? launch<scalar_t, 64> : width <= 128 ? launch<scalar_t, 128> : launch<scalar_t, 256>)(device, p);
}

template void attend_on_hopper<BFloat16>(const Device&, AttentionLaunch&);
template void attend_on_hopper<Half>(const Device&, AttentionLaunch&);

}  // namespace gpt4fast
