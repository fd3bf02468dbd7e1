#pragma once

// What conv_transpose.cu launches the gradient of the weight with.

#include "launch.h"

namespace gpt4fast {

// Channels C and outputs Cout of one of the G groups. Input and grad_out are (N, D, H, W, G, padded) as the kernel of
// conv_transpose_kernel.cuh takes them, by strides of N, none, D, H and W.
struct ConvTransposeWeightGradientLaunch {
  const void *input, *grad_out;
  int64_t batch, groups, channels, outputs;
  int64_t input_strides[5], grad_strides[5];
  int64_t input_padded, grad_padded;
  int64_t in_size[3], out_size[3], kernel[3], stride[3], padding[3], dilation[3];
  float* parts;  // (part_count, taps, G, C, Cout)
  int64_t part_count, slices_of_part, channel_tiles, output_tiles;
};

// (G * C, Cout, *kernel), contiguous, like the weight.
torch::stable::Tensor conv_transpose_weight_gradient(const Device& device, ConvTransposeWeightGradientLaunch p,
                                                     const torch::stable::Tensor& weight, bool tf32);

}  // namespace gpt4fast
