#pragma once

// Fetches the inputs of the block to come while the present one is computed.

#include <algorithm>

#include "conv_transpose_blocks.h"
#include "conv_transpose_inputs.h"

namespace gpt4fast::cpu::GPT4FAST_LEVEL {

// Copying a block's inputs is a burst of short rows, far apart, that would wait for memory: processors prefetch along a
// stream. They are brought into L2 in equal steps instead.
class InputPrefetch {
 public:
  InputPrefetch() = default;

  // Of channels [first_channel, first_channel + channels) of the inputs of the outputs, in so many steps.
  template <typename scalar_t>
  InputPrefetch(const ConvTransposeParams& p, const Block& outputs, int64_t first_channel, int64_t channels,
                int64_t steps, const scalar_t*) {
    const Block inputs = inputs_of(p, outputs);
    constexpr auto kSize = static_cast<int64_t>(sizeof(scalar_t));
    const int64_t* strides = p.input_strides;
    row_ = static_cast<const char*>(p.input) + kSize * first_channel * strides[1];
    for (int axis = 0; axis < 4; ++axis) {
      row_ += kSize * inputs.first[axis] * strides[axis == 0 ? 0 : axis + 1];
    }
    const Level levels[4] = {{inputs.count[2], kSize * strides[3], 0},
                             {inputs.count[1], kSize * strides[2], 0},
                             {has_planes(p) ? channels : 1, kSize * strides[1], 0},
                             {inputs.count[0], kSize * strides[0], 0}};
    std::copy(levels, levels + 4, levels_);
    lines_ = divide_up(kSize * (has_planes(p) ? inputs.count[3] : inputs.count[3] * strides[4]), 64);
    left_ = lines_;
    for (const Level& level : levels_) {
      left_ *= level.count;
    }
    each_ = divide_up(left_, most<int64_t>(steps, 1));
  }

  void step() {
    for (const int64_t stop = most<int64_t>(left_ - each_, 0); left_ > stop; --left_) {
      __builtin_prefetch(row_ + line_ * 64, 0, 2);
      if (++line_ == lines_) {
        line_ = 0;
        next_row();
      }
    }
  }

 private:
  struct Level {
    int64_t count, stride, at;
  };

  void next_row() {
    for (Level& level : levels_) {
      row_ += level.stride;
      if (++level.at < level.count) {
        return;
      }
      row_ -= level.count * level.stride;
      level.at = 0;
    }
  }

  const char* row_ = nullptr;
  Level levels_[4] = {};
  int64_t lines_ = 0, line_ = 0;  // cache lines of a row
  int64_t left_ = 0, each_ = 0;   // in all, and of a step
};

}  // namespace gpt4fast::cpu::GPT4FAST_LEVEL
