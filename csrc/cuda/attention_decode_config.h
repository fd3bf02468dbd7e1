#pragma once

// Tile sizes of attention_decode.cu: pure functions. Chosen by what fits in registers and shared memory; not yet
// measured on a GPU.

#include <algorithm>
#include <cstdint>

#include "common/host_device.h"

namespace gpt4fast {

// A warp multiplies kDecodeRows query rows by kDecodeKeys keys at a time: the shape of the tensor cores' instruction.
inline constexpr int kDecodeRows = 16;
inline constexpr int kDecodeKeys = 16;
inline constexpr int kMostDecodeSplits = 64;  // that one block combines

// Rows in shared memory are 16 bytes longer than their numbers: eight that follow one another lie in different banks.
template <typename T>
GPT4FAST_HOST_DEVICE constexpr int padded_width(int width) {
  return width + static_cast<int>(16 / sizeof(T));
}

// Of one instantiation: rows of at most kWidth numbers, scalar_t in the query and cache_t in the caches: the
// same, or int8_t for bytes with a scale, whose meaning is known at run time.
template <typename scalar_t, typename cache_t, int kWidth>
struct DecodeConfig {
  static constexpr bool kIsScaled = sizeof(cache_t) == 1;
  // Three blocks on a multiprocessor of 228 KiB, two of 164; of compute capability 8.6 it has 100, of which a block
  // gets 99.
  static constexpr int kSharedBytes = 74 << 10;
  static constexpr int kWarps = sizeof(scalar_t) == 4 && kWidth == 256 ? 2 : 4;
  static constexpr int kThreads = 32 * kWarps;
  static constexpr int kBlockKeys = kWarps * kDecodeKeys;

  static constexpr int kTileBytes = kDecodeKeys * padded_width<cache_t>(kWidth) * sizeof(cache_t);
  static constexpr int kNumberBytes = kDecodeKeys * padded_width<scalar_t>(kWidth) * sizeof(scalar_t);
  // Tiles of keys and of values that a warp holds or waits for: enough bytes in flight for the memory's latency.
  static constexpr int kTiles = std::clamp(
      (kSharedBytes - kNumberBytes - (kIsScaled ? kWarps * kNumberBytes : 0)) / (kWarps * (kTileBytes + 64)), 2, 4);
};

// Into how many parts the keys of a head are cut: so many that two blocks run on each multiprocessor, but each part
// has at least two of a block's steps if the cache is full. It does not depend on the lengths, which are on the device.
inline int64_t decode_splits(int64_t blocks, int64_t capacity, int64_t block_keys, int64_t processors) {
  const int64_t wanted = std::max<int64_t>(1, 2 * processors / std::max<int64_t>(1, blocks));
  return std::clamp<int64_t>(capacity / (2 * block_keys), 1, std::min<int64_t>(wanted, kMostDecodeSplits));
}

}  // namespace gpt4fast
