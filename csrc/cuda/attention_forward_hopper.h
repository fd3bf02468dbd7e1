#pragma once

// Attention of many queries by Hopper's own instructions (attention_forward_hopper.cu, compiled for sm_90a alone).

#include <algorithm>
#include <cstdlib>
#include <cstring>

#include "attention_forward_block.cuh"

namespace gpt4fast {

// Half types, without a mask or dropout. Not yet run on a GPU, so only where GPT4FAST_WGMMA=1 asks for it.
inline bool takes_hopper(const Device& device, const AttentionLaunch& p) {
  const char* const asked = std::getenv("GPT4FAST_WGMMA");
  return asked && std::strcmp(asked, "1") == 0 && device.is_hopper() && !p.mask && !p.dropout.seed;
}

template <typename scalar_t>
void attend_on_hopper(const Device& device, AttentionLaunch& p);

}  // namespace gpt4fast
