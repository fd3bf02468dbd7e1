#pragma once

// Tile sizes of conv_transpose*.cu: pure functions. Chosen by what fits in registers and shared memory.

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
};

using LargeTile = ConvTransposeTile<128, 128, 64, 4>;
using SmallTile = ConvTransposeTile<64, 64, 128, 3>;
using NarrowTile = ConvTransposeTile<128, 32, 128, 3>;

enum class TileChoice { large, small, narrow };

// For so many pixels of all phases and channels of one of the groups. The large tile reads least, if enough of them are
// there to fill the multiprocessors; exact products of it do not fit in registers.
constexpr TileChoice choose_tile(int64_t pixels, int64_t channels, int64_t groups, Products products,
                                 int64_t processors) {
  if (channels <= NarrowTile::kChannels) {
    return TileChoice::narrow;
  }
  const int64_t large = (pixels + LargeTile::kPixels - 1) / LargeTile::kPixels *
                        ((channels + LargeTile::kChannels - 1) / LargeTile::kChannels) * groups;
  return products != Products::ieee && channels > SmallTile::kChannels && large >= processors ? TileChoice::large
                                                                                              : TileChoice::small;
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
