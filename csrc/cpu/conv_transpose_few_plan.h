#pragma once

// How conv_transpose_few_kernel.cpp cuts a call, and its scratch memory.

#include <algorithm>
#include <numeric>

#include "conv_transpose_blocks.h"
#include "pack_row.h"
#include "scratch.h"

namespace gpt4fast::cpu::GPT4FAST_LEVEL {

inline constexpr int64_t kMostInputBytes = 512 << 10;  // of a block: half of L2
inline constexpr int64_t kMostOutputs = 64 << 10;      // of a block
inline constexpr int64_t kProducts = 128;              // that are summed in one run

struct FewLayout {
  int64_t inputs, outputs, taps;  // of a group

  explicit FewLayout(const ConvTransposeParams& p)
      : inputs(p.in_channels / p.groups), outputs(p.out_channels / p.groups), taps(taps_of(p)) {}
};

// Along one dimension, output step * stride + phase meets input step + shift by each tap whose shift is whole.
struct FewAxis {
  int64_t stride, padding, dilation, first_shift, last_shift;

  FewAxis(const ConvTransposeParams& p, int axis)
      : stride(p.stride[axis]),
        padding(p.padding[axis]),
        dilation(p.dilation[axis]),
        first_shift(divide_up(padding - (p.kernel[axis] - 1) * dilation, stride)),
        last_shift(divide_down(padding + stride - 1, stride)) {}

  int64_t steps(int64_t outputs) const { return divide_up(outputs, stride); }
  int64_t inputs(int64_t outputs) const { return steps(outputs) + last_shift - first_shift; }

  // Of a tap.
  int64_t shift(int64_t tap) const { return -divide_down(tap * dilation - padding, stride); }
  int64_t phase(int64_t tap, int64_t its_shift) const { return tap * dilation - padding + stride * its_shift; }
};

// Where a tap's inputs lie, counted from those of the first shifts, and its weights.
struct Tap {
  int64_t input, weight;
};

// What lies so far apart for each of the kDepth steps of a sum.
template <typename T>
struct FewOperand {
  const T* data;
  int64_t step;
};

template <typename scalar_t>
struct FewPlan : Scratch {
  using T = Compute<scalar_t>;

  FewLayout layout;
  FewAxis axes[3];
  int64_t depth;
  Blocks blocks;
  int64_t size[3];  // of the planes
  int64_t pitch;    // pixels from one plane to the next
  int64_t phases[3];
  bool is_by_fours;  // the taps of a row are multiplied together
  int64_t rows;      // of outputs of one phase that are summed as one line
  int64_t sums_step;
  int64_t steps;        // of the depth, of a run
  T* planes;            // (depth / kDepth, pitch, kDepth): a block's inputs
  float* sums;          // (outputs, phases of W, sums_step)
  float* line;          // of outputs
  Tap* taps;            // by phases
  int64_t* first_taps;  // (phases + 1)

  FewPlan(const ConvTransposeParams& p, int64_t threads, void* memory)
      : Scratch(memory),
        layout(p),
        axes{{p, 0}, {p, 1}, {p, 2}},
        depth(padded_depth<T>(layout.inputs)),
        blocks(p, kMostOutputs) {
    const auto pixels = [&] {
      const Block block = blocks.largest();
      return axes[0].inputs(block.count[1]) * axes[1].inputs(block.count[2]) * axes[2].inputs(block.count[3]);
    };
    for (int64_t outputs = least(kMostOutputs, blocks.largest().size());
         outputs > 64 && (depth * pixels() * static_cast<int64_t>(sizeof(T)) > kMostInputBytes ||
                          blocks.count() * p.groups < threads);) {
      outputs /= 2;
      blocks = Blocks(p, outputs);
    }
    const Block block = blocks.largest();
    for (int axis = 0; axis < 3; ++axis) {
      size[axis] = axes[axis].inputs(block.count[axis + 1]);
      phases[axis] = least(p.stride[axis], block.count[axis + 1]);
    }
    is_by_fours = p.kernel[2] == 4 && p.dilation[2] == 1 && p.padding[2] % 2 == 1 && p.stride[2] == 2 && phases[2] == 2;
    // Rows one after another, with the inputs around them, where that takes fewer vectors than each by itself.
    const int64_t all_rows = axes[1].steps(block.count[2]), columns = axes[2].steps(block.count[3]);
    rows = divide_up((all_rows - 1) * size[2] + columns, kLanes) < all_rows * divide_up(columns, kLanes) ? all_rows : 1;
    if (rows == 1) {
      size[2] = round_up(size[2], kLanes);  // so that a third of the loads lie in one cache line
    }
    // A vector more than there are pixels, for what is written in whole vectors; an odd number of them, since planes a
    // power of 2 apart would share few lines of L1.
    pitch = ((divide_up(size[0] * size[1] * size[2], kLanes) + 1) | 1) * kLanes;
    sums_step = round_up((rows - 1) * size[2] + columns, kLanes) + kLanes;
    int64_t together = 1;  // taps that reach one output
    for (int axis = 0; axis < 3; ++axis) {
      together *= divide_up(p.kernel[axis], p.stride[axis] / std::gcd(p.stride[axis], p.dilation[axis]));
    }
    steps = most<int64_t>(kProducts / together, 8);
    take(planes, (depth / kDepth<T> * pitch + kTileVectors * kLanes) * kDepth<T>);
    take(sums, layout.outputs * phases[2] * sums_step);
    take(line, phases[2] * round_up(columns, kLanes));
    take(taps, layout.taps);
    take(first_taps, phases[0] * phases[1] * phases[2] + 1);
  }

  // Lists the taps of each phase; of those that are multiplied by fours, the last of each four.
  void find_taps(const ConvTransposeParams& p) {
    const int64_t last = phases[0] * phases[1] * phases[2];
    std::fill_n(first_taps, last + 1, 0);
    const auto for_each = [&](auto use) {
      for (int64_t i = is_by_fours ? 3 : 0; i < layout.taps; i += is_by_fours ? 4 : 1) {
        const int64_t tap[3] = {i / p.kernel[2] / p.kernel[1], i / p.kernel[2] % p.kernel[1], i % p.kernel[2]};
        int64_t phase = 0, input = 0;
        bool is_met = true;  // by an output of the block
        for (int axis = 0; axis < 3; ++axis) {
          const FewAxis& at = axes[axis];
          const int64_t shift = at.shift(tap[axis]), its_phase = at.phase(tap[axis], shift);
          is_met = is_met && its_phase < phases[axis];
          phase = phase * phases[axis] + its_phase;
          input = input * size[axis] + shift - at.first_shift;
        }
        if (is_met) {
          const int64_t row = i / p.kernel[2];
          use(phase, Tap{input * kDepth<T>, (row * depth * p.kernel[2] + tap[2] * kDepth<T>)*layout.outputs});
        }
      }
    };
    for_each([&](int64_t phase, Tap) { ++first_taps[phase + 1]; });
    std::partial_sum(first_taps, first_taps + last + 1, first_taps);
    for_each([&](int64_t phase, Tap tap) { taps[first_taps[phase]++] = tap; });
    std::copy_backward(first_taps, first_taps + last, first_taps + last + 1);
    first_taps[0] = 0;
  }
};

}  // namespace gpt4fast::cpu::GPT4FAST_LEVEL
