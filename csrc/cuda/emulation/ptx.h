#pragma once

// What ../ptx.cuh declares, for g++: steps of a warp that take and give what the instructions do.

#include <cmath>
#include <cstring>

#include "cuda_runtime.h"

namespace gpt4fast {

using torch::headeronly::BFloat16;
using torch::headeronly::Half;

template <int kBytes>
void copy_async(void* shared, const void* global, bool valid) {
  emulation::copy_async(shared, global, kBytes, valid ? kBytes : 0);
}

inline void commit_copies() {
  emulation::commit_copies();
}

template <int kLeft>
void wait_for_copies() {
  emulation::wait_for_copies(kLeft);
}

namespace emulation {

struct Matrices {
  const void* row;
  uint32_t (*result)[4];
};

template <bool kTransposed>
void load_matrices(uint32_t (&matrices)[4], const void* row) {
  check_read(row, 16);
  Matrices argument{row, &matrices};
  take_warp_step(
      [](void* const(&lanes)[kWarpSize]) {
        for (unsigned lane = 0; lane < kWarpSize; ++lane) {
          for (unsigned matrix = 0; matrix < 4; ++matrix) {
            uint16_t pair[2];
            for (unsigned i = 0; i < 2; ++i) {
              const unsigned row = kTransposed ? 2 * (lane % 4) + i : lane / 4;
              const unsigned column = kTransposed ? lane / 4 : 2 * (lane % 4) + i;
              const auto* source = static_cast<const Matrices*>(lanes[8 * matrix + row]);
              std::memcpy(&pair[i], static_cast<const char*>(source->row) + 2 * column, 2);
            }
            std::memcpy(&(*static_cast<const Matrices*>(lanes[lane])->result)[matrix], pair, 4);
          }
        }
      },
      &argument);
}

template <typename scalar_t>
struct Product {
  float (*c)[4];
  const uint32_t (*a)[4];
  uint32_t b[2];

  // Element `index` of 32 bytes whose first 16 the four lanes have in `first`, and the others in `second`.
  static float element(uint32_t first, uint32_t second, unsigned index) {
    constexpr unsigned kEach = 4 / sizeof(scalar_t);
    const uint32_t bits = index < 4 * kEach ? first : second;
    if constexpr (kEach == 1) {
      const uint32_t cut = bits & 0xFFFFE000u;  // the other 13 bits are not looked at
      float number;
      std::memcpy(&number, &cut, 4);
      return number;
    } else {
      scalar_t numbers[2];
      std::memcpy(numbers, &bits, 4);
      return static_cast<float>(numbers[index % 2]);
    }
  }
};

}  // namespace emulation

inline void load_matrices(uint32_t (&matrices)[4], const void* row) {
  emulation::load_matrices<false>(matrices, row);
}

inline void load_matrices_transposed(uint32_t (&matrices)[4], const void* row) {
  emulation::load_matrices<true>(matrices, row);
}

template <typename scalar_t>
void multiply_add(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  using namespace emulation;
  using P = Product<scalar_t>;
  P argument{&c, &a, {b0, b1}};
  take_warp_step(
      [](void* const(&lanes)[kWarpSize]) {
        constexpr unsigned kEach = 4 / sizeof(scalar_t), kDepth = 8 * kEach;
        float left[16][kDepth], right[8][kDepth];
        for (unsigned k = 0; k < kDepth; ++k) {
          const unsigned lane = k / kEach % 4;
          for (unsigned row = 0; row < 16; ++row) {
            const auto& a = *static_cast<const P*>(lanes[row % 8 * 4 + lane])->a;
            left[row][k] = P::element(a[row / 8], a[2 + row / 8], k);
          }
          for (unsigned column = 0; column < 8; ++column) {
            const auto& b = static_cast<const P*>(lanes[column * 4 + lane])->b;
            right[column][k] = P::element(b[0], b[1], k);
          }
        }
        for (unsigned lane = 0; lane < kWarpSize; ++lane) {
          for (unsigned i = 0; i < 4; ++i) {
            const unsigned row = lane / 4 + i / 2 * 8, column = lane % 4 * 2 + i % 2;
            float sum = (*static_cast<const P*>(lanes[lane])->c)[i];
            for (unsigned k = 0; k < kDepth; ++k) {
              sum += left[row][k] * right[column][k];
            }
            (*static_cast<const P*>(lanes[lane])->c)[i] = sum;
          }
        }
      },
      &argument);
}

inline uint32_t round_to_tf32(uint32_t number) {
  return (number & 0x7F800000u) == 0x7F800000u ? number : (number + 0x1000u) & 0xFFFFE000u;
}

template <typename scalar_t>
uint32_t pack(float low, float high) {
  const scalar_t numbers[2] = {static_cast<scalar_t>(low), static_cast<scalar_t>(high)};
  uint32_t packed;
  std::memcpy(&packed, numbers, 4);
  return packed;
}

inline float exp2_fast(float x) {
  return std::exp2(x);
}

}  // namespace gpt4fast
