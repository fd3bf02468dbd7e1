#pragma once

#include <cstdint>
#include <type_traits>

#include "simd/simd.h"

namespace gpt4fast::cpu::GPT4FAST_LEVEL {

// Calls use with the one of the constants kFirst to kLast that equals value.
template <int kFirst, int kLast, typename Use>
inline void with_constant(int64_t value, Use use) {
  if constexpr (kFirst < kLast) {
    if (value != kFirst) {
      return with_constant<kFirst + 1, kLast>(value, use);
    }
  }
  use(std::integral_constant<int, kFirst>());
}

}  // namespace gpt4fast::cpu::GPT4FAST_LEVEL
