#pragma once

// What a transposed convolution of given shapes runs, how its scratch memory and its tasks are cut, and the write of
// its outputs.

#include "../conv_transpose.h"

#include <algorithm>
#include <cstdint>
#include <type_traits>

#include <torch/csrc/stable/ops.h>

#include "../common/activation.h"
#include "conv_transpose_phases.h"
#include "simd/simd.h"

namespace gpt4fast::cpu {

inline constexpr int64_t kPointRows = 16;      // pixels that share one reading of the weight
inline constexpr int64_t kPatchFloats = 8192;  // of a task's sums: they stay in L1, and weight rows are long runs
inline constexpr int64_t kFewPixels = 4;       // in an image: fewer neighbours than the inner loops of the phases want
inline constexpr int64_t kMostPoints = 32;     // in a batch of larger images: with more, packing the weight pays
inline constexpr int64_t kMostPointOutputs = 4096;
inline constexpr int64_t kLineLength = 128;  // outputs of a task along the last dimension, about
inline constexpr int64_t kLongestLine = 4096;

enum class Method { many_outputs, few_outputs, depthwise, points };

inline int64_t product(const int64_t (&sizes)[3]) {
  return sizes[0] * sizes[1] * sizes[2];
}

// What runs for the given shapes, and where its scratch memory lies.
struct Plan {
  Method method;
  bool copies_input;
  int64_t depth;       // input channels of a group as the inner loop sees them
  int64_t pixel_step;  // floats between neighbouring pixels of the copied input
  int64_t group_inputs, group_outputs;
  int64_t blocks;         // tasks along the output channels
  int64_t block_outputs;  // output channels of a block
  int64_t tap_step;       // floats of one tap of a block's packed weight
  int64_t line_length;
  int64_t images;  // of a task, by points
  int64_t input_floats, weight_floats, thread_floats;
};

template <typename scalar_t>
Plan make_plan(const ConvTransposeForwardParams& p, int64_t threads) {
  Plan plan{};
  const int64_t pixels = product(p.in_size), taps = product(p.kernel), outputs = product(p.out_size);
  plan.group_inputs = p.in_channels / p.groups;
  plan.group_outputs = p.out_channels / p.groups;
  plan.depth = plan.group_inputs;
  bool plain_weight = true;  // the taps of all output channels of one input channel lie in a row
  int64_t step = 1;
  for (int axis = 2; axis >= 0; --axis) {
    plain_weight &= p.kernel[axis] == 1 || p.weight_strides[2 + axis] == step;
    step *= p.kernel[axis];
  }
  plain_weight &= plan.group_outputs == 1 || p.weight_strides[1] == step;
  if (plain_weight && plan.group_inputs > 1 && (pixels <= kFewPixels || pixels * p.batch <= kMostPoints) &&
      pixels <= kPointRows && taps <= kPatchFloats / kPointRows && outputs <= kMostPointOutputs) {
    plan.method = Method::points;
    plan.copies_input = true;
    plan.pixel_step = p.in_channels;
    plan.images = std::min(p.batch, kPointRows / pixels);
    const int64_t share = (plan.group_outputs + threads - 1) / threads;
    plan.block_outputs = std::clamp<int64_t>(kPatchFloats / (plan.images * pixels * taps), 1, share);
    plan.blocks = p.groups * ((plan.group_outputs + plan.block_outputs - 1) / plan.block_outputs);
    plan.thread_floats = (plan.images * pixels + 4) * simd::round_up(plan.block_outputs * taps, simd::kLanes) +
                         plan.images * plan.block_outputs * outputs;
  } else {
    if (plan.group_inputs == 1 && plan.group_outputs == 1) {
      plan.method = Method::depthwise;
      plan.block_outputs = kChannelBlock;
      plan.blocks = (p.out_channels + kChannelBlock - 1) / kChannelBlock;
      plan.pixel_step = plan.blocks * kChannelBlock;
      plan.tap_step = kChannelBlock;
    } else if (plan.group_outputs <= 3) {
      plan.method = Method::few_outputs;
      plan.depth = simd::round_up(plan.group_inputs, simd::kLanes);
      plan.block_outputs = plan.group_outputs;
      plan.blocks = p.groups;
      plan.pixel_step = p.groups * plan.depth;
      plan.tap_step = plan.depth * plan.group_outputs;
    } else {
      plan.method = Method::many_outputs;
      plan.block_outputs = kChannelBlock;
      plan.blocks = p.groups * ((plan.group_outputs + kChannelBlock - 1) / kChannelBlock);
      plan.pixel_step = p.in_channels;
      plan.tap_step = plan.depth * kChannelBlock;
    }
    const bool channels_adjacent = std::is_same_v<scalar_t, float> && (p.input_strides[1] == 1 || p.in_channels == 1);
    plan.copies_input = !channels_adjacent || plan.pixel_step != p.in_channels;
    plan.weight_floats = plan.blocks * taps * plan.tap_step;
    const int64_t full = p.stride[2] * kPositions;
    plan.line_length = std::min({p.out_size[2], kLongestLine, (kLineLength + full - 1) / full * full});
    plan.thread_floats = plan.line_length * plan.block_outputs;
  }
  plan.input_floats = plan.copies_input ? p.batch * pixels * plan.pixel_step : 0;
  return plan;
}

// Runs task(i, thread) for i in [0, tasks), the same share for each thread.
template <typename Task>
void share(int64_t tasks, int64_t threads, const Task& task) {
  torch::stable::parallel_for(0, threads, 1, [&](int64_t begin, int64_t end) {
    for (int64_t thread = begin; thread < end; ++thread) {
      for (int64_t i = tasks * thread / threads; i < tasks * (thread + 1) / threads; ++i) {
        task(i, thread);
      }
    }
  });
}

// Writes count outputs of one channel along W.
template <typename scalar_t>
void write(const ConvTransposeForwardParams& p, const float* sums, int64_t sums_step, int64_t image, int64_t channel,
           const int64_t (&out)[3], int64_t count) {
  auto* target = static_cast<scalar_t*>(p.out) + image * p.out_strides[0] + channel * p.out_strides[1] +
                 out[0] * p.out_strides[2] + out[1] * p.out_strides[3] + out[2] * p.out_strides[4];
  const float bias = p.bias[channel], scale = p.scale[channel], shift = p.shift[channel];
  ACTIVATION_SWITCH(p.activation, kActivation, [&] {
    for (int64_t i = 0; i < count; ++i) {
      const float value = scale * (sums[i * sums_step] + bias) + shift;
      target[i * p.out_strides[4]] = static_cast<scalar_t>(activate<kActivation>(value, p.negative_slope));
    }
  });
}

}  // namespace gpt4fast::cpu
