// Attention of a few queries over a cache (Flash-Decoding: Dao, Haziza, Massa and Sizov, 2023), bound by reading the
// cache. All query rows that share a key/value head form one matrix. A block takes 16 of them through one part of the
// keys: first it appends those new tokens that lie there, then each of its warps reads 16 keys of every 64 by
// asynchronous copies, with a running maximum of its own, so that no warp waits for another until the block's sums are
// put together. A second kernel combines the parts in order. Nothing is allocated but by torch, and the lengths are
// only read on the GPU: a call can be captured in a graph. With its loads under branches it took 1.4 to 1.7 times as
// long as the Triton kernel on an H200, without them 1.1 to 1.3 times.
#include <optional>
#include <tuple>

#include <torch/csrc/stable/library.h>

#include "attention_decode_arguments.h"
#include "common/dtypes.h"
#include "common/empty.h"
#include "cuda/attention_decode_cache.cuh"
#include "cuda/attention_decode_config.h"
#include "cuda/attention_products.cuh"
#include "cuda/launch.h"

namespace gpt4fast {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using Optional = std::optional<Tensor>;

constexpr int kCombineThreads = 128;

template <typename scalar_t, typename cache_t, int kWidth>
struct alignas(16) DecodeShared {
  using Config = DecodeConfig<scalar_t, cache_t, kWidth>;
  struct Tiles {
    cache_t tiles[Config::kWarps][Config::kTiles][kDecodeKeys * padded_width<cache_t>(kWidth)];
    float scales[Config::kWarps][Config::kTiles][kDecodeKeys];
    scalar_t numbers[Config::kIsScaled ? Config::kWarps : 1]
                    [Config::kIsScaled ? kDecodeKeys * padded_width<scalar_t>(kWidth) : 8];
  };
  scalar_t query[kDecodeRows * padded_width<scalar_t>(kWidth)];
  union {
    Tiles cache;
    float sums[Config::kWarps][kDecodeRows][padded_width<float>(kWidth)];  // once the keys are done with
  };
  float peaks[Config::kWarps][kDecodeRows], totals[Config::kWarps][kDecodeRows];
};

// One block may have all registers: for more of them, which shared memory does not admit, ptxas spilled some.
template <typename scalar_t, typename cache_t, int kWidth>
__global__ void __launch_bounds__(DecodeConfig<scalar_t, cache_t, kWidth>::kThreads, 1)
    attention_decode_kernel(const DecodeLaunch p) {
  using Config = DecodeConfig<scalar_t, cache_t, kWidth>;
  constexpr int kTiles = Config::kTiles, kBlockKeys = Config::kBlockKeys;
  auto& shared = shared_memory<DecodeShared<scalar_t, cache_t, kWidth>>();
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const auto splits = static_cast<uint32_t>(p.splits), parts = static_cast<uint32_t>(p.parts),
             kv_heads = static_cast<uint32_t>(p.kv_heads);
  uint32_t block = blockIdx.x;
  const uint32_t split = block % splits;
  block /= splits;
  const uint32_t part = block % parts;
  block /= parts;
  const uint32_t kv_head = block % kv_heads;
  const int64_t batch = block / kv_heads;

  // The keys that any query sees, and this block's share of them.
  const int64_t added = p.appends ? p.query_length : 0;
  const auto length = static_cast<int>(max(int64_t{0}, min(p.kv_lengths[batch] + added, p.kv_length)));
  int first = p.kv_starts ? static_cast<int>(max(int64_t{0}, min(p.kv_starts[batch], int64_t{length}))) : 0;
  if (p.window_left >= 0) {
    first = max(first, length - static_cast<int>(p.query_length + p.window_left));
  }
  const int first_tile = first / kBlockKeys, tiles = (length + kBlockKeys - 1) / kBlockKeys;
  const int each = (max(tiles - first_tile, 0) + static_cast<int>(p.splits) - 1) / static_cast<int>(p.splits);
  const int begin = first_tile + static_cast<int>(split) * each, end = min(begin + each, tiles);
  if (p.appends) {
    append<scalar_t, cache_t, kWidth>(p, batch, kv_head, split == 0 ? 0 : int64_t{begin} * kBlockKeys,
                                      int64_t{end} * kBlockKeys, Config::kWarps);
    __syncthreads();
  }

  // Tiles of keys and of values take turns. Where a tile lies is looked up one ahead.
  const CacheRows<cache_t, kWidth> keys(p.key, p.key_strides, kv_head, p.head_dim, p.key_is_wide),
      values(p.value, p.value_strides, kv_head, p.value_dim, p.value_is_wide);
  const int steps = 2 * max(end - begin, 0);
  int key = begin * kBlockKeys + warp * kDecodeKeys;
  Tile tile(p, batch, key, first, length), upcoming = tile;
  const auto request = [&](int step, bool is_key) {
    if (step < steps) {
      const int slot = step % kTiles;
      if (is_key) {
        tile = upcoming;
        key += kBlockKeys;
        upcoming = Tile(p, batch, key, first, length);
      }
      (is_key ? keys : values).load(shared.cache.tiles[warp][slot], tile, p.has_whole_tiles);
      if (Config::kIsScaled && lane < kDecodeKeys) {
        const float* scales = is_key ? p.key_scales : p.value_scales;
        const auto& strides = is_key ? p.key_scale_strides : p.value_scale_strides;
        const int64_t offset = tile.entry.offset(strides[0], strides[2]) + kv_head * strides[1];
        copy_async<4>(&shared.cache.scales[warp][slot][lane], scales + offset, tile.has(lane));
      }
    }
    commit_copies();
  };
  const auto next_tile = [&](int step, bool is_key) -> const scalar_t* {
    wait_for_copies<kTiles - 2>();
    __syncwarp();  // everyone's copies are there, and everyone is done with the tile that is overwritten now
    request(step + kTiles - 1, is_key == (kTiles % 2 == 1));
    const cache_t* numbers = shared.cache.tiles[warp][step % kTiles];
    if constexpr (Config::kIsScaled) {
      convert_tile<scalar_t, kWidth>(numbers, shared.cache.numbers[warp], p.cache_dtype);
      __syncwarp();
      return shared.cache.numbers[warp];
    } else {
      return numbers;
    }
  };
#pragma unroll
  for (int step = 0; step < kTiles - 1; ++step) {
    request(step, step % 2 == 0);
  }

  const auto* query = static_cast<const scalar_t*>(p.query) + batch * p.query_strides[0];
  const int head_dim = static_cast<int>(p.head_dim), value_dim = static_cast<int>(p.value_dim);
  for (int row = warp; row < kDecodeRows; row += Config::kWarps) {
    const Row place(p, kv_head, part, row, first, length);
    const scalar_t* from = query + place.head * p.query_strides[1] + place.token * p.query_strides[2];
    for (int column = lane; column < kWidth; column += 32) {
      float number = 0.0f;
      if (place.exists && column < head_dim) {
        number = read_turned(p, from, p.query_strides[3], column, place.position);
      }
      shared.query[row * padded_width<scalar_t>(kWidth) + column] = static_cast<scalar_t>(number);
    }
  }
  __syncthreads();

  const Row rows[2] = {Row(p, kv_head, part, lane / 4, first, length),
                       Row(p, kv_head, part, lane / 4 + 8, first, length)};
  const float scale = p.softcap != 0.0f ? p.scale / p.softcap : p.scale * kLog2E;
  float slopes[2] = {}, peaks[2] = {-kInfinity, -kInfinity}, totals[2] = {}, out[1][kWidth / 8][4] = {};
  for (int i = 0; i < 2; ++i) {
    if (p.alibi_slopes && rows[i].exists) {
      slopes[i] = kLog2E * p.alibi_slopes[batch * p.alibi_strides[0] + rows[i].head * p.alibi_strides[1]];
    }
  }
#pragma unroll 1
  for (int step = 0; step < steps; step += 2) {
    float scores[1][2][4] = {};
    add_scores<scalar_t, kWidth, kDecodeKeys>(scores, shared.query, next_tile(step, true));
    const int first_column = (begin + step / 2) * kBlockKeys + warp * kDecodeKeys + lane % 4 * 2;
    for_each_score(scores, [&](float& score, int, int column) {
      score *= scale;
      if constexpr (Config::kIsScaled) {
        score *= shared.cache.scales[warp][step % kTiles][lane % 4 * 2 + column];
      }
    });
    if (p.softcap != 0.0f) {
      for_each_score(scores, [&](float& score, int, int) { score = p.softcap * kLog2E * tanhf(score); });
    }
    if (p.alibi_slopes) {
      for_each_score(scores, [&](float& score, int i, int column) {
        score -= slopes[i] * fabsf(static_cast<float>(rows[i].position - first_column - column));
      });
    }
    for_each_score(scores, [&](float& score, int i, int column) {
      column += first_column;
      score = rows[i].lower <= column && column < rows[i].upper ? score : -kInfinity;
    });
    exponentiate(scores, 1.0f, peaks, totals, [&](int i, float by) { shrink_row(out, i, by); });
    const scalar_t* numbers = next_tile(step + 1, false);
    if constexpr (Config::kIsScaled) {
      for_each_score(scores, [&](float& score, int, int column) {
        score *= shared.cache.scales[warp][(step + 1) % kTiles][lane % 4 * 2 + column];
      });
    }
    add_values<scalar_t, kWidth, kDecodeKeys>(out, scores, numbers);
  }

  // The warps' sums, brought to one maximum.
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    totals[i] += __shfl_xor_sync(0xFFFFFFFFu, totals[i], 1);
    totals[i] += __shfl_xor_sync(0xFFFFFFFFu, totals[i], 2);
    if (lane % 4 == 0) {
      shared.peaks[warp][lane / 4 + 8 * i] = peaks[i];
      shared.totals[warp][lane / 4 + 8 * i] = totals[i];
    }
  }
  __syncthreads();
  const auto peak_of = [&](int row) {
    float peak = shared.peaks[0][row];
    for (int w = 1; w < Config::kWarps; ++w) {
      peak = fmaxf(peak, shared.peaks[w][row]);
    }
    return peak;
  };
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const int row = lane / 4 + 8 * i;
    const float factor = share(peaks[i], peak_of(row));
#pragma unroll
    for (int n = 0; n < kWidth / 8; ++n) {
      shared.sums[warp][row][8 * n + lane % 4 * 2] = out[0][n][2 * i] * factor;
      shared.sums[warp][row][8 * n + lane % 4 * 2 + 1] = out[0][n][2 * i + 1] * factor;
    }
  }
  __syncthreads();
  for (int row = warp; row < kDecodeRows; row += Config::kWarps) {
    const Row place(p, kv_head, part, row, first, length);
    if (!place.exists) {
      continue;
    }
    const float peak = peak_of(row);
    float total = 0.0f;
    for (int w = 0; w < Config::kWarps; ++w) {
      total += shared.totals[w][row] * share(shared.peaks[w][row], peak);
    }
    const float factor = total == 0.0f ? 0.0f : 1.0f / total;
    const int64_t index = (batch * p.query_heads + place.head) * p.query_length + place.token;
    auto* target = static_cast<scalar_t*>(p.out) + batch * p.out_strides[0] + place.head * p.out_strides[1] +
                   place.token * p.out_strides[2];
    for (int column = lane; column < value_dim; column += 32) {
      float sum = 0.0f;
      for (int w = 0; w < Config::kWarps; ++w) {
        sum += shared.sums[w][row][column];
      }
      if (p.part_out) {
        p.part_out[(index * p.splits + split) * p.value_dim + column] = sum * factor;
      } else {
        target[column] = static_cast<scalar_t>(sum * factor);
      }
    }
    if (lane == 0) {
      (p.part_out ? p.part_lse[index * p.splits + split] : p.lse[index]) =
          total == 0.0f ? -kInfinity : (peak + log2f(total)) * kLn2;
    }
  }
}

// One query row: its parts, weighted by their sums. One kernel for all dtypes, which make no difference to its speed.
__global__ void __launch_bounds__(kCombineThreads) attention_decode_combine_kernel(const DecodeLaunch p) {
  struct Shared {
    float weights[kMostDecodeSplits];
  };
  Shared& shared = shared_memory<Shared>();
  const auto splits = static_cast<int>(p.splits), value_dim = static_cast<int>(p.value_dim);
  const int thread = threadIdx.x, lane = thread % 32;
  const float *lse = p.part_lse + blockIdx.x * p.splits, *parts = p.part_out + blockIdx.x * p.splits * p.value_dim;
  // Every warp finds out the weights of all parts, a lane those of two.
  float weights[2], peak = -kInfinity, total = 0.0f;
  for (int i = 0; i < 2; ++i) {
    weights[i] = lane + 32 * i < splits ? lse[lane + 32 * i] * kLog2E : -kInfinity;
    peak = fmaxf(peak, weights[i]);
  }
  peak = largest_of_warp(peak);
  for (float& weight : weights) {
    weight = share(weight, peak);
    total += weight;
  }
  total = sum_of_warp(total);
  const float factor = total == 0.0f ? 0.0f : 1.0f / total;
  if (thread < 32) {
    shared.weights[lane] = weights[0] * factor;
    shared.weights[lane + 32] = weights[1] * factor;
  }
  __syncthreads();
  const auto heads = static_cast<uint32_t>(p.query_heads), tokens = static_cast<uint32_t>(p.query_length);
  const uint32_t row = blockIdx.x / tokens;
  const int64_t target =
      row / heads * p.out_strides[0] + row % heads * p.out_strides[1] + blockIdx.x % tokens * p.out_strides[2];
  for (int column = thread; column < value_dim; column += kCombineThreads) {
    float sum = 0.0f;
#pragma unroll 16
    for (int split = 0; split < splits; ++split) {
      sum += parts[split * value_dim + column] * shared.weights[split];
    }
    if (p.dtype == ElementType::float32) {
      static_cast<float*>(p.out)[target + column] = sum;
    } else if (p.dtype == ElementType::bfloat16) {
      static_cast<BFloat16*>(p.out)[target + column] = static_cast<BFloat16>(sum);
    } else {
      static_cast<Half*>(p.out)[target + column] = static_cast<Half>(sum);
    }
  }
  if (thread == 0) {
    p.lse[blockIdx.x] = total == 0.0f ? -kInfinity : (peak + log2f(total)) * kLn2;
  }
}

template <typename scalar_t, typename cache_t, int kWidth>
void run(const Device& device, const Tensor& query, DecodeLaunch& p) {
  using Config = DecodeConfig<scalar_t, cache_t, kWidth>;
  constexpr size_t kSharedBytes = sizeof(DecodeShared<scalar_t, cache_t, kWidth>);
  static_assert(kSharedBytes <= kMostSharedBytes);
  const int64_t heads = p.batch * p.kv_heads, rows = p.query_heads / p.kv_heads * p.query_length;
  p.parts = ceil_div(rows, kDecodeRows);
  p.splits = decode_splits(heads * p.parts, p.kv_length, Config::kBlockKeys, device.processors());
  Tensor part_out, part_lse;
  if (p.splits > 1) {
    part_out = device.fresh(torch::stable::new_empty(query, {heads * rows, p.splits, p.value_dim}, ScalarType::Float));
    part_lse = device.fresh(torch::stable::new_empty(query, {heads * rows, p.splits}, ScalarType::Float));
    p.part_out = part_out.mutable_data_ptr<float>();
    p.part_lse = part_lse.mutable_data_ptr<float>();
  }
  device.launch(attention_decode_kernel<scalar_t, cache_t, kWidth>, heads * p.parts * p.splits, Config::kThreads,
                kSharedBytes, p);
  if (p.splits > 1) {
    device.launch(attention_decode_combine_kernel, heads * rows, kCombineThreads, kMostDecodeSplits * sizeof(float), p);
  }
}

std::tuple<Tensor, Tensor> decode(const Tensor& query, const Tensor& key_cache, const Tensor& value_cache,
                                  const Tensor& kv_lengths, const Optional& key, const Optional& value,
                                  const Optional& block_table, const Optional& cos, const Optional& sin,
                                  bool rotary_interleaved, const Optional& key_scales, const Optional& value_scales,
                                  double scale, const Optional& kv_starts, int64_t window_left, int64_t window_right,
                                  double softcap, const Optional& alibi_slopes) {
  CHECK_CUDA(query);
  const Device device(query);
  DecodeLaunch p{};
  static_cast<AttentionDecodeParams&>(p) = attention_decode_params(
      {query, key_cache, value_cache, kv_lengths, key, value, block_table, cos, sin, rotary_interleaved, key_scales,
       value_scales, scale, kv_starts, window_left, window_right, softcap, alibi_slopes});
  const int64_t width = std::max(p.head_dim, p.value_dim);
  STD_TORCH_CHECK(width <= 256, "expected the last dimension of query and value_cache to be at most 256, but it is ",
                  width);
  STD_TORCH_CHECK(p.kv_length < INT32_MAX, "expected key_cache to have fewer than 2^31 entries, but it has ",
                  p.kv_length);
  const Tensor out = device.fresh(
      empty_beside<4>(query, {p.batch, p.query_heads, p.query_length, p.value_dim}, query.scalar_type(), {0, 2, 1, 3}));
  const Tensor lse =
      device.fresh(torch::stable::new_empty(query, {p.batch, p.query_heads, p.query_length}, ScalarType::Float));
  p.kv_lengths = kv_lengths.const_data_ptr<int64_t>();
  p.out = out.mutable_data_ptr();
  p.lse = lse.mutable_data_ptr<float>();
  copy_strides(out, p.out_strides);
  p.key_is_wide = has_wide_rows(key_cache);
  p.value_is_wide = has_wide_rows(value_cache);
  p.has_whole_tiles = !p.block_table || p.block_size % kDecodeKeys == 0;
  allow_access(query, false);
  allow_access(kv_lengths, false);
  for (const Optional* tensor : {&key, &value, &block_table, &cos, &sin, &kv_starts, &alibi_slopes}) {
    if (*tensor) {
      allow_access(**tensor, false);
    }
  }
  allow_access(key_cache, p.appends);
  allow_access(value_cache, p.appends);
  for (const Optional* scales : {&key_scales, &value_scales}) {
    if (*scales) {
      allow_access(**scales, p.appends);
    }
  }
  if (lse.numel() > 0) {
    DTYPE_SWITCH(query.scalar_type(), "query", scalar_t, [&] {
      BOOL_SWITCH(is_scaled(p.cache_dtype), kIsScaled, [&] {
        using cache_t = std::conditional_t<kIsScaled, int8_t, scalar_t>;
        const auto launch = width <= 64    ? run<scalar_t, cache_t, 64>
                            : width <= 128 ? run<scalar_t, cache_t, 128>
                                           : run<scalar_t, cache_t, 256>;
        launch(device, query, p);
      });
    });
  }
  return {out, lse};
}

}  // namespace
}  // namespace gpt4fast

STABLE_TORCH_LIBRARY_IMPL(gpt4fast, GPT4FAST_CUDA_KEY, m) {
  m.impl("attention_decode", TORCH_BOX(&gpt4fast::decode));
}
