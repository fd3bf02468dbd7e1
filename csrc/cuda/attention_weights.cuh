#pragma once

// What lies between attention's products: masks that are added to scores, and dropout of the weights. The same choice
// as backends/reference/dropout.py and cpu/attention_scores.h make: a weight's fate hangs on the seed and its place.

#include "../attention_arguments.h"
#include "attention_products.cuh"

namespace gpt4fast {

// For a kernel, whose seed lies on the GPU.
struct Dropout {
  const int64_t* seed;    // or null: nothing is dropped
  uint32_t last_dropped;  // of the words
  float scale;            // of the weights that are kept

  Dropout() = default;
  Dropout(const AttentionSettings& settings, const torch::stable::Tensor& query) : seed(nullptr), scale(1.0f) {
    const double words = settings.dropout_p * 4294967296.0;
    if (words < 1.0) {
      return;
    }
    STD_TORCH_CHECK(settings.dropout_seed.has_value(), "expected dropout_seed with dropout_p");
    seed = index_data(settings.dropout_seed, "dropout_seed", 1, query);
    last_dropped = static_cast<uint32_t>(static_cast<uint64_t>(words) - 1);
    scale = settings.dropout_p < 1.0 ? static_cast<float>(1.0 / (1.0 - settings.dropout_p)) : 0.0f;
  }
};

// Philox4x32-10 (Salmon et al., 2011).
__device__ __forceinline__ void randomize(uint32_t (&words)[4], uint64_t seed) {
  auto low = static_cast<uint32_t>(seed), high = static_cast<uint32_t>(seed >> 32);
#pragma unroll
  for (int round = 0; round < 10; ++round) {
    const uint64_t left = static_cast<uint64_t>(words[0]) * 0xD2511F53u;
    const uint64_t right = static_cast<uint64_t>(words[2]) * 0xCD9E8D57u;
    words[0] = static_cast<uint32_t>(right >> 32) ^ words[1] ^ low;
    words[1] = static_cast<uint32_t>(right);
    words[2] = static_cast<uint32_t>(left >> 32) ^ words[3] ^ high;
    words[3] = static_cast<uint32_t>(left);
    low += 0x9E3779B9u;
    high += 0xBB67AE85u;
  }
}

// The four words of keys that lie 16 apart, one of which is `key`, and of which each takes number key % 64 / 16.
__device__ __forceinline__ void draw_words(uint32_t (&words)[4], uint64_t seed, int64_t batch, uint32_t head, int query,
                                           int key) {
  words[0] = static_cast<uint32_t>(key / 64 * 16 + key % 16);
  words[1] = static_cast<uint32_t>(query);
  words[2] = head;
  words[3] = static_cast<uint32_t>(batch);
  randomize(words, seed);
}

__device__ __forceinline__ uint32_t word_of(const uint32_t (&words)[4], int key) {
  const int number = key % 64 / 16;  // an index of registers has to be known to the compiler
  return number < 2 ? (number == 0 ? words[0] : words[1]) : (number == 2 ? words[2] : words[3]);
}

// Which of a lane's weights are kept, in a tile whose rows are queries: bit 2 * kTiles * i + 2 * n + j is of row 8 * i
// and column 8 * n + j after (query, key), those of the lane's first.
template <int kParts, int kTiles>
__device__ __forceinline__ uint64_t kept_weights(const Dropout& dropout, int64_t batch, uint32_t head, int query,
                                                 int key) {
  static_assert(4 * kParts * kTiles <= 64);
  const auto seed = static_cast<uint64_t>(*dropout.seed);
  uint64_t kept = 0;
#pragma unroll
  for (int i = 0; i < 2 * kParts; ++i) {
#pragma unroll
    for (int place = 0; place < 4; ++place) {
      const int n = place / 2, j = place % 2;
      uint32_t words[4];
      draw_words(words, seed, batch, head, query + 8 * i, key + 8 * n + j);
#pragma unroll
      for (int k = 0; k < kTiles; k += 2) {
        const uint64_t is_kept = word_of(words, kTiles == 8 ? 8 * k : key + 8 * k) > dropout.last_dropped;
        kept |= is_kept << (2 * kTiles * i + 2 * (n + k) + j);
      }
    }
  }
  return kept;
}

// Likewise of a query's weights for 64 keys: bit 8 * number + k of word h is of key 16 * number + 8 * h + k. 16 lanes
// draw them, each for a key of the first 16, and get word key / 8 of the block of 64.
__device__ __forceinline__ uint32_t kept_keys(const Dropout& dropout, int64_t batch, uint32_t head, int query,
                                              int key) {
  uint32_t words[4], kept = 0;
  draw_words(words, static_cast<uint64_t>(*dropout.seed), batch, head, query, key);
#pragma unroll
  for (int number = 0; number < 4; ++number) {
    kept |= (words[number] > dropout.last_dropped ? 1u : 0u) << (8 * number + key % 8);
  }
#pragma unroll
  for (int distance = 1; distance < 8; distance *= 2) {
    kept |= __shfl_xor_sync(0xFFFFFFFFu, kept, distance);
  }
  return kept;
}

// A head's mask.
struct MaskOfHead {
  const void* mask;
  MaskKind kind;
  int64_t row_stride, stride, begin;

  __device__ __forceinline__ MaskOfHead(const AttentionParams& p, int64_t batch, int64_t head)
      : mask(p.mask),
        kind(p.mask_kind),
        row_stride(p.mask_strides[2]),
        stride(p.mask_strides[3]),
        begin(batch * p.mask_strides[0] + head * p.mask_strides[1]) {}

  // What is added to a score in units of log 2; -inf hides the key.
  __device__ __forceinline__ float read(int query, int key) const {
    const int64_t place = begin + query * row_stride + key * stride;
    float bias;
    if (kind == MaskKind::boolean) {
      bias = static_cast<const bool*>(mask)[place] ? 0.0f : -kInfinity;
    } else if (kind == MaskKind::float32) {
      bias = static_cast<const float*>(mask)[place];
    } else if (kind == MaskKind::bfloat16) {
      bias = static_cast<float>(static_cast<const BFloat16*>(mask)[place]);
    } else {
      bias = static_cast<float>(static_cast<const Half*>(mask)[place]);
    }
    // Models mask with the lowest float32, which must not become -inf: that is another thing.
    return bias == -kInfinity ? bias : bias * kLog2E < -kHighest ? -kHighest : bias * kLog2E;
  }
};

// 0 * NaN is NaN: what a mask hides from all rows of a block must not be multiplied by their weights of 0. Each warp
// notes which keys any of its rows sees, by the scores, which are -inf elsewhere; after a barrier the rows of a tile
// that no warp noted are made 0. The notes are in what pads a warp's first row in shared memory, which has no room
// left.
template <typename scalar_t, int kWidth, int kWarpRows, int kWarps>
struct SeenKeys {
  static constexpr int kStride = padded_width<scalar_t>(kWidth);
  scalar_t* rows;  // of all warps

  // Bit 2 * n + j of the warp's notes[k]: key 8 * n + 2 * k + j.
  __device__ __forceinline__ uint32_t* notes(int warp) const {
    return reinterpret_cast<uint32_t*>(rows + warp * kWarpRows * kStride + kWidth);
  }

  template <int kParts, int kTiles>
  __device__ __forceinline__ void note(float (&scores)[kParts][kTiles][4]) const {
    uint32_t seen = 0;
    for_each_score(scores, [&](float& score, int, int column) {
      seen |= (score != -kInfinity ? 1u : 0u) << (column / 8 * 2 + column % 2);
    });
    for (int distance = 4; distance < 32; distance *= 2) {
      seen |= __shfl_xor_sync(0xFFFFFFFFu, seen, distance);
    }
    const int lane = threadIdx.x % 32;
    if (lane < 4) {
      notes(threadIdx.x / 32)[lane] = seen;
    }
  }

  template <int kKeys>
  __device__ __forceinline__ void clear_others(scalar_t* tile) const {
    for (int key = threadIdx.x / 32; key < kKeys; key += kWarps) {
      uint32_t seen = 0;
      for (int warp = 0; warp < kWarps; ++warp) {
        seen |= notes(warp)[key % 8 / 2];
      }
      if (!(seen >> (key / 8 * 2 + key % 2) & 1)) {
        for (int column = threadIdx.x % 32; column < kWidth; column += 32) {
          tile[key * kStride + column] = static_cast<scalar_t>(0.0f);
        }
      }
    }
  }
};

}  // namespace gpt4fast
