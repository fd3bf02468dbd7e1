#pragma once

// Tile sizes of attention_forward.cu: pure functions. Chosen by what fits in registers and shared memory; not yet
// measured on a GPU.

#include "attention_decode_config.h"

namespace gpt4fast {

// A block takes kRows queries of a head, 16 for each warp, through kKeys keys at a time.
template <typename scalar_t, int kWidth>
struct AttentionConfig {
  static constexpr bool kIsHalf = sizeof(scalar_t) == 2;
  static constexpr int kSharedBytes = 97 << 10;  // of 99 KiB, see DecodeConfig
  static constexpr int kWarps = !kIsHalf && kWidth == 256 ? 2 : 4;
  static constexpr int kThreads = 32 * kWarps, kRows = 16 * kWarps;
  static constexpr int kKeys = kIsHalf ? (kWidth == 256 ? 32 : 64) : (kWidth == 256 ? 16 : 32);
  static constexpr int kRowBytes = padded_width<scalar_t>(kWidth) * sizeof(scalar_t);
  // Tiles of keys and of values in shared memory, or on their way there.
  static constexpr int kTiles = std::clamp((kSharedBytes - kRows * kRowBytes) / (kKeys * kRowBytes), 2, 4);
};

}  // namespace gpt4fast
