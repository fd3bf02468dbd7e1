#pragma once

// Tile sizes of conv_transpose*.cu, and the choice between them: pure functions.

#include <algorithm>
#include <cstdint>

namespace gpt4fast {

// How the numbers are multiplied: half types by tensor cores, float32 by tensor cores as TF32, or exactly.
enum class Products { half, tf32, ieee };

// A block computes kPixels x kChannels outputs of one phase, by four warps in two rows and two columns. kStages slices
// of kDepthBytes of its two operands are in shared memory or on their way there. Rows in shared memory are 16 bytes
// longer than their numbers: eight that follow one another lie in different banks.
template <int kPixelCount, int kChannelCount, int kDepthByteCount, int kStageCount>
struct ConvTransposeTile {
  static constexpr int kPixels = kPixelCount, kChannels = kChannelCount;
  static constexpr int kThreads = 128, kStages = kStageCount, kDepthBytes = kDepthByteCount;
  static constexpr int kRowBytes = kDepthBytes + 16;
  static constexpr int kWarpPixels = kPixels / 2, kWarpChannels = kChannels / 2;
  // Of a weight that is read as it is: channels of the input in rows, channels of the output side by side.
  static constexpr int kColumnBytes = 2 * kChannels + 16;
  static constexpr int kWeightBytes = std::max(kChannels * kRowBytes, kDepthBytes / 2 * kColumnBytes);
  // The slices, and what ConvTransposeShared has of each pixel, channel and thread.
  static constexpr int kSharedBytes =
      kStages * (kPixels * kRowBytes + kWeightBytes) + 28 * kPixels + 8 * kChannels + 12 * kThreads + 16;
};

using LargeTile = ConvTransposeTile<128, 128, 64, 4>;
using MediumTile = ConvTransposeTile<128, 64, 64, 4>;
using SmallTile = ConvTransposeTile<64, 64, 128, 3>;
using NarrowTile = ConvTransposeTile<128, 32, 128, 3>;

enum class TileChoice { large, medium, small, narrow };

// Of a device: how many, and the shared memory of each.
struct Multiprocessors {
  int64_t count, shared_bytes;
};

// pixels: of one phase, in all images; channels: of the output, of one group; taps: that one pixel meets; depth_bytes:
// of an input pixel, the channels of one group.
struct ConvTransposeSize {
  int64_t pixels, phases, channels, groups, taps, depth_bytes;
};

// With more than one split, as many blocks share the sum over taps and input channels of a tile.
struct ConvTransposePlan {
  TileChoice tile;
  int64_t splits;
};

inline constexpr int64_t kMostSplits = 16;

// The clocks that the blocks take, in waves of as many as there is shared memory for. On an H200 a multiprocessor
// fetched slices at 16 bytes a clock, for one of its blocks at a time, whatever the tile (within 10% in five layers of
// benchmarks/LOG.md); exactly it multiplies 128 numbers a clock, and by mma.sync some 1280 of 16 bits. A block alone
// waits 1500 clocks for memory, with as many slices on their way as there are other stages, and in each step at a
// barrier and for matrices from shared memory. Its first slices and its outputs take some 3000 clocks. Splits, of which
// one wave must have room for all, take a kernel that adds them up: 5000, and their float32 sums are written and read.
template <typename Tile>
constexpr int64_t estimate_clocks(const ConvTransposeSize& size, Products products, const Multiprocessors& device,
                                  int64_t splits) {
  constexpr int64_t kBytes = 16, kLatency = 1500, kFixed = 3000, kSum = 5000;
  constexpr int64_t kReserved = 1024;  // bytes of shared memory, by the driver, for each block
  const auto ceil_div = [](int64_t a, int64_t b) { return (a + b - 1) / b; };
  const int64_t blocks = ceil_div(size.pixels, Tile::kPixels) * size.phases * ceil_div(size.channels, Tile::kChannels) *
                         size.groups * splits;
  const int64_t steps = ceil_div(size.taps * ceil_div(size.depth_bytes, Tile::kDepthBytes), splits);
  const int64_t fetch = (Tile::kPixels + Tile::kChannels) * Tile::kDepthBytes / kBytes;
  const int64_t multiply =
      Tile::kPixels * Tile::kChannels * Tile::kDepthBytes / (products == Products::ieee ? 4 * 128 : 2 * 1280);
  const int64_t alone = kLatency / (Tile::kStages - 1) + 200 + 2 * Tile::kDepthBytes + multiply;
  const auto wave = [&](int64_t each) {  // of so many blocks on a multiprocessor
    return kFixed + steps * std::max(alone, each * std::max(fetch, multiply));
  };
  const int64_t together = std::max<int64_t>(1, device.shared_bytes / (Tile::kSharedBytes + kReserved));
  const int64_t most = device.count * together, rest = blocks % most;
  const int64_t clocks = blocks / most * wave(together) + (rest > 0 ? wave(ceil_div(rest, device.count)) : 0);
  if (splits == 1) {
    return clocks;
  }
  if (blocks > most) {
    return INT64_MAX;
  }
  const int64_t outputs = size.pixels * size.phases * size.channels * size.groups;
  return clocks + kSum + 2 * splits * outputs * int64_t{sizeof(float)} / (kBytes * device.count);
}

// The plan that takes the least time; of several, the one with the fewest splits and the largest tile. Exact products
// of large tiles do not fit in registers.
constexpr ConvTransposePlan plan_conv_transpose(const ConvTransposeSize& size, Products products,
                                                const Multiprocessors& device) {
  ConvTransposePlan best{};
  int64_t least = INT64_MAX;
  for (int64_t splits = 1; splits <= kMostSplits; ++splits) {
    const auto consider = [&](TileChoice tile, int64_t clocks) {
      if (clocks < least) {
        best = {tile, splits};
        least = clocks;
      }
    };
    if (products != Products::ieee) {
      consider(TileChoice::large, estimate_clocks<LargeTile>(size, products, device, splits));
      consider(TileChoice::medium, estimate_clocks<MediumTile>(size, products, device, splits));
    }
    consider(TileChoice::small, estimate_clocks<SmallTile>(size, products, device, splits));
    consider(TileChoice::narrow, estimate_clocks<NarrowTile>(size, products, device, splits));
  }
  return best;
}

// A block of conv_transpose_weight_gradient.cu computes kSide x kSide numbers of one tap, by four warps in two rows and
// two columns, over slices of kPixels. Rows are longer than their numbers, so that eight of 16 bytes which follow one
// another lie in different banks, or in float32 four of 8 numbers.
template <int kElementBytes>
struct WeightGradientTile {
  static constexpr int kSide = 64, kPixels = 128 / kElementBytes, kThreads = 128, kStages = 3;
  static constexpr int kRowBytes = kSide * kElementBytes + 8 * kElementBytes;
};

// How many parts the pixels are split into: four blocks for each multiprocessor, of at least eight slices.
constexpr int64_t weight_gradient_parts(int64_t tiles, int64_t slices, int64_t processors) {
  return std::max<int64_t>(1, std::min((4 * processors + tiles - 1) / tiles, slices / 8));
}

}  // namespace gpt4fast
