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
#include "cuda/attention_forward_config.h"
#include "cuda/attention_tiles.cuh"
#include "cuda/attention_weights.cuh"

namespace gpt4fast {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using Optional = std::optional<Tensor>;

struct AttentionLaunch : AttentionForwardParams {
  Dropout dropout;
  int64_t tiles;                                                // of queries: of a sequence, or of all packed ones
  bool query_is_wide, key_is_wide, value_is_wide, out_is_wide;  // rows can be moved 16 bytes at a time
};

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
  const auto heads = static_cast<uint32_t>(p.query_heads);
  const uint32_t head = blockIdx.x % heads, kv_head = head / (heads / static_cast<uint32_t>(p.kv_heads));
  // The last queries first: causal ones have most to do.
  const Sequence sequence(p, gridDim.x / heads - 1 - blockIdx.x / heads, p.tiles, kRows, false);
  if (sequence.tile * kRows >= sequence.query_length) {
    return;
  }
  const int64_t batch = sequence.batch;
  const int64_t batch_in_memory = p.cu_seqlens_q ? 0 : batch;  // packed sequences lie in one
  const auto first_query = static_cast<int>(sequence.tile) * kRows;
  const auto query_length = static_cast<int>(sequence.query_length);

  const Positions positions(p, sequence);
  const auto as_key = [&](int64_t key) { return as_row(key, sequence.key_length); };
  const int last_query = min(first_query + kRows, query_length) - 1;
  const int first_key = as_key(positions.lower(first_query)), last_key = as_key(positions.upper(last_query));
  const int first_tile = first_key / kKeys, tiles = first_key < last_key ? (last_key + kKeys - 1) / kKeys : first_tile;
  // Tiles of which each of the block's queries sees all.
  const int first_whole = (as_key(positions.lower(last_query)) + kKeys - 1) / kKeys,
            wholes = as_key(positions.upper(first_query)) / kKeys;

  const HeadRows query(p.query, p.query_strides, batch_in_memory, head, sequence.query_begin, p.head_dim,
                       p.query_is_wide);
  const HeadRows keys(p.key, p.key_strides, batch_in_memory, kv_head, sequence.key_begin, p.head_dim, p.key_is_wide);
  const HeadRows values(p.value, p.value_strides, batch_in_memory, kv_head, sequence.key_begin, p.value_dim,
                        p.value_is_wide);
  const auto request = [&](const HeadRows& rows, scalar_t(&stages)[kStages][kKeys* kStride], int tile) {
    if (tile < tiles) {
      rows.template load<kKeys>(stages[tile % kStages], tile * kKeys, first_key, last_key);
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
    request(keys, shared.keys, first_tile + stage);
    if (stage < kStages - 1) {
      request(values, shared.values, first_tile + stage);
    }
  }
#pragma unroll 1
  for (int tile = first_tile; tile < tiles; ++tile) {
    float scores[kParts][kKeys / 8][4] = {};
    wait();
    request(values, shared.values, tile + kStages - 1);
    add_scores<scalar_t, kWidth, kKeys, kParts>(scores, shared.query + Config::kWarpRows * warp * kStride,
                                                shared.keys[tile % kStages]);
    const int first_column = tile * kKeys + lane % 4 * 2;
    if (!is_plain) {
      if (p.softcap != 0.0f) {
        const float scale = p.scale / p.softcap, cap = p.softcap * kLog2E;
        for_each_score(scores, [&](float& score, int, int) { score = cap * tanhf(scale * score); });
      } else {
        const float scale = p.scale * kLog2E;
        for_each_score(scores, [&](float& score, int, int) { score *= scale; });
      }
      if (p.alibi_slopes) {
        const float slope = kLog2E * p.alibi_slopes[batch * p.alibi_strides[0] + head * p.alibi_strides[1]];
        const auto distance = static_cast<float>(first_row + positions.offset - first_column);
        for_each_score(scores, [&](float& score, int i, int column) {
          score -= slope * fabsf(distance + static_cast<float>(8 * i - column));
        });
      }
    }
    if ((kAlters && p.mask) || tile < first_whole || wholes <= tile) {
      int from[2 * kParts], to[2 * kParts];  // of this tile, in 32 bits
#pragma unroll
      for (int i = 0; i < 2 * kParts; ++i) {
        const int64_t row = first_row + 8 * i;  // with 32 bits nvcc 13.0 spilled five registers more
        from[i] = within(positions.lower(row) - first_column, kKeys);
        to[i] = !kAlters || row < query_length ? within(positions.upper(row) - first_column, kKeys) : -kKeys;
      }
      for_each_score(scores, [&](float& score, int i, int column) {
        score = from[i] <= column && column < to[i] ? score : -kInfinity;
      });
      if (kAlters && p.mask) {
        const MaskOfHead mask(p, batch, head);
        for_each_score(scores, [&](float& score, int i, int column) {
          if (from[i] <= column && column < to[i]) {
            const float bias = mask.read(first_row + 8 * i, first_column + column);
            score = bias == -kInfinity ? bias : score + bias;
          }
        });
        seen.note(scores);
      }
    }
    exponentiate(scores, factor, peaks, totals, out);
    if (kAlters && p.dropout.seed) {
      const uint64_t kept = kept_weights<kParts, kKeys / 8>(p.dropout, batch, head, first_row, first_column);
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
  scalar_t* rows = shared.query + Config::kWarpRows * warp * kStride;
  float shares[2 * kParts];
#pragma unroll
  for (int i = 0; i < 2 * kParts; ++i) {
    float total = totals[i];
    total += __shfl_xor_sync(0xFFFFFFFFu, total, 1);
    total += __shfl_xor_sync(0xFFFFFFFFu, total, 2);
    shares[i] = total == 0.0f ? 0.0f : (kAlters ? p.dropout.scale : 1.0f) / total;
    const int row = first_row + 8 * i;
    if (lane % 4 == 0 && row < query_length) {
      p.lse[(batch_in_memory * p.query_heads + head) * p.query_length + sequence.query_begin + row] =
          total == 0.0f ? -kInfinity : (peaks[i] + log2f(total)) * kLn2;
    }
  }
  const int first_warp_row = first_query + Config::kWarpRows * warp;
  auto* result = static_cast<scalar_t*>(p.out) + batch_in_memory * p.out_strides[0] + head * p.out_strides[1] +
                 (sequence.query_begin + first_warp_row) * p.out_strides[2];
  write_rows<scalar_t, kWidth, kParts>(out, shares, rows, result, p.out_strides,
                                       min(Config::kWarpRows, query_length - first_warp_row),
                                       static_cast<int>(p.value_dim), p.out_is_wide);
}

template <typename scalar_t, int kWidth, bool kAlters>
void launch(const Device& device, AttentionLaunch& p) {
  using Config = AttentionConfig<scalar_t, kWidth, kAlters>;
  constexpr size_t kSharedBytes = sizeof(AttentionShared<scalar_t, kWidth, kAlters>);
  static_assert(kSharedBytes <= kMostSharedBytes);
  // Each packed sequence may end with a tile that is not full.
  p.tiles = ceil_div(p.query_length, Config::kRows) + (p.cu_seqlens_q ? p.batch : 0);
  const int64_t sequences = p.cu_seqlens_q ? 1 : p.batch;
  device.launch(attention_forward_kernel<scalar_t, kWidth, kAlters>, sequences * p.tiles * p.query_heads,
                Config::kThreads, kSharedBytes, p);
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
