#pragma once

#include <cstdint>

namespace gpt4fast {

enum class Activation;  // common/activation.h

// out = activation(scale * (conv_transpose(input, weight) + bias) + shift). One and two dimensions are lifted to three
// by leading dimensions of size 1. N batch, C and Cout channels, G groups. Strides are in elements, in the order of the
// shape.
struct ConvTransposeForwardParams {
  const void* input;   // (N, C, D, H, W)
  const void* weight;  // (C, Cout / G, kernel D, H, W), of input's dtype
  const float* bias;   // (Cout), contiguous
  const float* scale;  // (Cout), contiguous
  const float* shift;  // (Cout), contiguous
  void* out;           // (N, Cout, out D, H, W), of input's dtype

  int64_t batch, in_channels, out_channels, groups;
  int64_t in_size[3], kernel[3], out_size[3];  // D, H, W
  int64_t stride[3], padding[3], dilation[3];  // D, H, W
  int64_t input_strides[5], weight_strides[5], out_strides[5];

  Activation activation;
  float negative_slope;  // of leaky_relu
};

namespace cpu {

// Floats of scratch memory for all threads together.
template <typename scalar_t>
int64_t conv_transpose_forward_workspace(const ConvTransposeForwardParams& params, int64_t threads);

// The result does not depend on threads.
template <typename scalar_t>
void conv_transpose_forward(const ConvTransposeForwardParams& params, float* workspace, int64_t threads);

}  // namespace cpu
}  // namespace gpt4fast
