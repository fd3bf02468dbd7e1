#pragma once

#include <cstdint>
#include <cstring>

// What memory holds. Bits only, without torch's classes: their inline functions would be compiled once for each
// instruction set under one name, and the linker would keep any of them for all processors.
namespace gpt4fast::cpu {

struct BFloat16 {
  uint16_t bits;
};

struct Half {
  uint16_t bits;
};

}  // namespace gpt4fast::cpu
