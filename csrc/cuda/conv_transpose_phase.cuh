#pragma once

// What conv_transpose.cu launches its kernel with, and which taps of the weight an output meets.

#include "../conv_transpose.h"
#include "launch.h"

namespace gpt4fast {

// input is (N, D, H, W, G, padded) by input_strides of N, D, H and W in their places: each group's channels are
// neighbours, at a multiple of 16 bytes, zeros behind them. weight is (G, kernel D, H, W, Cout / G, padded) likewise,
// or, where weight_is_direct, (G, C / G, kernel D, H, W, Cout / G), the output's channels neighbours; weight_strides
// are those of C, Cout and the kernel. Sizes fit in 32 bits, which divide far faster. An adjoint is a single phase, of
// stride 1: outputs are source_stride inputs apart, and taps go the other way round, by negative padding and dilation.
struct ConvTransposeLaunch : ConvTransposeParams {
  const float *bias, *factor, *shift;  // (Cout), or null
  float* parts;                        // of the statistics (3, Cout, part_count), or null
  int64_t part_count;
  float* sums;  // (splits, numel), each in the order of out, or null where a block adds up all of an output's products
  int64_t splits, numel;
  int64_t padded, weight_group_stride;
  bool weight_is_direct;
  int64_t out_strides[5];
  int64_t source_stride[3];
  int64_t tap_steps[3];       // taps of one phase are so many apart,
  int64_t shift_steps[3];     // and meet inputs that are so many apart
  int64_t phases[3], pixels;  // of a phase, in all images
  int64_t pixel_tiles, channel_tiles;
};

// Along one dimension: outputs residue + stride * q meet taps first + step * j at inputs q * source_stride + shift - j
// * shift_step.
struct Phase {
  int residue, places, first, taps, shift, source_stride;

  __device__ __forceinline__ Phase(const ConvTransposeLaunch& p, int axis, uint32_t remainder)
      : residue(static_cast<int>(remainder)), source_stride(static_cast<int>(p.source_stride[axis])) {
    const auto stride = static_cast<int>(p.stride[axis]), dilation = static_cast<int>(p.dilation[axis]),
               kernel = static_cast<int>(p.kernel[axis]), step = static_cast<int>(p.tap_steps[axis]);
    const int start = residue + static_cast<int>(p.padding[axis]);
    places = (static_cast<int>(p.out_size[axis]) - residue + stride - 1) / stride;
    first = 0;
    while (first < step && first < kernel && (start - first * dilation) % stride != 0) {
      ++first;
    }
    const bool any = first < step && first < kernel;
    taps = any ? (kernel - first + step - 1) / step : 0;
    shift = any ? (start - first * dilation) / stride : 0;
  }
};

}  // namespace gpt4fast
