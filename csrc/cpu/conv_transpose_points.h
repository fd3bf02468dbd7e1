#pragma once

// Transposed convolution of images of few pixels: the weight is the big operand, so it is read once, as it lies in
// memory. Each pixel times the weight rows of its channels gives its whole patch of the output; the patches are then
// added up.

#include "../conv_transpose.h"

#include <algorithm>
#include <cstdint>
#include <type_traits>
#include <vector>

#include "conv_transpose_plan.h"
#include "simd/simd.h"

namespace gpt4fast::cpu {

// Sums of kDepth terms are added to the patch, not single terms: their rounding errors grow more slowly.
// Torch's types as the bits that the vector operations take.
inline const float* bits_of(const float* source) {
  return source;
}
inline const BFloat16* bits_of(const torch::headeronly::BFloat16* source) {
  return reinterpret_cast<const BFloat16*>(source);
}
inline const Half* bits_of(const torch::headeronly::Half* source) {
  return reinterpret_cast<const Half*>(source);
}

// patch[row] += sum over k of x[row][k] * weight[k] for kDepth weight rows and kVectors * kLanes columns from column
// on.
template <int kDepth, int kVectors, typename T>
void add_weight_columns(const float* x, int64_t x_step, int64_t rows, const T* const (&weight)[kDepth], int64_t column,
                        int64_t width, float* patch) {
  using namespace simd;
  Vector weights[kDepth][kVectors];
  for (int k = 0; k < kDepth; ++k) {
    for (int v = 0; v < kVectors; ++v) {
      weights[k][v] = load(bits_of(weight[k] + column + v * kLanes));
    }
  }
  for (int64_t row = 0; row < rows; ++row) {
    float* target = patch + row * width + column;
    Vector sum_of[kVectors] = {};
    for (int k = 0; k < kDepth; ++k) {
      const Vector value = broadcast(x[row * x_step + k]);
      for (int v = 0; v < kVectors; ++v) {
        sum_of[v] = multiply_add(value, weights[k][v], sum_of[v]);
      }
    }
    for (int v = 0; v < kVectors; ++v) {
      store(target + v * kLanes, load(target + v * kLanes) + sum_of[v]);
    }
  }
}

// The same for all columns. patch: (rows, width), x: (rows, x_step). width: a multiple of kLanes.
template <int kDepth, typename T>
void add_weight_rows(const float* x, int64_t x_step, int64_t rows, const T* const (&weight)[kDepth], int64_t width,
                     float* patch) {
  int64_t column = 0;
  for (; column + 2 * simd::kLanes <= width; column += 2 * simd::kLanes) {
    add_weight_columns<kDepth, 2>(x, x_step, rows, weight, column, width, patch);
  }
  if (column < width) {
    add_weight_columns<kDepth, 1>(x, x_step, rows, weight, column, width, patch);
  }
}

// Where each useful tap of each pixel goes among the outputs of a channel: (pixels, taps), -1 outside.
struct Patches {
  std::vector<int64_t> taps;
  std::vector<int64_t> targets;

  Patches(const ConvTransposeForwardParams& p, bool keeps_all) {
    const int64_t all = product(p.kernel), pixels = product(p.in_size);
    std::vector<int64_t> every(pixels * all);
    for (int64_t tap = 0; tap < all; ++tap) {
      bool useful = keeps_all;
      for (int64_t pixel = 0; pixel < pixels; ++pixel) {
        int64_t target = 0, in = pixel, at = tap, step = 1;
        for (int axis = 2; axis >= 0; --axis) {
          const int64_t out =
              in % p.in_size[axis] * p.stride[axis] - p.padding[axis] + at % p.kernel[axis] * p.dilation[axis];
          target = target < 0 || out < 0 || out >= p.out_size[axis] ? -1 : target + out * step;
          step *= p.out_size[axis];
          in /= p.in_size[axis];
          at /= p.kernel[axis];
        }
        every[pixel * all + tap] = target;
        useful |= target >= 0;
      }
      if (useful) {
        taps.push_back(tap);
      }
    }
    for (int64_t pixel = 0; pixel < pixels; ++pixel) {
      for (const int64_t tap : taps) {
        targets.push_back(every[pixel * all + tap]);
      }
    }
  }
};

template <typename scalar_t>
void run_points(const ConvTransposeForwardParams& p, const Plan& plan, const float* input, float* memory,
                int64_t threads) {
  // For few rows skipping the taps that fall outside costs more than multiplying them.
  const Patches patches(p, plan.images * product(p.in_size) <= 2);
  const int64_t taps = static_cast<int64_t>(patches.taps.size());
  const int64_t all_taps = product(p.kernel), pixels = product(p.in_size), outputs = product(p.out_size);
  const int64_t group_blocks = plan.blocks / p.groups;
  const int64_t image_blocks = (p.batch + plan.images - 1) / plan.images;
  share(plan.blocks * image_blocks, threads, [&](int64_t task, int64_t thread) {
    const int64_t block = task / image_blocks, image = task % image_blocks * plan.images;
    const int64_t images = std::min(plan.images, p.batch - image);
    const int64_t group = block / group_blocks, first = block % group_blocks * plan.block_outputs;
    const int64_t channels = std::min(plan.block_outputs, plan.group_outputs - first);
    const int64_t width = simd::round_up(channels * taps, simd::kLanes), rows = images * pixels;
    float* patch = memory + thread * plan.thread_floats;
    float* converted = patch + rows * width;
    float* sums = converted + 4 * width;
    std::fill(patch, sums + images * channels * outputs, 0.0f);

    const float* x = input + image * pixels * plan.pixel_step + group * plan.group_inputs;
    const auto* weight =
        static_cast<const scalar_t*>(p.weight) + group * plan.group_inputs * p.weight_strides[0] + first * all_taps;
    const bool in_place = taps == all_taps && width == channels * taps;
    const auto add = [&](int64_t channel, auto depth) {
      constexpr int kDepth = depth();
      const scalar_t* source[kDepth];
      const float* copies[kDepth];
      for (int k = 0; k < kDepth; ++k) {
        source[k] = weight + (channel + k) * p.weight_strides[0];
        copies[k] = converted + k * width;
      }
      if (in_place) {
        return add_weight_rows<kDepth>(x + channel, plan.pixel_step, rows, source, width, patch);
      }
      for (int k = 0; k < kDepth; ++k) {
        for (int64_t c = 0; c < channels; ++c) {
          for (int64_t tap = 0; tap < taps; ++tap) {
            converted[k * width + c * taps + tap] = static_cast<float>(source[k][c * all_taps + patches.taps[tap]]);
          }
        }
      }
      add_weight_rows<kDepth>(x + channel, plan.pixel_step, rows, copies, width, patch);
    };
    int64_t channel = 0;
    for (; channel + 4 <= plan.group_inputs; channel += 4) {
      add(channel, std::integral_constant<int, 4>());
    }
    for (; channel < plan.group_inputs; ++channel) {
      add(channel, std::integral_constant<int, 1>());
    }
    for (int64_t row = 0; row < rows; ++row) {
      const int64_t* targets = patches.targets.data() + row % pixels * taps;
      for (int64_t c = 0; c < channels; ++c) {
        float* sum = sums + (row / pixels * channels + c) * outputs;
        for (int64_t tap = 0; tap < taps; ++tap) {
          if (targets[tap] >= 0) {
            sum[targets[tap]] += patch[row * width + c * taps + tap];
          }
        }
      }
    }
    for (int64_t line = 0; line < images * channels * p.out_size[0] * p.out_size[1]; ++line) {
      const int64_t plane = line / p.out_size[1], map = plane / p.out_size[0];
      write<scalar_t>(p, sums + line * p.out_size[2], 1, image + map / channels,
                      group * plan.group_outputs + first + map % channels,
                      {plane % p.out_size[0], line % p.out_size[1], 0}, p.out_size[2]);
    }
  });
}

}  // namespace gpt4fast::cpu
