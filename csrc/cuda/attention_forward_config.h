#pragma once

// Tile sizes of attention_forward.cu and attention_forward_hopper.cu: pure functions. Chosen by what fits in registers
// and shared memory.

#include "attention_decode_config.h"

namespace gpt4fast {

// Whether all registers are taken without a mask and dropout, which then have a kernel of their own.
template <typename scalar_t, int kWidth>
inline constexpr bool kRegistersAreFull = sizeof(scalar_t) == 2 && kWidth == 128;

// A block takes kRows queries of a head, kParts times 16 for each warp, through kKeys keys at a time. kAlters: there
// may be a mask or dropout.
template <typename scalar_t, int kWidth, bool kAlters>
struct AttentionConfig {
  static constexpr bool kIsHalf = sizeof(scalar_t) == 2;
  static constexpr int kSharedBytes = 99 << 10;  // see DecodeConfig
  // Two parts share what is read of keys and values, where registers hold the sums of both.
  static constexpr int kParts = kIsHalf && kWidth <= 128 && !(kAlters && kRegistersAreFull<scalar_t, kWidth>) ? 2 : 1;
  static constexpr int kWarps = !kIsHalf && kWidth == 256 ? 2 : 4;
  static constexpr int kWarpRows = 16 * kParts;
  static constexpr int kThreads = 32 * kWarps, kRows = kWarpRows * kWarps;
  static constexpr int kKeys = kIsHalf ? 64 : kWidth == 256 ? 16 : 32;
  static constexpr int kRowBytes = padded_width<scalar_t>(kWidth) * sizeof(scalar_t);
  // Tiles of keys, and of values, in shared memory, or on their way there: one of 128 numbers leaves room for two
  // blocks on a multiprocessor.
  static constexpr int kStages = (kRows + 4 * kKeys) * kRowBytes <= kSharedBytes ? 2 : 1;
};

// On Hopper each group of four warps takes 64 queries. The more queries, the fewer bytes of keys and values are read
// for each product: some 20 to 32 a clock, where the second-level cache gives some 24 to each multiprocessor. A thread
// has kKeys / 2 scores, half as many registers of weights and kWidth / 2 of the output.
template <int kWidth>
struct HopperAttentionConfig {
  static constexpr int kGroups = kWidth == 64 ? 3 : 2;
  static constexpr int kThreads = 128 * kGroups, kRows = 64 * kGroups;
  static constexpr int kKeys = kWidth == 64 ? 96 : kWidth == 128 ? 128 : 64;
  static constexpr int kStages = 2;
};

}  // namespace gpt4fast
