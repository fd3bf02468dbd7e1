// Attention of many queries (FlashAttention-2; Dao, 2023). A block takes a tile of a head's queries through the keys
// that they see: tiles of keys and of values arrive by asynchronous copies while earlier ones are multiplied, each warp
// keeps the maximum and the sums of its own 16 or 32 rows in registers, and the scores never leave them. Without mask,
// dropout and gradient. With 16 rows to each warp and branches between loads and products it took four times as long as
// the Triton kernel on an H200, as it is 1.1 to 1.4 times.
#include <optional>
#include <tuple>

#include <torch/csrc/stable/library.h>

#include "attention_arguments.h"
#include "common/dtypes.h"
#include "common/empty.h"
#include "cuda/attention_forward_config.h"
#include "cuda/attention_products.cuh"
#include "cuda/launch.h"

namespace gpt4fast {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using Optional = std::optional<Tensor>;

struct AttentionLaunch : AttentionForwardParams {
  int64_t tiles;                                                // of queries: of a sequence, or of all packed ones
  bool query_is_wide, key_is_wide, value_is_wide, out_is_wide;  // rows can be moved 16 bytes at a time
};

template <typename scalar_t, int kWidth>
struct alignas(16) AttentionShared {
  using Config = AttentionConfig<scalar_t, kWidth>;
  static constexpr int kTile = Config::kKeys * padded_width<scalar_t>(kWidth);
  scalar_t query[Config::kRows * padded_width<scalar_t>(kWidth)];
  scalar_t keys[Config::kStages][kTile], values[Config::kStages][kTile];
};

// A sequence's queries and keys: [begin, begin + length) of the tensors.
struct Sequence {
  int64_t batch, tile, query_begin, query_length, key_begin, key_length;

  // That of tile number `index` of all sequences; no queries where there is none.
  __device__ __forceinline__ Sequence(const AttentionLaunch& p, uint32_t index, int rows)
      : batch(index / static_cast<uint32_t>(p.tiles)),  // in 32 bits: 64 take the time of a memory access
        tile(index % static_cast<uint32_t>(p.tiles)),
        query_begin(0),
        query_length(p.query_length),
        key_begin(0),
        key_length(p.kv_length) {
    if (!p.cu_seqlens_q) {
      return;
    }
    for (batch = 0; batch < p.batch; ++batch) {
      query_begin = p.cu_seqlens_q[batch];
      query_length = p.cu_seqlens_q[batch + 1] - query_begin;
      const int64_t tiles = (query_length + rows - 1) / rows;
      if (tile < tiles) {
        key_begin = p.cu_seqlens_k[batch];
        key_length = p.cu_seqlens_k[batch + 1] - key_begin;
        return;
      }
      tile -= tiles;
    }
    query_length = 0;
  }
};

// Rows of a head's queries, keys or values, of which a thread copies the same 16 bytes of every kStep-th.
template <typename scalar_t, int kWidth, int kThreads>
struct Rows {
  static constexpr int kCount = 16 / sizeof(scalar_t), kEach = kWidth / kCount, kStep = kThreads / kEach;
  const scalar_t* matrix;
  int64_t row_stride, stride;
  int first_row, column, columns;  // of them the thread's first row and column
  bool is_wide;

  __device__ __forceinline__ Rows(const void* tensor, const int64_t (&strides)[4], int64_t batch, int64_t head,
                                  int64_t begin, int64_t columns, bool is_wide)
      : matrix(static_cast<const scalar_t*>(tensor) + batch * strides[0] + head * strides[1] + begin * strides[2]),
        row_stride(strides[2]),
        stride(strides[3]),
        first_row(static_cast<int>(threadIdx.x) / kEach),
        column(static_cast<int>(threadIdx.x) % kEach * kCount),
        columns(static_cast<int>(columns)),
        is_wide(is_wide) {}

  // Copies kRows rows from `first` on, with zeros outside [begin, end) and behind the last column.
  template <int kRows>
  __device__ __forceinline__ void load(scalar_t* tile, int first, int begin, int end) const {
    static_assert(kRows % kStep == 0);
    const int from = begin - first, to = end - first;
    const scalar_t* source = matrix + (first + first_row) * row_stride + column * stride;
    scalar_t* target = tile + first_row * padded_width<scalar_t>(kWidth) + column;
    if (is_wide) {
      const bool is_column = column < columns;
#pragma unroll
      for (int i = 0; i < kRows; i += kStep) {
        const bool valid = is_column && from <= first_row + i && first_row + i < to;
        copy_async<16>(target + i * padded_width<scalar_t>(kWidth), source, valid);
        source += kStep * row_stride;
      }
    } else {
#pragma unroll 1
      for (int i = 0; i < kRows / kStep * kCount; ++i) {
        const int row = i / kCount * kStep, k = i % kCount;
        const bool valid = from <= first_row + row && first_row + row < to && column + k < columns;
        target[row * padded_width<scalar_t>(kWidth) + k] =
            valid ? source[row * row_stride + k * stride] : static_cast<scalar_t>(0.0f);
      }
    }
  }
};

template <typename scalar_t, int kWidth>
__global__ void __launch_bounds__(AttentionConfig<scalar_t, kWidth>::kThreads, 1)
    attention_forward_kernel(const AttentionLaunch p) {
  using Config = AttentionConfig<scalar_t, kWidth>;
  using HeadRows = Rows<scalar_t, kWidth, Config::kThreads>;
  constexpr int kRows = Config::kRows, kKeys = Config::kKeys, kStages = Config::kStages, kParts = Config::kParts;
  constexpr int kStride = padded_width<scalar_t>(kWidth);
  auto& shared = shared_memory<AttentionShared<scalar_t, kWidth>>();
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const auto heads = static_cast<uint32_t>(p.query_heads);
  const uint32_t head = blockIdx.x % heads, kv_head = head / (heads / static_cast<uint32_t>(p.kv_heads));
  // The last queries first: causal ones have most to do.
  const Sequence sequence(p, gridDim.x / heads - 1 - blockIdx.x / heads, kRows);
  if (sequence.tile * kRows >= sequence.query_length) {
    return;
  }
  const int64_t batch = sequence.batch;
  const int64_t batch_in_memory = p.cu_seqlens_q ? 0 : batch;  // packed sequences lie in one
  const auto first_query = static_cast<int>(sequence.tile) * kRows;
  const auto query_length = static_cast<int>(sequence.query_length);

  // Query i sees the keys [lower, upper) by its position.
  const int64_t offset = p.query_offsets ? p.query_offsets[batch] : p.query_offset;
  const int64_t length = p.kv_lengths ? min(p.kv_lengths[batch], sequence.key_length) : sequence.key_length;
  const int64_t start = p.kv_starts ? max(p.kv_starts[batch], int64_t{0}) : 0;
  const auto lower = [&](int64_t query) {
    return p.window_left < 0 ? start : max(start, query + offset - p.window_left);
  };
  const auto upper = [&](int64_t query) {
    int64_t last = length;
    if (p.is_causal) {
      last = min(last, query + offset + 1);
    }
    return p.window_right < 0 ? last : min(last, query + offset + p.window_right + 1);
  };
  const auto as_key = [&](int64_t key) { return static_cast<int>(min(max(key, int64_t{0}), sequence.key_length)); };
  const int last_query = min(first_query + kRows, query_length) - 1;
  const int first_key = as_key(lower(first_query)), last_key = as_key(upper(last_query));
  const int first_tile = first_key / kKeys, tiles = first_key < last_key ? (last_key + kKeys - 1) / kKeys : first_tile;
  // Tiles of which each of the block's queries sees all.
  const int first_whole = (as_key(lower(last_query)) + kKeys - 1) / kKeys, wholes = as_key(upper(first_query)) / kKeys;

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

  // exp(scale * score) = 2^(factor * score), unless scores are changed before.
  const bool is_plain = p.softcap == 0.0f && !p.alibi_slopes && p.scale > 0.0f;
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
        const auto distance = static_cast<float>(first_row + offset - first_column);
        for_each_score(scores, [&](float& score, int i, int column) {
          score -= slope * fabsf(distance + static_cast<float>(8 * i - column));
        });
      }
    }
    if (tile < first_whole || wholes <= tile) {
      int from[2 * kParts], to[2 * kParts];  // of this tile, in 32 bits
#pragma unroll
      for (int i = 0; i < 2 * kParts; ++i) {
        const int64_t row = first_row + 8 * i;
        from[i] = static_cast<int>(min(max(lower(row) - first_column, int64_t{-kKeys}), int64_t{kKeys}));
        to[i] = static_cast<int>(min(max(upper(row) - first_column, int64_t{-kKeys}), int64_t{kKeys}));
      }
      for_each_score(scores, [&](float& score, int i, int column) {
        score = from[i] <= column && column < to[i] ? score : -kInfinity;
      });
    }
    exponentiate(scores, factor, peaks, totals, out);
    wait();
    request(keys, shared.keys, tile + kStages);
    add_values<scalar_t, kWidth, kKeys, kParts>(out, scores, shared.values[tile % kStages]);
  }

  // Through the rows of the query that the warp alone has read, to be written in whole rows.
  wait_for_copies<0>();  // of a query that no key met
  __syncthreads();
  scalar_t* rows = shared.query + Config::kWarpRows * warp * kStride;
#pragma unroll
  for (int i = 0; i < 2 * kParts; ++i) {
    float total = totals[i];
    total += __shfl_xor_sync(0xFFFFFFFFu, total, 1);
    total += __shfl_xor_sync(0xFFFFFFFFu, total, 2);
    const float share_of_one = total == 0.0f ? 0.0f : 1.0f / total;
#pragma unroll
    for (int n = 0; n < kWidth / 8; ++n) {
#pragma unroll
      for (int j = 0; j < 2; ++j) {
        rows[(lane / 4 + 8 * i) * kStride + 8 * n + lane % 4 * 2 + j] =
            static_cast<scalar_t>(out[i / 2][n][2 * (i % 2) + j] * share_of_one);
      }
    }
    const int row = first_row + 8 * i;
    if (lane % 4 == 0 && row < query_length) {
      p.lse[(batch_in_memory * p.query_heads + head) * p.query_length + sequence.query_begin + row] =
          total == 0.0f ? -kInfinity : (peaks[i] + log2f(total)) * kLn2;
    }
  }
  __syncwarp();
  const int first_warp_row = first_query + Config::kWarpRows * warp;
  auto* result = static_cast<scalar_t*>(p.out) + batch_in_memory * p.out_strides[0] + head * p.out_strides[1] +
                 (sequence.query_begin + first_warp_row) * p.out_strides[2];
  const int count = min(Config::kWarpRows, query_length - first_warp_row);
  const auto value_dim = static_cast<int>(p.value_dim);
  if (p.out_is_wide) {
    constexpr int kCount = HeadRows::kCount, kEach = HeadRows::kEach;
    for (int i = lane; i < count * kEach; i += 32) {
      const int row = i / kEach, column = i % kEach * kCount;
      if (column < value_dim) {
        *reinterpret_cast<uint4*>(result + row * p.out_strides[2] + column) =
            *reinterpret_cast<const uint4*>(rows + row * kStride + column);
      }
    }
  } else {
    for (int row = 0; row < count; ++row) {
      for (int column = lane; column < value_dim; column += 32) {
        result[row * p.out_strides[2] + column] = rows[row * kStride + column];
      }
    }
  }
}

template <typename scalar_t, int kWidth>
void run(const Device& device, AttentionLaunch& p) {
  using Config = AttentionConfig<scalar_t, kWidth>;
  constexpr size_t kSharedBytes = sizeof(AttentionShared<scalar_t, kWidth>);
  static_assert(kSharedBytes <= kMostSharedBytes);
  // Each packed sequence may end with a tile that is not full.
  p.tiles = ceil_div(p.query_length, Config::kRows) + (p.cu_seqlens_q ? p.batch : 0);
  const int64_t sequences = p.cu_seqlens_q ? 1 : p.batch;
  device.launch(attention_forward_kernel<scalar_t, kWidth>, sequences * p.tiles * p.query_heads, Config::kThreads,
                kSharedBytes, p);
}

std::tuple<Tensor, Tensor> forward(const Tensor& query, const Tensor& key, const Tensor& value,
                                   const Optional& attn_mask, double dropout_p, const Optional& dropout_seed,
                                   bool is_causal, double scale, int64_t query_offset, const Optional& query_offsets,
                                   const Optional& kv_lengths, const Optional& kv_starts, int64_t window_left,
                                   int64_t window_right, double softcap, const Optional& alibi_slopes,
                                   const Optional& cu_seqlens_q, const Optional& cu_seqlens_k, bool heads_first) {
  CHECK_CUDA(query);
  STD_TORCH_CHECK(!attn_mask && dropout_p == 0, "expected attn_mask to be None and dropout_p 0 on a GPU");
  const Device device(query);
  AttentionLaunch p{};
  set_attention_params(query, key, value,
                       {attn_mask, dropout_p, dropout_seed, is_causal, scale, query_offset, query_offsets, kv_lengths,
                        kv_starts, window_left, window_right, softcap, alibi_slopes, cu_seqlens_q, cu_seqlens_k},
                       p);
  STD_TORCH_CHECK(std::max(p.query_length, p.kv_length) < INT32_MAX / 2,
                  "expected query and key to have fewer than 2^30 rows, but they have ", p.query_length, " and ",
                  p.kv_length);
  const int64_t width = std::max(p.head_dim, p.value_dim);
  STD_TORCH_CHECK(width <= 256, "expected the last dimension of query and value to be at most 256, but it is ", width);
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
  for (const Tensor* tensor : {&query, &key, &value}) {
    allow_access(*tensor, false);
  }
  for (const Optional* tensor :
       {&query_offsets, &kv_lengths, &kv_starts, &alibi_slopes, &cu_seqlens_q, &cu_seqlens_k}) {
    if (*tensor) {
      allow_access(**tensor, false);
    }
  }
  if (lse.numel() > 0) {
    DTYPE_SWITCH(query.scalar_type(), "query", scalar_t, [&] {
      const auto launch = width <= 64 ? run<scalar_t, 64> : width <= 128 ? run<scalar_t, 128> : run<scalar_t, 256>;
      launch(device, p);
    });
  }
  return {out, lse};
}

}  // namespace
}  // namespace gpt4fast

STABLE_TORCH_LIBRARY_IMPL(gpt4fast, GPT4FAST_CUDA_KEY, m) {
  m.impl("attention_forward", TORCH_BOX(&gpt4fast::forward));
}
