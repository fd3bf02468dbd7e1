#pragma once

// Inputs of a transposed convolution, brought into the order (pixels, channels).

#include <cstdint>

#include "../conv_transpose.h"
#include "pack_row.h"

namespace gpt4fast::cpu::GPT4FAST_LEVEL {

// Whether pixels are neighbours in memory, and channels lie apart.
inline bool has_planes(const ConvTransposeParams& p) {
  return p.input_strides[4] == 1 && p.input_strides[1] != 1;
}

// Copies `channels` channels of pixels that lie at the distance p.input_strides[4], with zeros up to depth: pixel i to
// target(i).
template <typename T, typename scalar_t, typename Target>
void copy_pixels(const ConvTransposeParams& p, const scalar_t* source, int64_t pixels, int64_t channels, int64_t depth,
                 Target target) {
  if (!has_planes(p)) {
    for (int64_t i = 0; i < pixels; ++i) {
      pack_row(source + i * p.input_strides[4], p.input_strides[1], channels, depth, target(i));
    }
    return;
  }
  for (int64_t i = 0; i < pixels; i += kLanes) {
    const int64_t count = least(kLanes, pixels - i);
    for (int64_t c = 0; c < depth; c += kLanes) {
      Vector square[kLanes];
      for (int64_t j = 0; j < kLanes; ++j) {
        const scalar_t* from = source + (c + j) * p.input_strides[1] + i;
        square[j] = c + j >= channels ? Vector{} : load_part(from, count);
      }
      transpose(square);
      for (int64_t j = 0; j < count; ++j) {
        store_part(target(i + j) + c, square[j], depth - c);
      }
    }
  }
}

}  // namespace gpt4fast::cpu::GPT4FAST_LEVEL
