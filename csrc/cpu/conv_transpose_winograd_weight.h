#pragma once

// The weights of the products of conv_transpose_winograd_kernel.cpp, made from the taps.

#include <cstdint>
#include <utility>

#include "conv_transpose_weight.h"

namespace gpt4fast::cpu::GPT4FAST_LEVEL {

// A dimension that is not there has one place, one phase and one product.
inline bool is_absent(const ConvTransposeParams& p, int axis) {
  return p.kernel[axis] == 1;
}

inline int64_t products_of(const ConvTransposeParams& p, int axis) {
  return is_absent(p, axis) ? 1 : p.kernel[axis] / 2 * 3;
}

inline WeightLayout<float> winograd_layout(const ConvTransposeParams& p) {
  return WeightLayout<float>(p, products_of(p, 0) * products_of(p, 1) * products_of(p, 2));
}

// Weights of the products from the taps along one axis, for each place along the axes before and after it.
inline void combine_taps(const ConvTransposeParams& p, int axis, int64_t before, int64_t after, const Vector* taps,
                         Vector* products) {
  const int64_t stride = p.kernel[axis] / 2;
  for (int64_t i = 0; i < before; ++i) {
    for (int64_t phase = 0; phase < stride; ++phase) {
      for (int64_t j = 0; j < after; ++j) {
        Vector g1 = taps[(2 * i * stride + phase) * after + j];
        Vector g0 = taps[((2 * i + 1) * stride + phase) * after + j];
        if (p.is_adjoint) {
          std::swap(g0, g1);
        }
        Vector* to = products + 3 * (i * stride + phase) * after + j;
        to[0] = g0 * -1.0f;
        to[after] = g0 + g1;
        to[2 * after] = g1;
      }
    }
  }
}

template <typename scalar_t>
void pack_winograd_block(const ConvTransposeParams& p, const WeightLayout<float>& layout, int64_t group, int64_t block,
                         float* target) {
  constexpr int64_t kMostTaps = ConvTransposeParams::kMostWinogradTaps, kMostProducts = kMostTaps * 27 / 8;
  for_each_weight_vector<scalar_t>(
      p, layout, group, block, [&](int64_t c, int64_t lane, const scalar_t* from, int64_t lanes) {
        Vector memory[2][kMostProducts];
        Vector *present = memory[0], *next = memory[1];
        for (int64_t tap = 0; tap < taps_of(p); tap += kLanes) {
          Vector taps[kLanes];
          const int64_t count = least(kLanes, taps_of(p) - tap);
          read_taps(p, from, tap, count, lanes, taps);
          for (int64_t i = 0; i < count; ++i) {
            present[tap + i] = taps[i];
          }
        }
        int64_t before = 1;
        for (int axis = 0; axis < 3; ++axis) {
          if (!is_absent(p, axis)) {
            const int64_t after = axis == 2 ? 1 : p.kernel[2] * (axis == 1 ? 1 : p.kernel[1]);
            combine_taps(p, axis, before, after, present, next);
            std::swap(present, next);
          }
          before *= products_of(p, axis);
        }
        for (int64_t i = 0; i < layout.matrices; ++i) {
          store(target + (i * layout.depth + c) * layout.width + lane, present[i]);
        }
      });
}

}  // namespace gpt4fast::cpu::GPT4FAST_LEVEL
