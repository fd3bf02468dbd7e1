#pragma once

// The outputs of a transposed convolution, cut into blocks, and which inputs meet which of them.

#include <cstdint>

#include "../conv_transpose.h"
#include "simd/simd.h"

namespace gpt4fast::cpu::GPT4FAST_LEVEL {

inline int64_t taps_of(const ConvTransposeParams& p) {
  return p.kernel[0] * p.kernel[1] * p.kernel[2];
}

// Where a tap of the kernel lies in the weight of one pair of channels.
inline int64_t tap_offset(const ConvTransposeParams& p, int64_t tap) {
  return tap / (p.kernel[1] * p.kernel[2]) * p.weight_strides[2] +
         tap / p.kernel[2] % p.kernel[1] * p.weight_strides[3] + tap % p.kernel[2] * p.weight_strides[4];
}

// Axes 0 to 3 are image, D, H, W.
struct Block {
  int64_t first[4], count[4];

  int64_t size() const { return count[0] * count[1] * count[2] * count[3]; }
};

inline int64_t size_of(const ConvTransposeParams& p, int axis) {
  return axis == 0 ? p.batch : p.out_size[axis - 1];
}

// A tap connects a place of the coarse grid and one of the fine grid, along each dimension where
//   fine + padding - tap * dilation = coarse * stride.
// A transposed convolution goes from the coarse grid to the fine one, its adjoint, a convolution, back.

// The inputs that a block's outputs are made of, by the taps [first_tap, last_tap], and perhaps others between them.
inline Block inputs_of(const ConvTransposeParams& p, const Block& outputs, const int64_t (&first_tap)[3],
                       const int64_t (&last_tap)[3]) {
  Block inputs = outputs;
  for (int axis = 0; axis < 3; ++axis) {
    const int64_t begin = outputs.first[axis + 1], end = begin + outputs.count[axis + 1] - 1;
    const int64_t stride = p.stride[axis], padding = p.padding[axis];
    const int64_t nearest = first_tap[axis] * p.dilation[axis], farthest = last_tap[axis] * p.dilation[axis];
    const int64_t first =
        p.is_adjoint ? begin * stride - padding + nearest : divide_up(begin + padding - farthest, stride);
    const int64_t last =
        p.is_adjoint ? end * stride - padding + farthest : divide_down(end + padding - nearest, stride);
    inputs.first[axis + 1] = least(most<int64_t>(first, 0), p.in_size[axis]);
    inputs.count[axis + 1] = most<int64_t>(least(last, p.in_size[axis] - 1) - inputs.first[axis + 1] + 1, 0);
  }
  return inputs;
}

inline Block inputs_of(const ConvTransposeParams& p, const Block& outputs) {
  return inputs_of(p, outputs, {0, 0, 0}, {p.kernel[0] - 1, p.kernel[1] - 1, p.kernel[2] - 1});
}

// Calls use(offset, pixel, count) for a block of a tensor (N, C, *sizes): runs of count pixels that lie at one distance
// in memory, from that offset on; pixel counts those of the block.
template <typename Use>
void for_each_run(const Block& block, const int64_t (&sizes)[3], const int64_t* strides, Use use) {
  int64_t run = block.count[3], lines = block.count[0] * block.count[1] * block.count[2];
  if (block.count[3] == sizes[2] && strides[3] == strides[4] * sizes[2]) {
    run *= block.count[2];
    lines /= most<int64_t>(block.count[2], 1);
  }
  for (int64_t line = 0; line < lines && run > 0; ++line) {
    int64_t rest = line * run, offset = 0;
    for (int axis = 3; axis >= 0; --axis) {
      offset += (block.first[axis] + rest % block.count[axis]) * strides[axis == 0 ? 0 : axis + 1];
      rest /= block.count[axis];
    }
    use(offset, line * run, run);
  }
}

// The outputs of a block along one dimension that a tap of the kernel reaches: count of them, out + i * out_step from
// the block's first, of inputs in + i * in_step from the first of inputs_of.
struct Reached {
  int64_t out, out_step, in, in_step, count;
};

inline Reached reached_by(const ConvTransposeParams& p, const Block& outputs, const Block& inputs, int axis,
                          int64_t tap) {
  const int64_t stride = p.stride[axis], begin = outputs.first[axis + 1], size = p.in_size[axis];
  const int64_t end = begin + outputs.count[axis + 1] - 1, shift = p.padding[axis] - tap * p.dilation[axis];
  if (p.is_adjoint) {
    const int64_t first = most(divide_up(shift, stride), begin),
                  last = least(divide_down(size - 1 + shift, stride), end);
    return {first - begin, 1, first * stride - shift - inputs.first[axis + 1], stride,
            most<int64_t>(last - first + 1, 0)};
  }
  const int64_t first = most(divide_up(begin + shift, stride), inputs.first[axis + 1]);
  const int64_t last = least(divide_down(end + shift, stride), size - 1);
  return {first * stride - shift - begin, stride, first - inputs.first[axis + 1], 1,
          most<int64_t>(last - first + 1, 0)};
}

// Whether no output is reached by more than one tap.
inline bool has_one_tap(const ConvTransposeParams& p) {
  bool one = !p.is_adjoint;
  for (int axis = 0; axis < 3; ++axis) {
    one = one && (p.in_size[axis] == 1 || p.kernel[axis] <= p.stride[axis]);
  }
  return one;
}

// Blocks of nearly equal size that cover the outputs.
class Blocks {
 public:
  // Of about `most_outputs`, whole lines and planes where possible; whole multiples of `strides` strides, so that each
  // tap reaches equally many outputs of each.
  Blocks(const ConvTransposeParams& p, int64_t most_outputs, int64_t strides = 1) : p_(&p) {
    for (int axis = 3; axis >= 0; --axis) {
      const int64_t size = size_of(p, axis), unit = axis == 0 ? 1 : strides * (p.is_adjoint ? 1 : p.stride[axis - 1]);
      const int64_t wanted = divide_up(size, most<int64_t>(most_outputs, 1));
      step_[axis] = least(round_up(divide_up(size, wanted), unit), size);
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

  // Of the inputs of any of the blocks, along a dimension (0 to 2) and in all.
  int64_t most_inputs(int axis) const { return spanned(axis, (p_->kernel[axis] - 1) * p_->dilation[axis]); }
  int64_t most_inputs() const { return step_[0] * most_inputs(0) * most_inputs(1) * most_inputs(2); }

  // Of those that one tap multiplies.
  int64_t most_inputs_of_tap() const { return step_[0] * spanned(0, 0) * spanned(1, 0) * spanned(2, 0); }

 private:
  int64_t spanned(int axis, int64_t reach) const {
    const int64_t length = step_[axis + 1] - 1, stride = p_->stride[axis];
    return least(p_->is_adjoint ? length * stride + reach + 1 : (length + reach) / stride + 1, p_->in_size[axis]);
  }

  const ConvTransposeParams* p_;
  int64_t step_[4], parts_[4];
};

// A thread's share of the tasks: calls begin(outputs) for a block of outputs, then compute(group, block) for the blocks
// of output channels of each group. These change first: they share the inputs of the block of outputs.
template <typename Begin, typename ComputeBlock>
void for_each_task(const Blocks& outputs, int64_t groups, int64_t blocks, int64_t thread, int64_t threads, Begin begin,
                   ComputeBlock compute) {
  const int64_t columns = groups * blocks, tasks = outputs.count() * columns;
  int64_t present = -1;
  for (int64_t task = tasks * thread / threads; task < tasks * (thread + 1) / threads; ++task) {
    if (task / columns != present) {
      present = task / columns;
      begin(outputs[present]);
    }
    compute(task % columns / blocks, task % columns % blocks);
  }
}

}  // namespace gpt4fast::cpu::GPT4FAST_LEVEL
