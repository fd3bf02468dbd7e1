#pragma once

// What kernels take from the compiler and CUDA's headers, for g++.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>

#include "emulator.h"

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)

struct uint3 {
  unsigned x, y, z;
};
struct dim3 {
  unsigned x, y, z;
  dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};
struct alignas(16) uint4 {
  unsigned x, y, z, w;
};
struct alignas(16) float4 {
  float x, y, z, w;
};
struct alignas(8) float2 {
  float x, y;
};

extern uint3 threadIdx, blockIdx;  // of the running thread
extern dim3 blockDim, gridDim;

using std::max;
using std::min;

inline void __syncthreads() {
  gpt4fast::emulation::wait_for_block();
}

inline void __syncwarp() {
  gpt4fast::emulation::wait_for_warp();
}

template <typename T>
T __shfl_xor_sync(unsigned mask, T value, int lane_mask) {
  using namespace gpt4fast::emulation;
  struct Argument {
    T value, result;
    int lane_mask;
  } argument{value, value, lane_mask};
  if (mask != 0xFFFFFFFFu) {
    fault("shuffles with a part of its warp, which is not emulated");
  }
  take_warp_step(
      [](void* const(&lanes)[kWarpSize]) {
        for (unsigned lane = 0; lane < kWarpSize; ++lane) {
          auto* mine = static_cast<Argument*>(lanes[lane]);
          const unsigned other = lane ^ static_cast<unsigned>(mine->lane_mask);
          mine->result = other < kWarpSize ? static_cast<const Argument*>(lanes[other])->value : mine->value;
        }
      },
      &argument);
  return argument.result;
}

template <typename T>
T __shfl_sync(unsigned mask, T value, int source) {
  using namespace gpt4fast::emulation;
  struct Argument {
    T value, result;
    int source;
  } argument{value, value, source};
  if (mask != 0xFFFFFFFFu) {
    fault("shuffles with a part of its warp, which is not emulated");
  }
  take_warp_step(
      [](void* const(&lanes)[kWarpSize]) {
        for (void* lane : lanes) {
          auto* mine = static_cast<Argument*>(lane);
          mine->result = static_cast<const Argument*>(lanes[static_cast<unsigned>(mine->source) % kWarpSize])->value;
        }
      },
      &argument);
  return argument.result;
}

namespace gpt4fast::emulation {

void* dynamic_shared_memory();

}  // namespace gpt4fast::emulation
