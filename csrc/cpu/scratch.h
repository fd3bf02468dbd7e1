#pragma once

#include <cstdint>

#include "simd/simd.h"

namespace gpt4fast::cpu::GPT4FAST_LEVEL {

// Hands out pieces of one block of memory, or, without memory, only counts them.
class Scratch {
 public:
  int64_t bytes = 0;

  explicit Scratch(void* memory) : base_(static_cast<char*>(memory)) {}

  template <typename Item>
  void take(Item*& pointer, int64_t count) {
    pointer = reinterpret_cast<Item*>(base_ + bytes);
    bytes += round_up(count * static_cast<int64_t>(sizeof(Item)), 64);
  }

 private:
  char* base_;
};

}  // namespace gpt4fast::cpu::GPT4FAST_LEVEL
