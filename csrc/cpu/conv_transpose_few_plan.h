#pragma once

// How conv_transpose_few_kernel.cpp cuts a call, and its scratch memory.

#include "conv_transpose_blocks.h"
#include "pack_row.h"
#include "scratch.h"

namespace gpt4fast::cpu::GPT4FAST_LEVEL {

inline constexpr int64_t kMostProducts = 128 << 10;  // of a block, in floats: half of L2

inline constexpr int64_t kPanel = 64;  // pixels that are multiplied at once

struct FewLayout {
  int64_t inputs, outputs, taps;  // of a group

  explicit FewLayout(const ConvTransposeParams& p)
      : inputs(p.in_channels / p.groups),
        outputs(p.out_channels / p.groups),
        taps(p.kernel[0] * p.kernel[1] * p.kernel[2]) {}

  int64_t rows() const { return taps * outputs; }
};

// A column of taps, and what it reaches of a line of outputs that has one phase (outputs that are equal modulo the
// stride): outputs [first, first + count) of the phase, of inputs from `input` on.
struct Column {
  int64_t tap, first, count, input;
};

// A row of taps that reaches a row of outputs, and the row of inputs, counted from the block's first, that it
// multiplies.
struct MeetingRow {
  int64_t tap, input;
};

// The same for a line of outputs in all dimensions.
struct TapRow {
  int64_t tap;          // its first
  const float* inputs;  // products with its first tap's weight
};

template <typename scalar_t>
struct FewPlan : Scratch {
  using T = Compute<scalar_t>;

  FewLayout layout;
  int64_t depth;
  Blocks blocks;
  int64_t pixels;          // between rows of products
  T* panel;                // (depth / kDepth, kPanel, kDepth)
  float* products;         // (layout.rows(), pixels)
  float* lines;            // (outputs, line_length): finished
  Column* columns;         // (kernel W), by phases
  int64_t* first_columns;  // (phases + 1)
  int64_t* meetings;       // (rows of outputs): how many rows of taps reach it
  MeetingRow* meeting;     // (rows of outputs, kernel H): which
  TapRow* tap_rows;        // (kernel D * H)
  int64_t phases;          // of a line
  int64_t line_length;

  FewPlan(const ConvTransposeParams& p, int64_t threads, void* memory)
      : Scratch(memory),
        layout(p),
        depth(padded_depth<T>(layout.inputs)),
        blocks(p, p.batch * p.out_size[0] * p.out_size[1] * p.out_size[2]) {
    const int64_t rows = layout.rows();
    for (int64_t outputs = blocks.largest().size();
         outputs > 64 && (blocks.most_inputs() * rows > kMostProducts || blocks.count() * p.groups < threads);) {
      outputs /= 2;
      blocks = Blocks(p, outputs);
    }
    // No power of 2 apart, or all rows would share a few lines of the caches: 1.3 times as fast.
    pixels = round_up(blocks.most_inputs(), 64) + 16;
    // With a stride of 2 always both, which are interleaved.
    phases = p.stride[2] == 2 ? 2 : least(p.stride[2], blocks.largest().count[3]);
    line_length = (round_up(divide_up(blocks.largest().count[3], phases), kLanes) + kLanes) * phases;
    take(panel, depth * kPanel);
    take(products, rows * pixels + 2 * kLanes);  // around them is read what means nothing
    products += kLanes;
    take(lines, layout.outputs * line_length);
    take(columns, p.kernel[2]);
    take(first_columns, phases + 1);
    take(meetings, blocks.largest().count[2]);
    take(meeting, blocks.largest().count[2] * p.kernel[1]);
    take(tap_rows, p.kernel[0] * p.kernel[1]);
  }
};

}  // namespace gpt4fast::cpu::GPT4FAST_LEVEL
