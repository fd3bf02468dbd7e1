#pragma once

// Tile sizes of attention_backward.cu: pure functions. Chosen by what fits in registers, with all that may be done to
// scores, and in shared memory, so that two blocks run on a multiprocessor of 164 KiB, or one of heads of 256 numbers,
// which take all of the 99 that a block gets at compute capability 8.6; not yet measured on a GPU.

#include "attention_decode_config.h"

namespace gpt4fast {

inline constexpr int kBackwardStages = 2;  // of the tiles that go by: one at work and one on its way

// A block takes kRows rows, kPartCount times 16 for each warp, past tiles of kTileRows others. kSharing warps have the
// same rows.
template <typename scalar_t, int kPartCount, int kTileRows, int kSharing>
struct BackwardConfig {
  static constexpr int kParts = kPartCount, kTile = kTileRows;
  static constexpr int kRowWarps = sizeof(scalar_t) == 4 ? 2 : 4, kWarps = kRowWarps * kSharing;
  static constexpr int kWarpRows = 16 * kParts, kRows = kWarpRows * kRowWarps, kThreads = 32 * kWarps;
};

// The gradient of queries, past keys.
template <typename scalar_t, int kWidth>
using QueryGradientConfig = BackwardConfig<scalar_t, sizeof(scalar_t) == 2 && kWidth == 64 ? 2 : 1,
                                           (sizeof(scalar_t) == 2 ? 32 : 16) / (kWidth == 256 ? 2 : 1), 1>;

// The gradients of keys and values, past queries: each has a warp of its own where the sums of both, 256 registers, do
// not fit in one.
template <typename scalar_t, int kWidth>
using KeyGradientConfig =
    BackwardConfig<scalar_t, 1, (sizeof(scalar_t) == 2 ? 64 : 32) * 64 / kWidth, kWidth == 256 ? 2 : 1>;

}  // namespace gpt4fast
