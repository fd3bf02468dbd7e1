#pragma once

#include <cstdint>

#include "activation.h"
#include "element_type.h"

namespace gpt4fast {

// out = activation(scale * conv_transpose(input, weight) + offset). One and two dimensions are lifted to three by
// leading dimensions of size 1. N batch, C and Cout channels, G groups. Strides are in elements, in the order of the
// shape.
// With is_adjoint it is the convolution whose transpose that is, which gives the gradient of the input: then input
// stands for the gradient of the output, out for that of the input, and the channels and sizes likewise.
struct ConvTransposeParams {
  const void* input;    // (N, C, D, H, W)
  const void* weight;   // (C, Cout / G, kernel D, H, W); adjoint: (Cout, C / G, kernel D, H, W)
  const float* scale;   // (Cout + kMostLanes), contiguous; what follows the channels is read, and means nothing
  const float* offset;  // likewise
  void* out;            // (N, Cout, out D, H, W), contiguous, or channels last

  int64_t batch, in_channels, out_channels, groups;
  int64_t in_size[3], kernel[3], out_size[3];   // D, H, W
  int64_t stride[3], padding[3], dilation[3];   // D, H, W
  int64_t input_strides[5], weight_strides[5];  // those of weight: C, Cout and the kernel

  ElementType dtype;  // of input, weight and out
  bool is_adjoint;
  bool is_winograd;  // by fewer multiplications: see conv_transpose_winograd_kernel.cpp
  bool channels_last;
  Activation activation;
  float negative_slope;  // of leaky_relu

  static constexpr int64_t kMostLanes = 64;
  static constexpr int64_t kMostWinogradTaps = 64;
};

// The kernels of one CPU level. A packed weight depends on the weight alone, and serves inputs of any size.
struct ConvTransposeKernel {
  int64_t (*packed_bytes)(const ConvTransposeParams& params);

  // Thread number `thread` of `threads` writes its share.
  void (*pack)(const ConvTransposeParams& params, void* packed, int64_t thread, int64_t threads);

  // Bytes of scratch memory for each of so many threads.
  int64_t (*workspace)(const ConvTransposeParams& params, int64_t threads);

  // The result does not depend on threads.
  void (*run)(const ConvTransposeParams& params, const void* packed, void* workspace, int64_t thread, int64_t threads);
};

// The gradient of the weight, (C, Cout / G, kernel D, H, W), contiguous, of dtype.
struct ConvTransposeWeightGradientKernel {
  int64_t (*workspace)(const ConvTransposeParams& params);

  // params.input is the input, grad_out the gradient of the output of params.dtype with these strides.
  void (*run)(const ConvTransposeParams& params, const void* grad_out, const int64_t* grad_out_strides,
              void* grad_weight, void* workspace, int64_t thread, int64_t threads);
};

}  // namespace gpt4fast
