#pragma once

// Products of two slices in shared memory by a warp: rows of pixels and of output channels, kDepthBytes of each.

#include "conv_transpose_config.h"
#include "ptx.cuh"

namespace gpt4fast {

// sums[i][j] is a 16 x 8 part of the warp's outputs, as multiply_add in ptx.cuh has it.
template <typename Tile>
using WarpSums = float[Tile::kWarpPixels / 16][Tile::kWarpChannels / 8][4];

// With kIsDirect the second slice is one of a weight read as it is, else it has rows like the first.
template <typename Tile, typename scalar_t, Products kProducts, bool kIsDirect>
__device__ __forceinline__ void multiply_slices(WarpSums<Tile>& sums, const char* pixels, const char* channels) {
  constexpr int kRow = Tile::kRowBytes, kPixelParts = Tile::kWarpPixels / 16, kChannelParts = Tile::kWarpChannels / 8;
  const int lane = threadIdx.x % 32;
  if constexpr (kProducts == Products::ieee) {
    const char *pixel_row = pixels + lane / 4 * kRow, *channel_row = channels + lane % 4 * 2 * kRow;
#pragma unroll
    for (int k = 0; k < Tile::kDepthBytes; k += 16) {
      float4 a[2 * kPixelParts];
#pragma unroll
      for (int i = 0; i < 2 * kPixelParts; ++i) {
        a[i] = *reinterpret_cast<const float4*>(pixel_row + 8 * i * kRow + k);
      }
#pragma unroll
      for (int j = 0; j < 2 * kChannelParts; ++j) {
        const float4 b = *reinterpret_cast<const float4*>(channel_row + (j / 2 * 8 + j % 2) * kRow + k);
#pragma unroll
        for (int i = 0; i < 2 * kPixelParts; ++i) {
          float& sum = sums[i / 2][j / 2][i % 2 * 2 + j % 2];
          sum += a[i].x * b.x;
          sum += a[i].y * b.y;
          sum += a[i].z * b.z;
          sum += a[i].w * b.w;
        }
      }
    }
  } else {
    const char* pixel_row = pixels + lane % 16 * kRow + lane / 16 * 16;
    const char* channel_row = kIsDirect ? channels + lane % 16 * Tile::kColumnBytes + lane / 16 * 16
                                        : channels + (lane % 8 + lane / 16 * 8) * kRow + lane / 8 % 2 * 16;
    const auto load = [](uint32_t (&matrices)[4], const char* row) {
      load_matrices(matrices, row);
      if constexpr (kProducts == Products::tf32) {
#pragma unroll
        for (uint32_t& number : matrices) {
          number = round_to_tf32(number);
        }
      }
    };
#pragma unroll
    for (int k = 0; k < Tile::kDepthBytes; k += 32) {
      uint32_t a[kPixelParts][4];
#pragma unroll
      for (int i = 0; i < kPixelParts; ++i) {
        load(a[i], pixel_row + 16 * i * kRow + k);
      }
#pragma unroll
      for (int j = 0; j < kChannelParts; j += 2) {
        uint32_t b[4];
        if constexpr (kIsDirect) {
          load_matrices_transposed(b, channel_row + k / 2 * Tile::kColumnBytes + 16 * j);
        } else {
          load(b, channel_row + 8 * j * kRow + k);
        }
#pragma unroll
        for (int i = 0; i < kPixelParts; ++i) {
          multiply_add<scalar_t>(sums[i][j], a[i], b[0], b[1]);
          multiply_add<scalar_t>(sums[i][j + 1], a[i], b[2], b[3]);
        }
      }
    }
  }
}

}  // namespace gpt4fast
