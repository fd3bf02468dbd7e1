#pragma once

// Tile sizes of attention_backward.cu: pure functions. Chosen by what fits in registers, with all that may be done to
// scores, and in shared memory, so that two blocks run on a multiprocessor of 164 KiB; not yet measured on a GPU.

#include "attention_decode_config.h"

namespace gpt4fast {

inline constexpr int kWidestBackward = 128;  // the sums of two gradients of 256 numbers would not fit in registers
inline constexpr int kBackwardStages = 2;    // of the tiles that go by: one at work and one on its way

// A block takes kRows rows, kPartCount times 16 for each warp, past tiles of kTileRows others.
template <typename scalar_t, int kWidth, int kPartCount, int kTileRows>
struct BackwardConfig {
  static constexpr int kParts = kPartCount, kTile = kTileRows;
  static constexpr int kWarps = sizeof(scalar_t) == 4 && kWidth == 128 ? 2 : 4;
  static constexpr int kWarpRows = 16 * kParts, kRows = kWarpRows * kWarps, kThreads = 32 * kWarps;
};

// The gradient of queries, past keys.
template <typename scalar_t, int kWidth>
using QueryGradientConfig =
    BackwardConfig<scalar_t, kWidth, sizeof(scalar_t) == 2 && kWidth == 64 ? 2 : 1, sizeof(scalar_t) == 2 ? 32 : 16>;

// The gradients of keys and values, past queries.
template <typename scalar_t, int kWidth>
using KeyGradientConfig = BackwardConfig<scalar_t, kWidth, 1, (sizeof(scalar_t) == 2 ? 64 : 32) * 64 / kWidth>;

}  // namespace gpt4fast
