#pragma once

// Elements of a tensor (N, C, *spatial), contiguous or channels last, 16 bytes of them to a thread, and whose channel
// each of them is.

#include <cstdint>

#include "launch.h"

namespace gpt4fast {

// 16 bytes, the widest single load or store.
template <typename scalar_t>
struct alignas(16) Vector {
  static constexpr int kSize = 16 / sizeof(scalar_t);
  scalar_t elements[kSize];
};

inline constexpr int kVectorThreads = 256;  // of a block: each has a vector of its own

__device__ __forceinline__ bool is_aligned(const void* pointer) {
  return reinterpret_cast<uintptr_t>(pointer) % 16 == 0;  // false for a view that starts in between
}

// The vector at `begin` of `count` elements, zeros behind them.
template <typename scalar_t>
__device__ __forceinline__ Vector<scalar_t> load_vector(const void* from, int64_t begin, int64_t count) {
  const auto* source = static_cast<const scalar_t*>(from) + begin;
  Vector<scalar_t> values;
  if (begin + values.kSize <= count && is_aligned(from)) {
    return *reinterpret_cast<const Vector<scalar_t>*>(source);
  }
#pragma unroll
  for (int k = 0; k < values.kSize; ++k) {
    values.elements[k] = begin + k < count ? source[k] : scalar_t(0.0f);
  }
  return values;
}

// To a fresh tensor, which torch aligns.
template <typename scalar_t>
__device__ __forceinline__ void store_vector(void* to, const Vector<scalar_t>& values, int64_t begin, int64_t count) {
  auto* target = static_cast<scalar_t*>(to) + begin;
  if (begin + values.kSize <= count) {
    *reinterpret_cast<Vector<scalar_t>*>(target) = values;
    return;
  }
#pragma unroll
  for (int k = 0; k < values.kSize; ++k) {
    if (begin + k < count) {
      target[k] = values.elements[k];
    }
  }
}

// use(k, read(channel)) for the kSize elements from `begin` on, element i being one of channel i / inner % channels.
// The channel is found with one division and then counted forwards; 64-bit division is several times dearer and only
// taken where the indices need it.
template <int kSize, typename Read, typename Use>
__device__ __forceinline__ void for_channels(int64_t begin, int64_t count, int64_t inner, int64_t channels,
                                             const Read& read, const Use& use) {
  int64_t position, channel;
  if (count <= UINT32_MAX) {
    const auto index = static_cast<uint32_t>(begin), width = static_cast<uint32_t>(inner);
    position = index % width;
    channel = index / width % static_cast<uint32_t>(channels);
  } else {
    position = begin % inner;
    channel = begin / inner % channels;
  }
  if (position + kSize <= inner) {
    const auto numbers = read(channel);
#pragma unroll
    for (int k = 0; k < kSize; ++k) {
      use(k, numbers);
    }
  } else {
#pragma unroll
    for (int k = 0; k < kSize; ++k) {
      use(k, read(channel));
      const bool next = ++position == inner;
      position = next ? 0 : position;
      channel = next ? channel + 1 : channel;
      channel = channel == channels ? 0 : channel;
    }
  }
}

}  // namespace gpt4fast
