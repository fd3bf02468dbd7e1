#pragma once

#include "../element_type.h"
#include "simd/simd.h"

namespace gpt4fast::cpu::GPT4FAST_LEVEL {

// Calls use with a number of the type, so that what it calls is compiled for each.
template <typename Use>
inline auto with_element_type(ElementType dtype, Use use) {
  switch (dtype) {
    case ElementType::bfloat16: return use(BFloat16{});
    case ElementType::float16: return use(Half{});
    default: return use(float{});
  }
}

}  // namespace gpt4fast::cpu::GPT4FAST_LEVEL
