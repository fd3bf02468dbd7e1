#pragma once

// The weight of a transposed convolution in the order in which the products of placed_product.h read it.

#include <cstdint>

#include "conv_transpose_blocks.h"
#include "pack_row.h"

namespace gpt4fast::cpu::GPT4FAST_LEVEL {

// (groups, blocks, matrices, depth / kDepth, width, kDepth), zeros where it is padded.
template <typename T>
struct WeightLayout {
  int64_t matrices;  // (input channels, output channels): one for each tap, or for each product of Winograd's
  int64_t group_inputs, group_outputs;
  int64_t depth;   // input channels of a group
  int64_t blocks;  // of output channels of a group
  int64_t width;   // output channels of a block

  WeightLayout(const ConvTransposeParams& p, int64_t matrices)
      : matrices(matrices),
        group_inputs(p.in_channels / p.groups),
        group_outputs(p.out_channels / p.groups),
        depth(padded_depth<T>(group_inputs)) {
    // As many equal parts as the registers demand.
    const int64_t vectors = divide_up(group_outputs, kLanes);
    width = divide_up(vectors, divide_up(vectors, kTileVectors)) * kLanes;
    blocks = divide_up(group_outputs, width);
  }

  int64_t block_size() const { return matrices * depth * width; }
  int64_t channels(int64_t block) const { return least(width, group_outputs - block * width); }
};

// Reads `count` taps, from tap `first` on, of one input channel: for each a vector of `lanes` output channels.
template <typename scalar_t>
void read_taps(const ConvTransposeParams& p, const scalar_t* from, int64_t first, int64_t count, int64_t lanes,
               Vector (&taps)[kLanes]) {
  const int64_t (&strides)[5] = p.weight_strides;
  if (taps_of(p) > 1 && strides[4] == 1 && strides[3] == p.kernel[2] && strides[2] == p.kernel[1] * p.kernel[2]) {
    for (int64_t j = 0; j < kLanes; ++j) {
      taps[j] = j < lanes ? load_part(from + j * strides[1] + first, count) : Vector{};
    }
    transpose(taps);
    return;
  }
  for (int64_t j = 0; j < count; ++j) {
    taps[j] = read_vector(from + tap_offset(p, first + j), strides[1], lanes);
  }
}

// Calls use(c, lane, from, lanes) for each input channel and each vector of output channels of a block; from is where
// their first tap lies.
template <typename scalar_t, typename T, typename Use>
void for_each_weight_vector(const ConvTransposeParams& p, const WeightLayout<T>& layout, int64_t group, int64_t block,
                            Use use) {
  const int64_t (&strides)[5] = p.weight_strides;
  const int64_t group_step = p.is_adjoint ? layout.group_outputs * strides[1] : layout.group_inputs * strides[0];
  const auto* source = static_cast<const scalar_t*>(p.weight) + group * group_step + block * layout.width * strides[1];
  for (int64_t c = 0; c < layout.depth; c += kDepth<T>) {
    for (int64_t lane = 0; lane < layout.width; lane += kLanes) {
      use(c, lane, source + c * strides[0] + lane * strides[1],
          most<int64_t>(least(kLanes, layout.channels(block) - lane), 0));
    }
  }
}

// Calls pack_block(group, block, target) for the thread's share of the blocks.
template <typename T, typename PackBlock>
void pack_share(const ConvTransposeParams& p, const WeightLayout<T>& layout, void* packed, int64_t thread,
                int64_t threads, PackBlock pack_block) {
  const int64_t blocks = p.groups * layout.blocks;
  for (int64_t i = blocks * thread / threads; i < blocks * (thread + 1) / threads; ++i) {
    pack_block(i / layout.blocks, i % layout.blocks, static_cast<T*>(packed) + i * layout.block_size());
  }
}

}  // namespace gpt4fast::cpu::GPT4FAST_LEVEL
