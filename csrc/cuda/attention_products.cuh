#pragma once

// Products of a warp's tiles in shared memory: 16 query rows, and kKeys keys or values. A lane has of each 16 x 8 part
// of a result columns 2 * (lane % 4) and the next, of row lane / 4 and of the row 8 below (multiply_add in ptx.cuh). In
// half types by tensor cores; in float32 by multiply-adds of the same numbers.

#include <limits>

#include "attention_decode_config.h"
#include "ptx.cuh"

namespace gpt4fast {

inline constexpr float kLog2E = 1.44269504088896340736f, kLn2 = 0.69314718055994530942f;
inline constexpr float kInfinity = std::numeric_limits<float>::infinity();

// 2^(x - peak), 0 where the peak is of no number at all
__device__ __forceinline__ float share(float x, float peak) {
  return exp2_fast(x - (peak == -kInfinity ? 0.0f : peak));
}

// scores += query @ keys^T, over so many numbers, rounded up to 16
template <typename scalar_t, int kWidth, int kKeys>
__device__ __forceinline__ void add_scores(float (&scores)[kKeys / 8][4], const scalar_t* query, const scalar_t* keys,
                                           int depth) {
  constexpr int kStride = padded_width<scalar_t>(kWidth);
  const int lane = threadIdx.x % 32;
  if constexpr (sizeof(scalar_t) == 4) {
    const scalar_t *query_row = query + lane / 4 * kStride, *key_row = keys + lane % 4 * 2 * kStride;
    for (int d = 0; d < depth; d += 4) {
      float4 numbers[2];
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        numbers[i] = *reinterpret_cast<const float4*>(query_row + 8 * i * kStride + d);
      }
#pragma unroll
      for (int n = 0; n < kKeys / 4; ++n) {
        const float4 key = *reinterpret_cast<const float4*>(key_row + (n / 2 * 8 + n % 2) * kStride + d);
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          float& score = scores[n / 2][2 * i + n % 2];
          score += numbers[i].x * key.x + numbers[i].y * key.y + numbers[i].z * key.z + numbers[i].w * key.w;
        }
      }
    }
  } else {
    const scalar_t* query_row = query + lane % 16 * kStride + lane / 16 * 8;
    const scalar_t* key_row = keys + (lane % 8 + lane / 16 * 8) * kStride + lane / 8 % 2 * 8;
#pragma unroll
    for (int d = 0; d < kWidth; d += 16) {
      if (d < depth) {
        uint32_t a[4];
        load_matrices(a, query_row + d);
#pragma unroll
        for (int n = 0; n < kKeys / 8; n += 2) {
          uint32_t b[4];
          load_matrices(b, key_row + 8 * n * kStride + d);
          multiply_add<scalar_t>(scores[n], a, b[0], b[1]);
          multiply_add<scalar_t>(scores[n + 1], a, b[2], b[3]);
        }
      }
    }
  }
}

// out += weights @ values, so many columns, rounded up to 16
template <typename scalar_t, int kWidth, int kKeys>
__device__ __forceinline__ void add_values(float (&out)[kWidth / 8][4], const float (&weights)[kKeys / 8][4],
                                           const scalar_t* values, int columns) {
  constexpr int kStride = padded_width<scalar_t>(kWidth);
  const int lane = threadIdx.x % 32;
  if constexpr (sizeof(scalar_t) == 4) {
#pragma unroll
    for (int key = 0; key < kKeys; ++key) {
      const int holder = lane / 4 * 4 + key % 8 / 2;
      const float upper = __shfl_sync(0xFFFFFFFFu, weights[key / 8][key % 2], holder);
      const float lower = __shfl_sync(0xFFFFFFFFu, weights[key / 8][2 + key % 2], holder);
      const scalar_t* row = values + key * kStride + lane % 4 * 2;
#pragma unroll
      for (int n = 0; n < kWidth / 8; ++n) {
        if (8 * n < columns) {
#pragma unroll
          for (int j = 0; j < 2; ++j) {
            out[n][j] += upper * row[8 * n + j];
            out[n][2 + j] += lower * row[8 * n + j];
          }
        }
      }
    }
  } else {
    const scalar_t* value_row = values + lane % 16 * kStride + lane / 16 * 8;
#pragma unroll
    for (int k = 0; k < kKeys / 8; k += 2) {
      const uint32_t a[4] = {pack<scalar_t>(weights[k][0], weights[k][1]), pack<scalar_t>(weights[k][2], weights[k][3]),
                             pack<scalar_t>(weights[k + 1][0], weights[k + 1][1]),
                             pack<scalar_t>(weights[k + 1][2], weights[k + 1][3])};
#pragma unroll
      for (int n = 0; n < kWidth / 8; n += 2) {
        if (8 * n < columns) {
          uint32_t b[4];
          load_matrices_transposed(b, value_row + 8 * k * kStride + 8 * n);
          multiply_add<scalar_t>(out[n], a, b[0], b[1]);
          multiply_add<scalar_t>(out[n + 1], a, b[2], b[3]);
        }
      }
    }
  }
}

// int8 numbers as scalar_t. A warp does the whole tile, of so many columns, rounded up to 16.
template <typename scalar_t, int kWidth>
__device__ __forceinline__ void convert_tile(const int8_t* tile, scalar_t* numbers, int columns) {
  for (int i = threadIdx.x % 32; i < kDecodeKeys * kWidth / 16; i += 32) {
    const int row = i / (kWidth / 16), column = i % (kWidth / 16) * 16;
    if (column < columns) {
      alignas(16) int8_t from[16];
      alignas(16) scalar_t to[16];
      *reinterpret_cast<uint4*>(from) =
          *reinterpret_cast<const uint4*>(tile + row * padded_width<int8_t>(kWidth) + column);
#pragma unroll
      for (int k = 0; k < 16; ++k) {
        to[k] = static_cast<scalar_t>(static_cast<float>(from[k]));
      }
#pragma unroll
      for (int k = 0; k < static_cast<int>(sizeof(scalar_t)); ++k) {
        reinterpret_cast<uint4*>(numbers + row * padded_width<scalar_t>(kWidth) + column)[k] =
            reinterpret_cast<const uint4*>(to)[k];
      }
    }
  }
}

}  // namespace gpt4fast
