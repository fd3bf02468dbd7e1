#pragma once

// Products of a warp's tiles in shared memory: kParts times 16 query rows, and kKeys keys or values. A lane has of each
// 16 x 8 part of a result columns 2 * (lane % 4) and the next, of row lane / 4 and of the row 8 below (multiply_add in
// ptx.cuh). In half types by tensor cores; in float32 by multiply-adds of the same numbers. Tiles are kWidth wide,
// zeros behind what there is: a branch in these loops would keep loads from running ahead of products.

#include <cstring>
#include <limits>

#include "../element_type.h"
#include "attention_decode_config.h"
#include "ptx.cuh"

namespace gpt4fast {

inline constexpr float kLog2E = 1.44269504088896340736f, kLn2 = 0.69314718055994530942f;
inline constexpr float kInfinity = std::numeric_limits<float>::infinity();
inline constexpr float kNaN = std::numeric_limits<float>::quiet_NaN();
inline constexpr float kHighest = std::numeric_limits<float>::max();

// What an exponent is taken from: 0 where the peak is of no number at all
__device__ __forceinline__ float origin_of(float peak) {
  return peak == -kInfinity ? 0.0f : peak;
}

// 2^(x - peak)
__device__ __forceinline__ float share(float x, float peak) {
  return exp2_fast(x - origin_of(peak));
}

// scores += query @ keys^T
template <typename scalar_t, int kWidth, int kKeys, int kParts>
__device__ __forceinline__ void add_scores(float (&scores)[kParts][kKeys / 8][4], const scalar_t* query,
                                           const scalar_t* keys) {
  constexpr int kStride = padded_width<scalar_t>(kWidth);
  const int lane = threadIdx.x % 32;
  if constexpr (sizeof(scalar_t) == 4) {
    const scalar_t *query_row = query + lane / 4 * kStride, *key_row = keys + lane % 4 * 2 * kStride;
#pragma unroll 2
    for (int d = 0; d < kWidth; d += 4) {
      float4 numbers[2 * kParts];
#pragma unroll
      for (int i = 0; i < 2 * kParts; ++i) {
        numbers[i] = *reinterpret_cast<const float4*>(query_row + 8 * i * kStride + d);
      }
#pragma unroll
      for (int n = 0; n < kKeys / 4; ++n) {
        const float4 key = *reinterpret_cast<const float4*>(key_row + (n / 2 * 8 + n % 2) * kStride + d);
#pragma unroll
        for (int i = 0; i < 2 * kParts; ++i) {
          float& score = scores[i / 2][n / 2][i % 2 * 2 + n % 2];
          score += numbers[i].x * key.x + numbers[i].y * key.y + numbers[i].z * key.z + numbers[i].w * key.w;
        }
      }
    }
  } else {
    const scalar_t* query_row = query + lane % 16 * kStride + lane / 16 * 8;
    const scalar_t* key_row = keys + (lane % 8 + lane / 16 * 8) * kStride + lane / 8 % 2 * 8;
#pragma unroll
    for (int d = 0; d < kWidth; d += 16) {
      uint32_t a[kParts][4];
#pragma unroll
      for (int part = 0; part < kParts; ++part) {
        load_matrices(a[part], query_row + 16 * part * kStride + d);
      }
#pragma unroll
      for (int n = 0; n < kKeys / 8; n += 2) {
        uint32_t b[4];
        load_matrices(b, key_row + 8 * n * kStride + d);
#pragma unroll
        for (int part = 0; part < kParts; ++part) {
          multiply_add<scalar_t>(scores[part][n], a[part], b[0], b[1]);
          multiply_add<scalar_t>(scores[part][n + 1], a[part], b[2], b[3]);
        }
      }
    }
  }
}

// The weights of 16 keys, as multiply_add takes them.
template <typename scalar_t>
__device__ __forceinline__ void pack_weights(uint32_t (&packed)[4], const float (&first)[4], const float (&second)[4]) {
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const auto& pair = i < 2 ? first : second;
    packed[i] = pack<scalar_t>(pair[i % 2 * 2], pair[i % 2 * 2 + 1]);
  }
}

// out += weights @ values
template <typename scalar_t, int kWidth, int kKeys, int kParts>
__device__ __forceinline__ void add_values(float (&out)[kParts][kWidth / 8][4],
                                           const float (&weights)[kParts][kKeys / 8][4], const scalar_t* values) {
  constexpr int kStride = padded_width<scalar_t>(kWidth);
  const int lane = threadIdx.x % 32;
  if constexpr (sizeof(scalar_t) == 4) {
#pragma unroll
    for (int key = 0; key < kKeys; ++key) {
      const int holder = lane / 4 * 4 + key % 8 / 2;
      float rows[2 * kParts];
#pragma unroll
      for (int i = 0; i < 2 * kParts; ++i) {
        rows[i] = __shfl_sync(0xFFFFFFFFu, weights[i / 2][key / 8][i % 2 * 2 + key % 2], holder);
      }
      const scalar_t* value_row = values + key * kStride + lane % 4 * 2;
#pragma unroll
      for (int n = 0; n < kWidth / 8; ++n) {
        const float2 value = *reinterpret_cast<const float2*>(value_row + 8 * n);
#pragma unroll
        for (int i = 0; i < 2 * kParts; ++i) {
          out[i / 2][n][i % 2 * 2] += rows[i] * value.x;
          out[i / 2][n][i % 2 * 2 + 1] += rows[i] * value.y;
        }
      }
    }
  } else {
    const scalar_t* value_row = values + lane % 16 * kStride + lane / 16 * 8;
#pragma unroll
    for (int k = 0; k < kKeys / 8; k += 2) {
      uint32_t a[kParts][4];
#pragma unroll
      for (int part = 0; part < kParts; ++part) {
        pack_weights<scalar_t>(a[part], weights[part][k], weights[part][k + 1]);
      }
#pragma unroll
      for (int n = 0; n < kWidth / 8; n += 2) {
        uint32_t b[4];
        load_matrices_transposed(b, value_row + 8 * k * kStride + 8 * n);
#pragma unroll
        for (int part = 0; part < kParts; ++part) {
          multiply_add<scalar_t>(out[part][n], a[part], b[0], b[1]);
          multiply_add<scalar_t>(out[part][n + 1], a[part], b[2], b[3]);
        }
      }
    }
  }
}

// Calls change(score, i, column) for each of a lane's scores, which is in row lane / 4 + 8 * i and so many columns
// behind lane % 4 * 2.
template <int kParts, int kTiles, typename Change>
__device__ __forceinline__ void for_each_score(float (&scores)[kParts][kTiles][4], Change change) {
#pragma unroll
  for (int i = 0; i < 2 * kParts; ++i) {
#pragma unroll
    for (int n = 0; n < 2 * kTiles; ++n) {
      change(scores[i / 2][n / 2][2 * (i % 2) + n % 2], i, n / 2 * 8 + n % 2);
    }
  }
}

// A step of softmax: scores become 2^(factor * score - peak). What was summed up before is brought to the new peak of
// its row: totals, of a lane's own columns, here, and the rest by shrink(i, by) for row lane / 4 + 8 * i.
template <int kParts, int kTiles, typename Shrink>
__device__ __forceinline__ void exponentiate(float (&scores)[kParts][kTiles][4], float factor,
                                             float (&peaks)[2 * kParts], float (&totals)[2 * kParts], Shrink shrink) {
#pragma unroll
  for (int i = 0; i < 2 * kParts; ++i) {
    auto& rows = scores[i / 2];
    const int half = 2 * (i % 2);
    float peak = -kInfinity;
#pragma unroll
    for (int n = 0; n < 2 * kTiles; ++n) {
      peak = fmaxf(peak, rows[n / 2][half + n % 2]);
    }
    peak = fmaxf(peak, __shfl_xor_sync(0xFFFFFFFFu, peak, 1));
    peak = fmaxf(peak, __shfl_xor_sync(0xFFFFFFFFu, peak, 2));
    peak = fmaxf(peaks[i], peak * factor);
    const float by = share(peaks[i], peak), origin = origin_of(peak);
    float total = totals[i] * by;
    peaks[i] = peak;
#pragma unroll
    for (int n = 0; n < 2 * kTiles; ++n) {
      float& score = rows[n / 2][half + n % 2];
      score = exp2_fast(score * factor - origin);
      total += score;
    }
    totals[i] = total;
    shrink(i, by);
  }
}

template <int kParts, int kColumns>
__device__ __forceinline__ void shrink_row(float (&out)[kParts][kColumns][4], int i, float by) {
#pragma unroll
  for (int n = 0; n < kColumns; ++n) {
    out[i / 2][n][2 * (i % 2)] *= by;
    out[i / 2][n][2 * (i % 2) + 1] *= by;
  }
}

// A float8_e4m3fn, exactly: instructions know it from sm_89 on. With its bits in the places of float32's it is 2^120
// times as small.
__device__ __forceinline__ float read_float8(int8_t bits) {
  const auto wide = static_cast<uint32_t>(static_cast<uint8_t>(bits));
  const uint32_t placed = (wide & 0x80u) << 24 | (wide & 0x7Fu) << 20;
  float number;
  memcpy(&number, &placed, sizeof(number));
  return (wide & 0x7Fu) == 0x7Fu ? kNaN : number * 0x1p120f;
}

// The bytes of a cache as scalar_t. A warp does the whole tile.
template <typename scalar_t, int kWidth>
__device__ __forceinline__ void convert_tile(const int8_t* tile, scalar_t* numbers, ElementType cache_dtype) {
  const auto convert = [&](auto read) {
    for (int i = threadIdx.x % 32; i < kDecodeKeys * kWidth / 16; i += 32) {
      const int row = i / (kWidth / 16), column = i % (kWidth / 16) * 16;
      alignas(16) int8_t from[16];
      alignas(16) scalar_t to[16];
      *reinterpret_cast<uint4*>(from) =
          *reinterpret_cast<const uint4*>(tile + row * padded_width<int8_t>(kWidth) + column);
#pragma unroll
      for (int k = 0; k < 16; ++k) {
        to[k] = static_cast<scalar_t>(read(from[k]));
      }
#pragma unroll
      for (int k = 0; k < static_cast<int>(sizeof(scalar_t)); ++k) {
        reinterpret_cast<uint4*>(numbers + row * padded_width<scalar_t>(kWidth) + column)[k] =
            reinterpret_cast<const uint4*>(to)[k];
      }
    }
  };
  if (cache_dtype == ElementType::int8) {
    convert([](int8_t number) { return static_cast<float>(number); });
  } else {
    convert([](int8_t number) { return read_float8(number); });
  }
}

}  // namespace gpt4fast
