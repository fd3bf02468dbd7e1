#pragma once

#include <cstdint>

#include "activation.h"
#include "element_type.h"

namespace gpt4fast {

// out = activation(weight * (input - mean) * rstd + bias), with the statistics of the batch, each channel's own. Sizes:
// N batch, C channels, P pixels. Vectors of channels are contiguous.
struct BatchNormParams {
  const void* input;     // (N, C, P), contiguous
  const float* weight;   // (C)
  const float* bias;     // (C)
  float* mean;           // (C), written by forward, read by backward
  float* rstd;           // (C), likewise: 1 / sqrt(variance + eps)
  float* variance;       // (C), biased, written by forward
  void* out;             // as input, written by forward
  const void* grad_out;  // as input, and the following: backward
  void* grad_input;      // as input
  float* grad_weight;    // (C)
  float* grad_bias;      // (C)

  int64_t batch, channels, pixels;
  ElementType dtype;  // of input, out and their gradients
  double eps;
  Activation activation;
  float negative_slope;  // of leaky_relu
};

// Thread number `thread` of `threads` computes its share of the channels. The result does not depend on threads.
struct BatchNormKernel {
  void (*forward)(const BatchNormParams& params, int64_t thread, int64_t threads);
  void (*backward)(const BatchNormParams& params, int64_t thread, int64_t threads);
};

}  // namespace gpt4fast
