#pragma once

// Transposed convolution of images of few pixels: the weight is the big operand, so it is read once, as it lies in memory.
// Each pixel times the weight rows of its channels gives its whole patch of the output; the patches are then added up.

#include <cstdint>

#include "simd/scalar.h"

namespace gpt4fast::cpu {

// patch[row] += sum over k of x[row][k] * weight[k] for kDepth weight rows. patch: (rows, width), x: (rows, x_step).
// width: a multiple of kLanes.
template <int kDepth>
void add_weight_rows(const float* x, int64_t x_step, int64_t rows, const float* const* weight, int64_t width,
                     float* patch) {
  using namespace simd;
  for (int64_t column = 0; column < width; column += kLanes) {
    Vector weights[kDepth];
    for (int k = 0; k < kDepth; ++k) {
      weights[k] = load(weight[k] + column);
    }
    for (int64_t row = 0; row < rows; ++row) {
      float* target = patch + row * width + column;
      Vector sum_of = load(target);
      for (int k = 0; k < kDepth; ++k) {
        sum_of = multiply_add(broadcast(x[row * x_step + k]), weights[k], sum_of);
      }
      store(target, sum_of);
    }
  }
}

}  // namespace gpt4fast::cpu
