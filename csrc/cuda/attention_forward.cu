// Attention of many queries (FlashAttention-2; Dao, 2023). A block takes a tile of a head's queries through the keys
// that they see: tiles of keys and of values arrive by asynchronous copies while earlier ones are multiplied, each warp
// keeps the maximum and the sums of its own 16 rows in registers, and the scores never leave them. Without mask,
// dropout and gradient. Not yet run on a GPU.
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
  scalar_t query[Config::kRows * padded_width<scalar_t>(kWidth)];
  scalar_t tiles[Config::kTiles][Config::kKeys * padded_width<scalar_t>(kWidth)];
};

// A sequence's queries and keys: [begin, begin + length) of the tensors.
struct Sequence {
  int64_t batch, tile, query_begin, query_length, key_begin, key_length;

  // That of tile number `index` of all sequences; no queries where there is none.
  __device__ __forceinline__ Sequence(const AttentionLaunch& p, int64_t index, int rows)
      : batch(index / p.tiles),
        tile(index % p.tiles),
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

// Copies kRows rows from `first` on, with zeros outside [begin, end) and in columns up to a multiple of 16.
template <typename scalar_t, int kWidth, int kRows, int kThreads>
__device__ __forceinline__ void load_rows(scalar_t* tile, const scalar_t* matrix, int64_t row_stride, int64_t stride,
                                          int64_t first, int64_t begin, int64_t end, int columns, bool is_wide) {
  constexpr int kCount = 16 / sizeof(scalar_t), kEach = kWidth / kCount;
#pragma unroll
  for (int step = 0; step < kRows * kEach / kThreads; ++step) {
    const int i = step * kThreads + static_cast<int>(threadIdx.x), row = i / kEach, column = i % kEach * kCount;
    if (column >= up_to_16(columns)) {
      continue;
    }
    const bool exists = begin <= first + row && first + row < end;
    const scalar_t* from = matrix + (exists ? (first + row) * row_stride : 0);
    scalar_t* target = tile + row * padded_width<scalar_t>(kWidth) + column;
    if (is_wide) {
      const bool valid = exists && column < columns;
      copy_async<16>(target, valid ? from + column : matrix, valid);
    } else {
#pragma unroll 1
      for (int k = 0; k < kCount; ++k) {
        target[k] = exists && column + k < columns ? from[(column + k) * stride] : static_cast<scalar_t>(0.0f);
      }
    }
  }
}

template <typename scalar_t, int kWidth>
__global__ void __launch_bounds__(AttentionConfig<scalar_t, kWidth>::kThreads, 1)
    attention_forward_kernel(const AttentionLaunch p) {
  using Config = AttentionConfig<scalar_t, kWidth>;
  constexpr int kRows = Config::kRows, kKeys = Config::kKeys, kTiles = Config::kTiles, kThreads = Config::kThreads;
  constexpr int kStride = padded_width<scalar_t>(kWidth);
  auto& shared = shared_memory<AttentionShared<scalar_t, kWidth>>();
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const auto block = static_cast<int64_t>(blockIdx.x);
  const int64_t head = block % p.query_heads, kv_head = head / (p.query_heads / p.kv_heads);
  // The last queries first: causal ones have most to do.
  const int64_t index = block / p.query_heads, sequences = p.cu_seqlens_q ? 1 : p.batch;
  const Sequence sequence(p, sequences * p.tiles - 1 - index, kRows);
  const int64_t batch = sequence.batch, first_query = sequence.tile * kRows;
  if (first_query >= sequence.query_length) {
    return;
  }
  const int64_t batch_in_memory = p.cu_seqlens_q ? 0 : batch;  // packed sequences lie in one

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
  const int64_t last_query = min(first_query + kRows, sequence.query_length) - 1;
  const int64_t first_key = min(max(lower(first_query), int64_t{0}), sequence.key_length);
  const int64_t last_key = max(upper(last_query), first_key);
  const int64_t first_tile = first_key / kKeys, tiles = (last_key + kKeys - 1) / kKeys;

  const int head_dim = static_cast<int>(p.head_dim), value_dim = static_cast<int>(p.value_dim);
  const auto* query = static_cast<const scalar_t*>(p.query) + batch_in_memory * p.query_strides[0] +
                      head * p.query_strides[1] + sequence.query_begin * p.query_strides[2];
  load_rows<scalar_t, kWidth, kRows, kThreads>(shared.query, query, p.query_strides[2], p.query_strides[3], first_query,
                                               0, sequence.query_length, head_dim, p.query_is_wide);
  const int64_t steps = first_key < last_key ? 2 * (tiles - first_tile) : 0;
  const auto request = [&](int64_t step) {
    if (step < steps) {
      const bool is_key = step % 2 == 0;
      const auto pick = [&](const auto& of_key, const auto& of_value) { return is_key ? of_key : of_value; };
      const int64_t row_stride = pick(p.key_strides[2], p.value_strides[2]);
      const auto* matrix = static_cast<const scalar_t*>(pick(p.key, p.value)) +
                           batch_in_memory * pick(p.key_strides[0], p.value_strides[0]) +
                           kv_head * pick(p.key_strides[1], p.value_strides[1]) + sequence.key_begin * row_stride;
      load_rows<scalar_t, kWidth, kKeys, kThreads>(shared.tiles[step % kTiles], matrix, row_stride,
                                                   pick(p.key_strides[3], p.value_strides[3]),
                                                   (first_tile + step / 2) * kKeys, first_key, last_key,
                                                   pick(head_dim, value_dim), pick(p.key_is_wide, p.value_is_wide));
    }
    commit_copies();  // the first group has the query, too
  };
  const auto next_tile = [&](int64_t step) {
    wait_for_copies<kTiles - 2>();
    __syncthreads();             // everyone's copies are there, and everyone is done with the tile before
    request(step + kTiles - 1);  // which is overwritten
    return shared.tiles[step % kTiles];
  };

  const float scale = p.softcap != 0.0f ? p.scale / p.softcap : p.scale * kLog2E;
  const float slope =
      p.alibi_slopes ? kLog2E * p.alibi_slopes[batch * p.alibi_strides[0] + head * p.alibi_strides[1]] : 0.0f;
  const int64_t first_row = first_query + 16 * warp + lane / 4;  // of a lane, which has another 8 below
  float peaks[2] = {-kInfinity, -kInfinity}, totals[2] = {}, out[kWidth / 8][4] = {};
  for (int step = 0; step < kTiles - 1; ++step) {
    request(step);
  }
  for (int64_t step = 0; step < steps; step += 2) {
    float scores[kKeys / 8][4] = {};
    const scalar_t* keys = next_tile(step);
    add_scores<scalar_t, kWidth, kKeys>(scores, shared.query + 16 * warp * kStride, keys, head_dim);
    const int64_t first_column = (first_tile + step / 2) * kKeys;
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int64_t row = first_row + 8 * i;
      // Of this tile, in 32 bits.
      const auto from = static_cast<int>(min(max(lower(row) - first_column, int64_t{0}), int64_t{kKeys}));
      const auto to = static_cast<int>(min(max(upper(row) - first_column, int64_t{0}), int64_t{kKeys}));
      const auto distance = static_cast<float>(row + offset - first_column);
      float peak = peaks[i];
#pragma unroll
      for (int n = 0; n < kKeys / 4; ++n) {
        float& score = scores[n / 2][2 * i + n % 2];
        const int column = n / 2 * 8 + lane % 4 * 2 + n % 2;
        score *= scale;
        if (p.softcap != 0.0f) {
          score = p.softcap * kLog2E * tanhf(score);
        }
        if (p.alibi_slopes) {
          score -= slope * fabsf(distance - static_cast<float>(column));
        }
        score = from <= column && column < to ? score : -kInfinity;
        peak = fmaxf(peak, score);
      }
      peak = fmaxf(peak, __shfl_xor_sync(0xFFFFFFFFu, peak, 1));
      peak = fmaxf(peak, __shfl_xor_sync(0xFFFFFFFFu, peak, 2));
      const float shrink = share(peaks[i], peak);
      totals[i] *= shrink;
      peaks[i] = peak;
#pragma unroll
      for (int n = 0; n < kKeys / 4; ++n) {
        float& score = scores[n / 2][2 * i + n % 2];
        score = share(score, peak);
        totals[i] += score;
      }
#pragma unroll
      for (int n = 0; n < kWidth / 8; ++n) {
        out[n][2 * i] *= shrink;
        out[n][2 * i + 1] *= shrink;
      }
    }
    const scalar_t* values = next_tile(step + 1);
    add_values<scalar_t, kWidth, kKeys>(out, scores, values, value_dim);
  }

  // Through the rows of the query that the warp alone has read, to be written in whole rows.
  wait_for_copies<0>();  // of a query that no key met
  __syncthreads();
  scalar_t* rows = shared.query + 16 * warp * kStride;
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    totals[i] += __shfl_xor_sync(0xFFFFFFFFu, totals[i], 1);
    totals[i] += __shfl_xor_sync(0xFFFFFFFFu, totals[i], 2);
    const float factor = totals[i] == 0.0f ? 0.0f : 1.0f / totals[i];
#pragma unroll
    for (int n = 0; n < kWidth / 8; ++n) {
      for (int j = 0; j < 2; ++j) {
        rows[(lane / 4 + 8 * i) * kStride + 8 * n + lane % 4 * 2 + j] =
            static_cast<scalar_t>(out[n][2 * i + j] * factor);
      }
    }
    const int64_t row = first_row + 8 * i;
    if (lane % 4 == 0 && row < sequence.query_length) {
      p.lse[(batch_in_memory * p.query_heads + head) * p.query_length + sequence.query_begin + row] =
          totals[i] == 0.0f ? -kInfinity : (peaks[i] + log2f(totals[i])) * kLn2;
    }
  }
  __syncwarp();
  auto* result = static_cast<scalar_t*>(p.out) + batch_in_memory * p.out_strides[0] + head * p.out_strides[1] +
                 (sequence.query_begin + first_query + 16 * warp) * p.out_strides[2];
  const auto count = static_cast<int>(min(int64_t{16}, sequence.query_length - first_query - 16 * warp));
  if (p.out_is_wide) {
    constexpr int kCount = 16 / sizeof(scalar_t);
    for (int i = lane; i < count * (kWidth / kCount); i += 32) {
      const int row = i / (kWidth / kCount), column = i % (kWidth / kCount) * kCount;
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
