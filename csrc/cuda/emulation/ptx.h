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

inline unsigned shared_address(const void* pointer) {
  return static_cast<unsigned>(static_cast<const char*>(pointer) -
                               static_cast<const char*>(emulation::dynamic_shared_memory()));
}

inline void publish_writes() {
  emulation::publish_writes();
}

inline void fence_products() {}

inline void commit_products() {
  emulation::commit_products();
}

template <int kLeft>
void wait_for_products() {
  emulation::wait_for_products(kLeft);
}

template <typename T, int kTiles>
void settle(T (&)[kTiles][4]) {}

namespace emulation {

// A matrix in shared memory, by a descriptor of 128-byte swizzle: its address, and how far it is from 64 elements to
// the next 64 of those that are contiguous, and from 8 to the next 8 of the others.
struct SwizzledMatrix {
  uint64_t descriptor;

  const char* address(unsigned contiguous, unsigned other) const {
    const auto field = [&](int bit) { return static_cast<unsigned>(descriptor >> bit & 0x3FFF) * 16; };
    const unsigned offset =
        field(0) + contiguous / 64 * field(16) + contiguous % 64 * 2 + other / 8 * field(32) + other % 8 * 128;
    return static_cast<const char*>(dynamic_shared_memory()) + (offset ^ offset / 128 % 8 * 16);
  }

  template <typename scalar_t>
  float read(unsigned contiguous, unsigned other) const {
    scalar_t number;
    std::memcpy(&number, address(contiguous, other), 2);
    return static_cast<float>(number);
  }

  // The lane's share of so many rows of contiguous elements.
  void check(unsigned rows, unsigned contiguous) const {
    if (descriptor >> 62 != 1 || (descriptor >> 49 & 7) != 0) {
      fault("multiplies a matrix that is not laid out by the 128-byte swizzle");
    }
    for (unsigned row = threadIdx.x % kWarpSize; row < rows; row += kWarpSize) {
      for (unsigned column = 0; column < contiguous; column += 8) {
        check_unordered_read(address(column, row), 16);
      }
    }
  }
};

// Of kColumns sums, with a in registers and b's columns contiguous, or both in shared memory with contiguous rows.
template <typename scalar_t, unsigned kColumns, bool kIsHeld>
struct GroupProductOf {
  static void check(const GroupProduct& product) {
    if constexpr (kIsHeld) {
      SwizzledMatrix{product.b}.check(16, kColumns);
    } else {
      SwizzledMatrix{product.a}.check(64, 16);
      SwizzledMatrix{product.b}.check(kColumns, 16);
    }
  }

  static void perform(const GroupProduct* const (&lanes)[kWarpSize]) {
    const SwizzledMatrix a{lanes[0]->a}, b{lanes[0]->b};
    float left[16][16], right[kColumns][16];
    for (unsigned k = 0; k < 16; ++k) {
      for (unsigned row = 0; row < 16; ++row) {
        if constexpr (kIsHeld) {
          const auto& held = *lanes[row % 8 * 4 + k / 2 % 4]->held;
          left[row][k] = Product<scalar_t>::element(held[row / 8], held[2 + row / 8], k);
        } else {
          left[row][k] = a.read<scalar_t>(k, lanes[0]->warp % 4 * 16 + row);
        }
      }
      for (unsigned column = 0; column < kColumns; ++column) {
        right[column][k] = kIsHeld ? b.read<scalar_t>(column, k) : b.read<scalar_t>(k, column);
      }
    }
    for (unsigned lane = 0; lane < kWarpSize; ++lane) {
      for (unsigned i = 0; i < kColumns / 2; ++i) {
        const unsigned row = lane / 4 + i % 4 / 2 * 8, column = i / 4 * 8 + lane % 4 * 2 + i % 2;
        float sum = lanes[lane]->adds ? lanes[lane]->sums[i] : 0.0f;
        for (unsigned k = 0; k < 16; ++k) {
          sum += left[row][k] * right[column][k];
        }
        lanes[lane]->sums[i] = sum;
      }
    }
  }
};

}  // namespace emulation

template <typename scalar_t, int kColumns>
void start_product(float (&sums)[kColumns / 8][4], uint64_t a, uint64_t b, bool adds) {
  using Of = emulation::GroupProductOf<scalar_t, kColumns, false>;
  emulation::start_product({&Of::check, &Of::perform, &sums[0][0], nullptr, a, b, adds}, kColumns / 2);
}

template <typename scalar_t, int kColumns>
void start_product(float (&sums)[kColumns / 8][4], const uint32_t (&a)[4], uint64_t b) {
  using Of = emulation::GroupProductOf<scalar_t, kColumns, true>;
  emulation::start_product({&Of::check, &Of::perform, &sums[0][0], &a, 0, b, true}, kColumns / 2);
}

}  // namespace gpt4fast
