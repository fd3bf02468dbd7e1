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

// sums of Tile::kSide / 2 channels x outputs, over the pixels of two slices in shared memory: rows of Tile::kRowBytes.
template <typename Tile, typename scalar_t, Products kProducts>
__device__ __forceinline__ void multiply_pixels(float (&sums)[Tile::kSide / 32][Tile::kSide / 16][4],
                                                const char* channels, const char* outputs) {
  constexpr int kRow = Tile::kRowBytes, kChannelParts = Tile::kSide / 32, kOutputParts = Tile::kSide / 16;
  const int lane = threadIdx.x % 32;
  if constexpr (kProducts == Products::half) {
    const char* channel_row = channels + (lane % 8 + lane / 16 * 8) * kRow + lane / 8 % 2 * 16;
    const char* output_row = outputs + lane % 16 * kRow + lane / 16 * 16;
#pragma unroll
    for (int pixel = 0; pixel < Tile::kPixels; pixel += 16) {
      uint32_t a[kChannelParts][4];
#pragma unroll
      for (int i = 0; i < kChannelParts; ++i) {
        load_matrices_transposed(a[i], channel_row + pixel * kRow + 32 * i);
      }
#pragma unroll
      for (int j = 0; j < kOutputParts; j += 2) {
        uint32_t b[4];
        load_matrices_transposed(b, output_row + pixel * kRow + 16 * j);
#pragma unroll
        for (int i = 0; i < kChannelParts; ++i) {
          multiply_add<scalar_t>(sums[i][j], a[i], b[0], b[1]);
          multiply_add<scalar_t>(sums[i][j + 1], a[i], b[2], b[3]);
        }
      }
    }
  } else if constexpr (kProducts == Products::tf32) {  // no instruction transposes numbers of 32 bits
    const char *channel_row = channels + lane % 4 * kRow + lane / 4 * 4,
               *output_row = outputs + lane % 4 * kRow + lane / 4 * 4;
    const auto load = [](const char* number) { return round_to_tf32(*reinterpret_cast<const uint32_t*>(number)); };
#pragma unroll
    for (int pixel = 0; pixel < Tile::kPixels; pixel += 8) {
      uint32_t a[kChannelParts][4];
#pragma unroll
      for (int i = 0; i < kChannelParts; ++i) {
#pragma unroll
        for (int k = 0; k < 4; ++k) {
          a[i][k] = load(channel_row + (pixel + k / 2 * 4) * kRow + 64 * i + k % 2 * 32);
        }
      }
#pragma unroll
      for (int j = 0; j < kOutputParts; ++j) {
        const uint32_t first = load(output_row + pixel * kRow + 32 * j),
                       second = load(output_row + (pixel + 4) * kRow + 32 * j);
#pragma unroll
        for (int i = 0; i < kChannelParts; ++i) {
          multiply_add<scalar_t>(sums[i][j], a[i], first, second);
        }
      }
    }
  } else {
    const char *channel_row = channels + lane / 4 * 4, *output_row = outputs + lane % 4 * 8;
#pragma unroll 4
    for (int pixel = 0; pixel < Tile::kPixels; ++pixel) {
      float a[2 * kChannelParts];
#pragma unroll
      for (int i = 0; i < 2 * kChannelParts; ++i) {
        a[i] = *reinterpret_cast<const float*>(channel_row + pixel * kRow + 32 * i);
      }
#pragma unroll
      for (int j = 0; j < kOutputParts; ++j) {
        const float2 b = *reinterpret_cast<const float2*>(output_row + pixel * kRow + 32 * j);
#pragma unroll
        for (int i = 0; i < 2 * kChannelParts; ++i) {
          sums[i / 2][j][i % 2 * 2] += a[i] * b.x;
          sums[i / 2][j][i % 2 * 2 + 1] += a[i] * b.y;
        }
      }
    }
  }
}

}  // namespace gpt4fast
