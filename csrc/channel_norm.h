#pragma once

#include <cstdint>

#include "activation.h"
#include "element_type.h"

namespace gpt4fast {

// out = activation(weight * (input - mean) * rstd + bias), with the statistics of each pixel over its channels. Sizes:
// N batch, C channels, P pixels.
struct ChannelNormParams {
  const void* input;    // (N, C, P), contiguous, or channels last: (N, P, C)
  const float* weight;  // (C)
  const float* bias;    // (C)
  void* out;            // as input

  int64_t batch, channels, pixels;
  bool channels_last;
  ElementType dtype;  // of input and out
  float eps;
  Activation activation;
  float negative_slope;  // of leaky_relu
};

// Thread number `thread` of `threads` computes its share of the pixels. The result does not depend on threads.
using ChannelNormKernel = void(const ChannelNormParams& params, int64_t thread, int64_t threads);

}  // namespace gpt4fast
