#pragma once

// Scale, offset and activation of a block's sums, and the one write of its outputs.

#include <utility>

#include "conv_transpose_blocks.h"
#include "vector_activation.h"

namespace gpt4fast::cpu::GPT4FAST_LEVEL {

// Floats between the channels of `lines` below: no power of 2, of which a cache has few at a time.
inline int64_t line_step(const Block& block) {
  return round_up(block.size(), kLanes) + kLanes;
}

// Writes outputs of a block from sums (block.size() rows, width) of `channels` channels from `channel` on. lines is
// scratch memory (kLanes, line_step): channels go to memory one after another, since sixteen planes written in turn
// take twice as long.
template <typename scalar_t>
void write_outputs(const ConvTransposeParams& p, const Block& block, const float* sums, int64_t width, int64_t channel,
                   int64_t channels, float* lines) {
  // Outputs that lie in a row in memory: a line, or as many whole ones as there are.
  int64_t run = block.count[3], plane = p.out_size[2];
  for (int axis = 2; axis > 0 && run == plane; --axis) {
    run *= block.count[axis];
    plane *= p.out_size[axis - 1];
  }
  const int64_t step = line_step(block);
  const int64_t image = p.out_size[0] * p.out_size[1] * p.out_size[2];
  const auto place_of = [&](int64_t row) {
    int64_t at[4];
    for (int axis = 3; axis >= 0; --axis) {
      at[axis] = block.first[axis] + row % block.count[axis];
      row /= block.count[axis];
    }
    return std::pair{at[0], (at[1] * p.out_size[1] + at[2]) * p.out_size[2] + at[3]};
  };
  auto* out = static_cast<scalar_t*>(p.out);
  with_activation(p.activation, [&](auto activation) {
    const auto finish = [&](Vector sum, int64_t c) {
      return activation(multiply_add(sum, load(p.scale + channel + c), load(p.offset + channel + c)), p.negative_slope);
    };
    for (int64_t row = 0; row < block.size(); row += run) {
      const auto [index, position] = place_of(row);
      const float* from = sums + row * width;
      if (p.channels_last) {
        scalar_t* target = out + (index * image + position) * p.out_channels + channel;
        for (int64_t i = 0; i < run; ++i, from += width, target += p.out_channels) {
          for (int64_t c = 0; c < channels; c += kLanes) {
            store_part(target + c, finish(load(from + c), c), channels - c);
          }
        }
        continue;
      }
      for (int64_t c = 0; c < channels; c += kLanes) {
        for (int64_t i = 0; i < run; i += kLanes) {
          Vector square[kLanes];
          for (int64_t j = 0; j < kLanes; ++j) {
            square[j] = i + j < run ? finish(load(from + (i + j) * width + c), c) : Vector{};
          }
          transpose(square);
          for (int64_t j = 0; j < kLanes; ++j) {
            store(lines + j * step + i, square[j]);
          }
        }
        for (int64_t j = 0; j < least(kLanes, channels - c); ++j) {
          scalar_t* target = out + (index * p.out_channels + channel + c + j) * image + position;
          for (int64_t i = 0; i < run; i += kLanes) {
            store_part(target + i, load(lines + j * step + i), run - i);
          }
        }
      }
    }
  });
}

}  // namespace gpt4fast::cpu::GPT4FAST_LEVEL
