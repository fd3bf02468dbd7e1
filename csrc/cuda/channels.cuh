#pragma once

// Elements of a tensor (N, C, *spatial), contiguous or channels last, 16 bytes of them to a thread, and whose channel
// each of them is. Memory is the limit of kernels that take them so: one serves both half types, whose bits are
// uint16_t to it, and which of the two they are it asks at run time.

#include <cstdint>
#include <type_traits>

#include "common/dtypes.h"
#include "launch.h"

namespace gpt4fast {

enum class HalfType { float16, bfloat16 };

inline HalfType half_type(torch::headeronly::ScalarType dtype) {
  return dtype == torch::headeronly::ScalarType::BFloat16 ? HalfType::bfloat16 : HalfType::float16;
}

// As DTYPE_SWITCH, with the type that a kernel sees.
#define ELEMENT_SWITCH(DTYPE, ARGUMENT, NAME, ...)      \
  DTYPE_SWITCH(DTYPE, ARGUMENT, switch_scalar_t, [&] {  \
    using NAME = gpt4fast::element_of<switch_scalar_t>; \
    return __VA_ARGS__();                               \
  })

template <typename scalar_t>
using element_of = std::conditional_t<sizeof(scalar_t) == 2, uint16_t, float>;

// 16 bytes, the widest single load or store.
template <typename element_t>
struct alignas(16) Vector {
  static constexpr int kSize = 16 / sizeof(element_t);
  element_t elements[kSize];

  __device__ __forceinline__ void get(float (&numbers)[kSize], HalfType type) const {
    if constexpr (kSize == 4) {
      get_as<float>(numbers);
    } else if (type == HalfType::bfloat16) {
      get_as<torch::headeronly::BFloat16>(numbers);
    } else {
      get_as<torch::headeronly::Half>(numbers);
    }
  }

  __device__ __forceinline__ void set(const float (&numbers)[kSize], HalfType type) {
    if constexpr (kSize == 4) {
      set_as<float>(numbers);
    } else if (type == HalfType::bfloat16) {
      set_as<torch::headeronly::BFloat16>(numbers);
    } else {
      set_as<torch::headeronly::Half>(numbers);
    }
  }

 private:
  template <typename scalar_t>
  __device__ __forceinline__ void get_as(float (&numbers)[kSize]) const {
    for (int k = 0; k < kSize; ++k) {
      numbers[k] = static_cast<float>(reinterpret_cast<const scalar_t*>(elements)[k]);
    }
  }

  template <typename scalar_t>
  __device__ __forceinline__ void set_as(const float (&numbers)[kSize]) {
    for (int k = 0; k < kSize; ++k) {
      reinterpret_cast<scalar_t*>(elements)[k] = static_cast<scalar_t>(numbers[k]);
    }
  }
};

inline constexpr int kVectorThreads = 256;  // of a block: each has a vector of its own

__device__ __forceinline__ bool is_aligned(const void* pointer) {
  return reinterpret_cast<uintptr_t>(pointer) % 16 == 0;  // false for a view that starts in between
}

// The vector at `begin` of `count` elements, zeros behind them.
template <typename element_t>
__device__ __forceinline__ Vector<element_t> load_vector(const void* from, int64_t begin, int64_t count) {
  const auto* source = static_cast<const element_t*>(from) + begin;
  Vector<element_t> values;
  if (begin + values.kSize <= count && is_aligned(from)) {
    return *reinterpret_cast<const Vector<element_t>*>(source);
  }
#pragma unroll
  for (int k = 0; k < values.kSize; ++k) {
    values.elements[k] = begin + k < count ? source[k] : element_t{};
  }
  return values;
}

// To a fresh tensor, which torch aligns.
template <typename element_t>
__device__ __forceinline__ void store_vector(void* to, const Vector<element_t>& values, int64_t begin, int64_t count) {
  auto* target = static_cast<element_t*>(to) + begin;
  if (begin + values.kSize <= count) {
    *reinterpret_cast<Vector<element_t>*>(target) = values;
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
