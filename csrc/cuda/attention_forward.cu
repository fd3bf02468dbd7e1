// Attention of many queries (FlashAttention-2; Dao, 2023). A block takes a tile of a head's queries through the keys
// that they see: tiles of keys and of values arrive by asynchronous copies while earlier ones are multiplied, each warp
// keeps the maximum and the sums of its own 16 or 32 rows in registers, and the scores never leave them. With 16 rows
// to each warp and branches between loads and products it took four times as long as the Triton kernel on an H200, as
// it was 1.1 to 1.4 times, then without mask and dropout, which have not yet run on a GPU.
#include <optional>
#include <tuple>

#include <torch/csrc/stable/library.h>

#include "common/dtypes.h"
#include "common/empty.h"
#include "cuda/attention_forward_block.cuh"
#include "cuda/attention_forward_config.h"
#include "cuda/attention_forward_hopper.h"

namespace gpt4fast {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using Optional = std::optional<Tensor>;

template <typename scalar_t, int kWidth, bool kAlters>
struct alignas(16) AttentionShared {
  using Config = AttentionConfig<scalar_t, kWidth, kAlters>;
  static constexpr int kTile = Config::kKeys * padded_width<scalar_t>(kWidth);
  scalar_t query[Config::kRows * padded_width<scalar_t>(kWidth)];
  scalar_t keys[Config::kStages][kTile], values[Config::kStages][kTile];
};

template <typename scalar_t, int kWidth, bool kAlters>
__global__ void __launch_bounds__(AttentionConfig<scalar_t, kWidth, kAlters>::kThreads, 1)
    attention_forward_kernel(const AttentionLaunch p) {
  using Config = AttentionConfig<scalar_t, kWidth, kAlters>;
  using HeadRows = Rows<scalar_t, kWidth, Config::kThreads>;
  constexpr int kRows = Config::kRows, kKeys = Config::kKeys, kStages = Config::kStages, kParts = Config::kParts;
  constexpr int kStride = padded_width<scalar_t>(kWidth);
  auto& shared = shared_memory<AttentionShared<scalar_t, kWidth, kAlters>>();
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
  const auto request = [&](const HeadRows& from, scalar_t(&stages)[kStages][kKeys* kStride], int tile) {
    if (tile < range.tiles) {
      from.template load<kKeys>(stages[tile % kStages], tile * kKeys, range.begin, range.end);
    }
    commit_copies();  // the first group has the query, too
  };
  const auto wait = [&] {
    wait_for_copies<2 * kStages - 2>();
    __syncthreads();  // everyone's copies are there, and everyone is done with the tile that is overwritten next
  };

  const SeenKeys<scalar_t, kWidth, Config::kWarpRows, Config::kWarps> seen{shared.query};
  // exp(scale * score) = 2^(factor * score), unless scores are changed before.
  const bool is_plain = p.softcap == 0.0f && !p.alibi_slopes && !(kAlters && p.mask) && p.scale > 0.0f;
  const float factor = is_plain ? p.scale * kLog2E : 1.0f;
  const int first_row = first_query + Config::kWarpRows * warp + lane / 4;  // of a lane, which has each 8th below
  float peaks[2 * kParts], totals[2 * kParts] = {}, out[kParts][kWidth / 8][4] = {};
#pragma unroll
  for (float& peak : peaks) {
    peak = -kInfinity;
  }
  query.template load<kRows>(shared.query, first_query, 0, query_length);
#pragma unroll
  for (int stage = 0; stage < kStages; ++stage) {
    request(keys, shared.keys, range.first_tile + stage);
    if (stage < kStages - 1) {
      request(values, shared.values, range.first_tile + stage);
    }
  }
#pragma unroll 1
  for (int tile = range.first_tile; tile < range.tiles; ++tile) {
    float scores[kParts][kKeys / 8][4] = {};
    wait();
    request(values, shared.values, tile + kStages - 1);
    add_scores<scalar_t, kWidth, kKeys, kParts>(scores, shared.query + Config::kWarpRows * warp * kStride,
                                                shared.keys[tile % kStages]);
    const int first_column = tile * kKeys + lane % 4 * 2;
    if (!is_plain) {
      bend_scores(p, scores, sequence.batch, head.query,
                  static_cast<float>(first_row + positions.offset - first_column));
    }
    if ((kAlters && p.mask) || !range.is_whole(tile)) {
      int from[2 * kParts], to[2 * kParts];
      see_columns<kParts, kKeys>(positions, first_row, first_column, from, to);
      if (kAlters) {
#pragma unroll
        for (int i = 0; i < 2 * kParts; ++i) {
          to[i] = first_row + 8 * i < query_length ? to[i] : -kKeys;  // what a mask has no row for
        }
      }
      for_each_score(scores, [&](float& score, int i, int column) {
        score = from[i] <= column && column < to[i] ? score : -kInfinity;
      });
      if (kAlters && p.mask) {
        const MaskOfHead mask(p, sequence.batch, head.query);
        for_each_score(scores, [&](float& score, int i, int column) {
          if (from[i] <= column && column < to[i]) {
            const float bias = mask.read(first_row + 8 * i, first_column + column);
            score = bias == -kInfinity ? bias : score + bias;
          }
        });
        seen.note(scores);
      }
    }
    exponentiate(scores, factor, peaks, totals, [&](int i, float by) { shrink_row(out, i, by); });
    if (kAlters && p.dropout.seed) {
      const uint64_t kept =
          kept_weights<kParts, kKeys / 8>(p.dropout, sequence.batch, head.query, first_row, first_column);
      for_each_score(scores, [&](float& score, int i, int column) {
        score = kept >> (kKeys / 4 * i + column / 8 * 2 + column % 2) & 1 ? score : 0.0f;
      });
    }
    wait();
    request(keys, shared.keys, tile + kStages);
    if (kAlters && p.mask) {
      seen.template clear_others<kKeys>(shared.values[tile % kStages]);
      __syncthreads();
    }
    add_values<scalar_t, kWidth, kKeys, kParts>(out, scores, shared.values[tile % kStages]);
  }

  // Through the rows of the query that the warp alone has read, to be written in whole rows.
  wait_for_copies<0>();  // of a query that no key met
  __syncthreads();
  scalar_t* staged = shared.query + Config::kWarpRows * warp * kStride;
  float shares[2 * kParts];
  write_lse<kParts>(p.lse + rows.first_of_head(head.query), first_row, query_length, kAlters ? p.dropout.scale : 1.0f,
                    peaks, totals, shares);
  const int first_warp_row = first_query + Config::kWarpRows * warp;
  auto* result = static_cast<scalar_t*>(p.out) + rows.batch * p.out_strides[0] + head.query * p.out_strides[1] +
                 (sequence.query_begin + first_warp_row) * p.out_strides[2];
  write_rows<scalar_t, kWidth, kParts>(out, shares, staged, result, p.out_strides,
                                       min(Config::kWarpRows, query_length - first_warp_row),
                                       static_cast<int>(p.value_dim), p.out_is_wide);
}

template <typename scalar_t, int kWidth, bool kAlters>
void launch(const Device& device, AttentionLaunch& p) {
  using Config = AttentionConfig<scalar_t, kWidth, kAlters>;
  constexpr size_t kSharedBytes = sizeof(AttentionShared<scalar_t, kWidth, kAlters>);
  static_assert(kSharedBytes <= kMostSharedBytes);
  device.launch(attention_forward_kernel<scalar_t, kWidth, kAlters>, query_blocks(p, Config::kRows), Config::kThreads,
                kSharedBytes, p);
}

template <typename scalar_t, int kWidth>
void run(const Device& device, AttentionLaunch& p) {
  if (kRegistersAreFull<scalar_t, kWidth> && !p.mask && !p.dropout.seed) {
    launch<scalar_t, kWidth, !kRegistersAreFull<scalar_t, kWidth>>(device, p);
  } else {
    launch<scalar_t, kWidth, true>(device, p);
  }
}

std::tuple<Tensor, Tensor> forward(const Tensor& query, const Tensor& key, const Tensor& value,
                                   const Optional& attn_mask, double dropout_p, const Optional& dropout_seed,
                                   bool is_causal, double scale, int64_t query_offset, const Optional& query_offsets,
                                   const Optional& kv_lengths, const Optional& kv_starts, int64_t window_left,
                                   int64_t window_right, double softcap, const Optional& alibi_slopes,
                                   const Optional& cu_seqlens_q, const Optional& cu_seqlens_k, bool heads_first) {
  CHECK_CUDA(query);
  const Device device(query);
  const AttentionSettings settings = {attn_mask,    dropout_p,     dropout_seed, is_causal,    scale,
                                      query_offset, query_offsets, kv_lengths,   kv_starts,    window_left,
                                      window_right, softcap,       alibi_slopes, cu_seqlens_q, cu_seqlens_k};
  AttentionLaunch p{};
  set_attention_params(query, key, value, settings, p);
  p.dropout = Dropout(settings, query);
  const int64_t width = checked_width(p, 256);
  const std::array<int64_t, 4> sizes = {query.size(0), p.query_heads, p.query_length, p.value_dim};
  const std::array<size_t, 4> order =
      heads_first ? std::array<size_t, 4>{0, 1, 2, 3} : std::array<size_t, 4>{0, 2, 1, 3};
  const Tensor out = device.fresh(empty_beside(query, sizes, query.scalar_type(), order));
  const Tensor lse =
      device.fresh(torch::stable::new_empty(query, {query.size(0), p.query_heads, p.query_length}, ScalarType::Float));
  p.out = out.mutable_data_ptr();
  copy_strides(out, p.out_strides);
  p.lse = lse.mutable_data_ptr<float>();
  p.query_is_wide = has_wide_rows(query);
  p.key_is_wide = has_wide_rows(key);
  p.value_is_wide = has_wide_rows(value);
  p.out_is_wide = has_wide_rows(out);
  allow_attention(query, key, value, settings);
  if (lse.numel() > 0) {
    DTYPE_SWITCH(query.scalar_type(), "query", scalar_t, [&] {
      if constexpr (sizeof(scalar_t) == 2) {
        if (takes_hopper(device, p)) {
          return attend_on_hopper<scalar_t>(device, p);
        }
      }
      const auto run_width = width <= 64 ? run<scalar_t, 64> : width <= 128 ? run<scalar_t, 128> : run<scalar_t, 256>;
      run_width(device, p);
    });
  }
  return {out, lse};
}

}  // namespace
}  // namespace gpt4fast

STABLE_TORCH_LIBRARY_IMPL(gpt4fast, GPT4FAST_CUDA_KEY, m) {
  m.impl("attention_forward", TORCH_BOX(&gpt4fast::forward));
}
