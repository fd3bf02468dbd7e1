#pragma once

// The outputs of a transposed convolution, cut into blocks, and which inputs meet which of them.

#include <cstdint>
#include <numeric>

#include "../conv_transpose.h"
#include "simd/simd.h"

namespace gpt4fast::cpu::GPT4FAST_LEVEL {

inline int64_t divide_down(int64_t a, int64_t b) {
  return a >= 0 ? a / b : -((-a + b - 1) / b);
}

inline int64_t divide_up(int64_t a, int64_t b) {
  return -divide_down(-a, b);
}

// Axes 0 to 3 are image, D, H, W.
struct Block {
  int64_t first[4], count[4];

  int64_t size() const { return count[0] * count[1] * count[2] * count[3]; }
};

inline int64_t size_of(const ConvTransposeParams& p, int axis) {
  return axis == 0 ? p.batch : p.out_size[axis - 1];
}

// The inputs that a block's outputs are made of, and perhaps others between them.
inline Block inputs_of(const ConvTransposeParams& p, const Block& outputs) {
  Block inputs = outputs;
  for (int axis = 0; axis < 3; ++axis) {
    const int64_t begin = outputs.first[axis + 1] + p.padding[axis], reach = (p.kernel[axis] - 1) * p.dilation[axis];
    const int64_t first = most<int64_t>(divide_up(begin - reach, p.stride[axis]), 0);
    const int64_t last =
        least(divide_down(begin + outputs.count[axis + 1] - 1, p.stride[axis]), p.in_size[axis] - 1);
    inputs.first[axis + 1] = first;
    inputs.count[axis + 1] = most<int64_t>(last - first + 1, 0);
  }
  return inputs;
}

// The outputs of a block along one dimension that a tap of the kernel reaches: count of them, out + i * out_step from the
// block's first, of inputs in + i * in_step from the first of inputs_of.
struct Reached {
  int64_t out, out_step, in, in_step, count;
};

inline Reached reached_by(const ConvTransposeParams& p, const Block& outputs, const Block& inputs, int axis,
                          int64_t tap) {
  // Output o and input i meet where o + padding - tap * dilation = i * stride.
  const int64_t stride = p.stride[axis], begin = outputs.first[axis + 1];
  const int64_t shift = p.padding[axis] - tap * p.dilation[axis];
  const int64_t first = most(divide_up(begin + shift, stride), inputs.first[axis + 1]);
  const int64_t last = least(divide_down(begin + outputs.count[axis + 1] - 1 + shift, stride), p.in_size[axis] - 1);
  return {first * stride - shift - begin, stride, first - inputs.first[axis + 1], 1, most<int64_t>(last - first + 1, 0)};
}

// Whether no output is reached by more than one tap.
inline bool has_one_tap(const ConvTransposeParams& p) {
  bool one = true;
  for (int axis = 0; axis < 3; ++axis) {
    one = one && (p.in_size[axis] == 1 || p.kernel[axis] <= p.stride[axis]);
  }
  return one;
}

// Blocks of nearly equal size that cover the outputs.
class Blocks {
 public:
  // Of at most `most_outputs`, whole lines and planes where possible; whole multiples of the stride, so that each tap
  // reaches equally many outputs of each.
  Blocks(const ConvTransposeParams& p, int64_t most_outputs) : p_(&p) {
    for (int axis = 3; axis >= 0; --axis) {
      const int64_t size = size_of(p, axis), stride = axis == 0 ? 1 : p.stride[axis - 1];
      const int64_t wanted = divide_up(size, most<int64_t>(most_outputs, 1));
      step_[axis] = least(round_up(divide_up(size, wanted), stride), size);
      parts_[axis] = divide_up(size, step_[axis]);
      most_outputs /= step_[axis];
    }
  }

  int64_t count() const { return parts_[0] * parts_[1] * parts_[2] * parts_[3]; }

  // Images change last.
  Block operator[](int64_t index) const {
    Block block;
    for (int axis = 3; axis >= 0; --axis) {
      block.first[axis] = index % parts_[axis] * step_[axis];
      block.count[axis] = least(step_[axis], size_of(*p_, axis) - block.first[axis]);
      index /= parts_[axis];
    }
    return block;
  }

  // At least as large in every dimension as any of the blocks.
  Block largest() const { return {{0, 0, 0, 0}, {step_[0], step_[1], step_[2], step_[3]}}; }

  // Of the inputs of any of the blocks.
  int64_t most_inputs() const {
    int64_t inputs = step_[0];
    for (int axis = 0; axis < 3; ++axis) {
      const int64_t reach = step_[axis + 1] - 1 + (p_->kernel[axis] - 1) * p_->dilation[axis];
      inputs *= least(reach / p_->stride[axis] + 1, p_->in_size[axis]);
    }
    return inputs;
  }

 private:
  const ConvTransposeParams* p_;
  int64_t step_[4], parts_[4];
};

}  // namespace gpt4fast::cpu::GPT4FAST_LEVEL
