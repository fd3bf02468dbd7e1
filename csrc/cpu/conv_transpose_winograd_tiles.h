#pragma once

// Which outputs the products of conv_transpose_winograd_kernel.cpp make, and what a block keeps of its inputs for them.

#include <cstdint>

#include "conv_transpose_blocks.h"
#include "conv_transpose_winograd_weight.h"

namespace gpt4fast::cpu::GPT4FAST_LEVEL {

// From one output of a phase to its next.
inline int64_t output_step(const ConvTransposeParams& p, int axis) {
  return p.is_adjoint ? 1 : p.stride[axis];
}

// How many phases have inputs of their own.
inline int64_t input_phases(const ConvTransposeParams& p) {
  return p.is_adjoint ? p.stride[0] * p.stride[1] * p.stride[2] : 1;
}

// The outputs of one phase along one axis of a block: tiles of two, or of one where the axis is absent.
struct Phase {
  int64_t out;           // of the first output, from the block's first
  int64_t first, tiles;  // coarse place around which the first tile is computed
  bool is_padded;        // the last tile's second output is beyond the block

  Phase(const ConvTransposeParams& p, const Block& outputs, int axis, int64_t phase) {
    int64_t count = outputs.count[axis + 1];
    if (p.is_adjoint) {
      out = 0;
      first = outputs.first[axis + 1] + (is_absent(p, axis) ? 0 : 1);
    } else {
      const int64_t begin = outputs.first[axis + 1] + p.padding[axis], end = begin + count - 1;
      const int64_t stride = p.stride[axis];
      first = divide_up(begin - phase, stride);
      count = most<int64_t>(divide_down(end - phase, stride) - first + 1, 0);
      out = first * stride + phase - begin;
    }
    tiles = is_absent(p, axis) ? count : divide_up(count, 2);
    is_padded = !is_absent(p, axis) && count % 2 != 0;
  }
};

// What a block keeps along one axis: the difference of place `first` to the one before, the value of `first`, the next
// difference, and so on to a last difference; of an absent axis the values.
struct Kept {
  int64_t first, length;
  bool absent;

  Kept() = default;

  Kept(const ConvTransposeParams& p, const Block& outputs, int axis)
      : first(p.is_adjoint ? Phase(p, outputs, axis, 0).first
                           : (outputs.first[axis + 1] + p.padding[axis]) / p.stride[axis]),
        length(0),
        absent(is_absent(p, axis)) {
    for (int64_t i = 0; i < p.stride[axis]; ++i) {
      const Phase phase(p, outputs, axis, i);
      if (phase.tiles > 0) {
        length = most(length, begin(phase) + (absent ? phase.tiles : 4 * phase.tiles - 1));
      }
    }
  }

  // Of at most so many outputs.
  static int64_t most_length(const ConvTransposeParams& p, int64_t outputs, int axis) {
    if (is_absent(p, axis)) {
      return outputs;
    }
    return p.is_adjoint ? 4 * divide_up(outputs, 2) - 1 : 2 * (divide_up(outputs - 1, p.stride[axis]) + 1) + 1;
  }

  // Where the first tile of a phase begins.
  int64_t begin(const Phase& phase) const { return (absent ? 1 : 2) * (phase.first - first); }

  // Where the value of a place is brought to. The outermost values are where later the outermost differences are.
  int64_t index_of(int64_t place) const {
    return absent ? place - first : least(most<int64_t>(2 * (place - first) + 1, 0), length - 1);
  }

  // Whether a value is brought to this index.
  bool has_value(int64_t index) const { return absent || index % 2 != 0 || index == 0 || index == length - 1; }

  int64_t place(int64_t index) const { return absent ? first + index : first + index / 2 - (index == 0); }
};

}  // namespace gpt4fast::cpu::GPT4FAST_LEVEL
