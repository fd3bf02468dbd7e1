// Gradient of the weight of a transposed convolution: for each tap the product (input channels, pairs) @ (pairs, output
// channels) over all pairs of an input and an output that the tap connects. Blocks of inputs are copied, channels
// first, and the outputs that they reach, channels last; then a tile of the gradient stays in registers while its pairs
// run. Where the processor multiplies two bfloat16 at once, two pairs are one step: all inputs of the block run, and
// those that a tap takes outside meet zeros. Compiled once per CPU level.
#include "../conv_transpose.h"

#include <algorithm>
#include <utility>

#include "conv_transpose_blocks.h"
#include "conv_transpose_write.h"
#include "pack_row.h"
#include "scratch.h"
#include "with_element_type.h"

namespace gpt4fast::cpu::GPT4FAST_LEVEL {
namespace {

constexpr int64_t kMostInputs = 512;       // pixels of a block
constexpr int64_t kPairs = 128;            // steps whose outputs stay in L1, 32 KiB
constexpr int64_t kMostBytes = 512 << 10;  // of a block's outputs, for the channels of one tile
constexpr int64_t kMostSums = 6 << 20;     // bytes of sums and inputs

// A pair: the pixel's place among a block's inputs, and among the outputs.
struct Pair {
  int64_t input, output;
};

template <int kRows, int kVectors>
[[gnu::always_inline]] inline void add_pairs_tile(const float* input, int64_t input_row, const float* outputs,
                                                  const Pair* pairs, int64_t count, float* sums) {
  Vector tile[kRows][kVectors];
#pragma GCC unroll 8
  for (int row = 0; row < kRows; ++row) {
#pragma GCC unroll 8
    for (int v = 0; v < kVectors; ++v) {
      tile[row][v] = Vector{};
    }
  }
  for (int64_t i = 0; i < count; ++i) {
    const float* left = input + pairs[i].input;
    const float* from = outputs + pairs[i].output;
    Vector right[kVectors];
#pragma GCC unroll 8
    for (int v = 0; v < kVectors; ++v) {
      right[v] = load(from + v * kLanes);
    }
#pragma GCC unroll 8
    for (int row = 0; row < kRows; ++row) {
      const Vector value = broadcast(left[row * input_row]);
#pragma GCC unroll 8
      for (int v = 0; v < kVectors; ++v) {
        tile[row][v] = multiply_add(value, right[v], tile[row][v]);
      }
    }
  }
#pragma GCC unroll 8
  for (int row = 0; row < kRows; ++row) {
#pragma GCC unroll 8
    for (int v = 0; v < kVectors; ++v) {
      float* to = sums + (row * kVectors + v) * kLanes;
      store(to, load(to) + tile[row][v]);
    }
  }
}

// sums (rows, kVectors * kLanes) += over pairs input[row][pair.input] * outputs[pair.output][...]
template <int kVectors>
void add_pairs(int64_t rows, const float* input, int64_t input_row, const float* outputs, const Pair* pairs,
               int64_t count, float* sums) {
  for (; rows >= kTileRows; rows -= kTileRows, input += kTileRows * input_row, sums += kTileRows * kVectors * kLanes) {
    add_pairs_tile<kTileRows, kVectors>(input, input_row, outputs, pairs, count, sums);
  }
  for (; rows > 0; --rows, input += input_row, sums += kVectors * kLanes) {
    add_pairs_tile<1, kVectors>(input, input_row, outputs, pairs, count, sums);
  }
}

void add_pairs(int64_t vectors, int64_t rows, const float* input, int64_t input_row, const float* outputs,
               const Pair* pairs, int64_t count, float* sums) {
  switch (vectors) {
    case 1: return add_pairs<1>(rows, input, input_row, outputs, pairs, count, sums);
    case 2: return add_pairs<2>(rows, input, input_row, outputs, pairs, count, sums);
    default:
      if constexpr (kTileVectors == 4) {
        if (vectors == 3) {
          add_pairs<3>(rows, input, input_row, outputs, pairs, count, sums);
        } else {
          add_pairs<4>(rows, input, input_row, outputs, pairs, count, sums);
        }
      }
  }
}

// The params of the adjoint: its outputs are the inputs here, so that blocks of them know what they reach.
ConvTransposeParams adjoint_of(const ConvTransposeParams& p) {
  ConvTransposeParams adjoint = p;
  adjoint.is_adjoint = true;
  for (int axis = 0; axis < 3; ++axis) {
    adjoint.in_size[axis] = p.out_size[axis];
    adjoint.out_size[axis] = p.in_size[axis];
  }
  return adjoint;
}

template <typename T>
struct Plan : Scratch {
  ConvTransposeParams adjoint;
  int64_t inputs, outputs, taps;  // channels of a group
  int64_t width, parts;           // channels of a tile, and tiles
  Blocks blocks;                  // of inputs
  bool by_taps;                   // each tap's outputs are copied by themselves, since all would be many more
  int64_t input_row;              // between channels of the copied inputs
  int64_t rows_at_once;           // input channels
  T* input;                       // (rows_at_once, input_row)
  T* output;                      // (pixels, width), then a row of zeros
  T* steps;                       // (kPairs, width, kDepth) where kDepth is 2
  float* sums;                    // (taps, rows_at_once, width)
  Pair* pairs;                    // (pixels of a block of inputs)
  const T** rows;                 // (pixels, rounded up to kDepth): the output that meets each, or zeros

  Plan(const ConvTransposeParams& p, void* memory)
      : Scratch(memory),
        adjoint(adjoint_of(p)),
        inputs(p.in_channels / p.groups),
        outputs(p.out_channels / p.groups),
        taps(p.kernel[0] * p.kernel[1] * p.kernel[2]),
        blocks(adjoint, kMostInputs),
        by_taps(false) {
    const int64_t vectors = divide_up(outputs, kLanes);
    width = divide_up(vectors, divide_up(vectors, kTileVectors)) * kLanes;
    parts = divide_up(outputs, width);
    const auto copied = [&] { return by_taps ? blocks.most_inputs_of_tap() : blocks.most_inputs(); };
    const auto are_many = [&] { return copied() * width * static_cast<int64_t>(sizeof(T)) > kMostBytes; };
    const auto cut = [&] {
      blocks = Blocks(adjoint, kMostInputs);
      for (int64_t pixels = kMostInputs; pixels > 16 && are_many();) {
        pixels /= 2;
        blocks = Blocks(adjoint, pixels);
      }
    };
    cut();
    by_taps = are_many() && blocks.most_inputs() > taps * blocks.most_inputs_of_tap();
    if (by_taps) {
      cut();
    }
    const int64_t pixels = blocks.largest().size();
    input_row = round_up(pixels, kLanes) + kLanes;  // no power of 2: rows would share few lines of L1
    const int64_t row_bytes =
        taps * width * static_cast<int64_t>(sizeof(float)) + input_row * static_cast<int64_t>(sizeof(T));
    rows_at_once = least(most<int64_t>(kMostSums / row_bytes / kTileRows, 1) * kTileRows, inputs);
    take(input, rows_at_once * input_row);
    take(output, (copied() + 1) * width);
    take(steps, kDepth<T> > 1 ? kPairs * width * kDepth<T> : 0);
    take(sums, taps * rows_at_once * width);
    take(pairs, pixels);
    take(rows, kDepth<T> > 1 ? pixels + kDepth<T> : 0);
  }
};

template <typename scalar_t>
class Kernel {
  using T = Compute<scalar_t>;

 public:
  Kernel(const ConvTransposeParams& params, const void* grad_out, const int64_t* grad_out_strides, void* grad_weight,
         void* memory)
      : p(params),
        plan(params, memory),
        grad_out_(static_cast<const scalar_t*>(grad_out)),
        grad_strides_(grad_out_strides),
        grad_weight_(static_cast<scalar_t*>(grad_weight)) {}

  // Threads share the groups and tiles of output channels, and of each the input channels: the sums of one element of
  // the gradient are always made in one order.
  void run(int64_t thread, int64_t threads) {
    const int64_t tiles = divide_up(plan.inputs, kTileRows), tasks = p.groups * plan.parts * tiles;
    const int64_t last = tasks * (thread + 1) / threads;
    for (int64_t task = tasks * thread / threads; task < last;) {
      const int64_t part = task / tiles, tile = task % tiles;
      const int64_t count = least(least(tiles - tile, last - task), divide_up(plan.rows_at_once, kTileRows));
      first_ = tile * kTileRows;
      rows_ = least(count * kTileRows, plan.inputs - first_);
      compute(part / plan.parts, part % plan.parts);
      task += count;
    }
  }

 private:
  void compute(int64_t group, int64_t part) {
    std::memset(plan.sums, 0, static_cast<size_t>(plan.taps * rows_ * plan.width) * sizeof(float));
    for (int64_t index = 0; index < plan.blocks.count(); ++index) {
      inputs_ = plan.blocks[index];
      copy_inputs(group);
      if (!plan.by_taps) {
        outputs_ = inputs_of(plan.adjoint, inputs_);
        copy_outputs(group, part);
      }
      float* sums = plan.sums;
      for (int64_t d = 0; d < p.kernel[0]; ++d) {
        for (int64_t h = 0; h < p.kernel[1]; ++h) {
          for (int64_t w = 0; w < p.kernel[2]; ++w, sums += rows_ * plan.width) {
            if (plan.by_taps) {
              outputs_ = inputs_of(plan.adjoint, inputs_, {d, h, w}, {d, h, w});
              copy_outputs(group, part);
            }
            const auto reached = [&](int axis, int64_t tap) {
              return reached_by(plan.adjoint, inputs_, outputs_, axis, tap);
            };
            add_tap(find_pairs(reached(0, d), reached(1, h), reached(2, w)), sums);
          }
        }
      }
    }
    write(group, part);
  }

  void add_tap(int64_t pairs, float* sums) {
    if constexpr (kDepth<T> == 1) {
      for (int64_t i = 0; i < pairs; i += kPairs) {
        add_pairs(plan.width / kLanes, rows_, plan.input, plan.input_row, plan.output, plan.pairs + i,
                  least(kPairs, pairs - i), sums);
      }
    } else {
      const int64_t pixels = round_up(inputs_.size(), kDepth<T>);
      const T* zeros = plan.output + outputs_.size() * plan.width;
      for (int64_t i = 0; i < pixels; ++i) {
        plan.rows[i] = zeros;
      }
      for (int64_t i = 0; i < pairs; ++i) {
        plan.rows[plan.pairs[i].input] = plan.output + plan.pairs[i].output;
      }
      for (int64_t first = 0; pairs > 0 && first < pixels; first += kPairs * kDepth<T>) {
        const int64_t steps = least(kPairs, (pixels - first) / kDepth<T>);
        T* to = plan.steps;
        for (const T** row = plan.rows + first; row < plan.rows + first + steps * kDepth<T>; row += kDepth<T>) {
          for (int64_t c = 0; c < plan.width; c += kLanes, to += kLanes * kDepth<T>) {
            store_interleaved(to, row[0] + c, row[1] + c);
          }
        }
        multiply<true>(rows_, LeftOperand<T>{plan.input + first, plan.input_row, kDepth<T>},
                       RightOperand<T>{plan.steps, plan.width * kDepth<T>}, steps, plan.width / kLanes, sums,
                       plan.width);
      }
    }
  }

  int64_t find_pairs(const Reached& depths, const Reached& rows, const Reached& columns) {
    Pair* pair = plan.pairs;
    for (int64_t image = 0; image < inputs_.count[0]; ++image) {
      for (int64_t i = 0; i < depths.count; ++i) {
        for (int64_t j = 0; j < rows.count; ++j) {
          const int64_t in =
              ((image * inputs_.count[1] + depths.out + i) * inputs_.count[2] + rows.out + j) * inputs_.count[3] +
              columns.out;
          const int64_t out = ((image * outputs_.count[1] + depths.in + i * depths.in_step) * outputs_.count[2] +
                               rows.in + j * rows.in_step) *
                                  outputs_.count[3] +
                              columns.in;
          for (int64_t k = 0; k < columns.count; ++k) {
            *pair++ = {in + k, (out + k * columns.in_step) * plan.width};
          }
        }
      }
    }
    return pair - plan.pairs;
  }

  void copy_inputs(int64_t group) {
    const int64_t* strides = p.input_strides;
    const auto* data = static_cast<const scalar_t*>(p.input) + (group * plan.inputs + first_) * strides[1];
    for_each_run(inputs_, p.in_size, strides, [&](int64_t offset, int64_t pixel, int64_t count) {
      const scalar_t* source = data + offset;
      if (strides[4] == 1 || strides[1] != 1) {
        for (int64_t c = 0; c < rows_; ++c) {
          pack_row(source + c * strides[1], strides[4], count, count, plan.input + c * plan.input_row + pixel);
        }
        return;
      }
      transpose_into(source, strides[4], count, rows_, plan.input + pixel, plan.input_row);
    });
    for (int64_t i = inputs_.size(); i < round_up(inputs_.size(), kDepth<T>); ++i) {
      for (int64_t c = 0; c < rows_; ++c) {
        plan.input[c * plan.input_row + i] = T{};
      }
    }
  }

  void copy_outputs(int64_t group, int64_t part) {
    const int64_t* strides = grad_strides_;
    const int64_t channels = least(plan.width, plan.outputs - part * plan.width);
    const scalar_t* data = grad_out_ + (group * plan.outputs + part * plan.width) * strides[1];
    for_each_run(outputs_, p.out_size, strides, [&](int64_t offset, int64_t pixel, int64_t count) {
      const scalar_t* source = data + offset;
      T* to = plan.output + pixel * plan.width;
      if (strides[4] == 1 && strides[1] != 1) {
        return transpose_into(source, strides[1], channels, count, to, plan.width);
      }
      for (int64_t i = 0; i < count; ++i) {
        pack_row(source + i * strides[4], strides[1], channels, plan.width, to + i * plan.width);
      }
    });
    std::fill_n(plan.output + outputs_.size() * plan.width, plan.width, T{});
  }

  // target[column][row] = source[row][column]; rows up to the next whole vector are zeros where there is room for them.
  static void transpose_into(const scalar_t* source, int64_t row_stride, int64_t rows, int64_t columns, T* target,
                             int64_t target_row) {
    for (int64_t column = 0; column < columns; column += kLanes) {
      const int64_t count = least(kLanes, columns - column);
      for (int64_t row = 0; row < rows; row += kLanes) {
        Vector square[kLanes];
        for (int64_t i = 0; i < kLanes; ++i) {
          const scalar_t* from = source + (row + i) * row_stride + column;
          square[i] = row + i >= rows ? Vector{} : load_part(from, count);
        }
        transpose(square);
        for (int64_t i = 0; i < count; ++i) {
          store_part(target + (column + i) * target_row + row, square[i], least(kLanes, target_row - row));
        }
      }
    }
  }

  void write(int64_t group, int64_t part) {
    const int64_t channels = least(plan.width, plan.outputs - part * plan.width);
    for (int64_t row = 0; row < rows_; ++row) {
      scalar_t* target =
          grad_weight_ + ((group * plan.inputs + first_ + row) * plan.outputs + part * plan.width) * plan.taps;
      for (int64_t c = 0; c < channels; c += kLanes) {
        for (int64_t tap = 0; tap < plan.taps; tap += kLanes) {
          Vector square[kLanes];
          for (int64_t i = 0; i < kLanes; ++i) {
            square[i] = tap + i < plan.taps ? load(plan.sums + ((tap + i) * rows_ + row) * plan.width + c) : Vector{};
          }
          transpose(square);
          for (int64_t i = 0; i < least(kLanes, channels - c); ++i) {
            store_part(target + (c + i) * plan.taps + tap, square[i], plan.taps - tap);
          }
        }
      }
    }
  }

  const ConvTransposeParams& p;
  Plan<T> plan;
  const scalar_t* grad_out_;
  const int64_t* grad_strides_;
  scalar_t* grad_weight_;
  int64_t first_, rows_;  // input channels of the task
  Block inputs_, outputs_;
};

int64_t workspace(const ConvTransposeParams& p) {
  return with_element_type(p.dtype, [&](auto type) { return Plan<Compute<decltype(type)>>(p, nullptr).bytes; });
}

void run(const ConvTransposeParams& p, const void* grad_out, const int64_t* grad_out_strides, void* grad_weight,
         void* memory, int64_t thread, int64_t threads) {
  with_element_type(p.dtype, [&](auto type) {
    Kernel<decltype(type)>(p, grad_out, grad_out_strides, grad_weight, memory).run(thread, threads);
  });
}

}  // namespace

extern const ConvTransposeWeightGradientKernel conv_transpose_weight_gradient_kernel = {workspace, run};

}  // namespace gpt4fast::cpu::GPT4FAST_LEVEL
