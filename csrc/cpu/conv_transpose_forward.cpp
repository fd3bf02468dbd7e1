// Transposed convolution on the CPU. Two ways, both without an im2col buffer and with bias, scale, shift and activation
// applied before the one write of each output:
//   by phases (conv_transpose_phases.h), with the weight packed so that the inner loops read it in order;
//   by points (conv_transpose_points.h), for images of few pixels, where packing would cost more than the product.
#include "../conv_transpose.h"

#include <algorithm>
#include <array>
#include <optional>
#include <string>
#include <vector>

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include "../common/activation.h"
#include "../common/checks.h"
#include "../common/dtypes.h"
#include "conv_transpose_phases.h"
#include "conv_transpose_points.h"

namespace gpt4fast::cpu {
namespace {

using simd::kLanes;
using simd::round_up;
using torch::stable::parallel_for;

constexpr int64_t kPointRows = 16;       // pixels that share one reading of the weight
constexpr int64_t kPointWidth = 256;     // floats of a weight row that a task takes: with kPointRows rows of sums in L1
constexpr int64_t kMostPoints = 32;      // more pixels than this: packing the weight pays
constexpr int64_t kMostPointOutputs = 4096;
constexpr int64_t kLineLength = 128;     // outputs of a task along the last dimension, about
constexpr int64_t kLongestLine = 4096;
constexpr int64_t kPackedPixels = 64;

enum class Method { many_outputs, few_outputs, depthwise, points };

int64_t product(const int64_t (&sizes)[3]) { return sizes[0] * sizes[1] * sizes[2]; }

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
Plan make_plan(const ConvTransposeForwardParams& p) {
  Plan plan{};
  const int64_t pixels = product(p.in_size), taps = product(p.kernel), outputs = product(p.out_size);
  plan.group_inputs = p.in_channels / p.groups;
  plan.group_outputs = p.out_channels / p.groups;
  plan.depth = plan.group_inputs;
  const auto* strides = p.weight_strides;
  const bool plain_weight = strides[4] == 1 && strides[3] == p.kernel[2] && strides[2] == p.kernel[2] * p.kernel[1] &&
                            strides[1] == taps;
  if (plain_weight && plan.group_inputs > 1 && pixels * p.batch <= kMostPoints && pixels <= kPointRows &&
      taps <= 4 * kPointWidth && outputs <= kMostPointOutputs) {
    plan.method = Method::points;
    plan.copies_input = true;
    plan.pixel_step = p.in_channels;
    plan.block_outputs = std::min(plan.group_outputs, std::max<int64_t>(1, kPointWidth / taps));
    plan.blocks = p.groups * ((plan.group_outputs + plan.block_outputs - 1) / plan.block_outputs);
    plan.images = std::min(p.batch, kPointRows / pixels);
    plan.thread_floats = (plan.images * pixels + 4) * round_up(plan.block_outputs * taps) +
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
      plan.depth = round_up(plan.group_inputs);
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
    const int64_t step = p.stride[2] * kPositions;
    plan.line_length = std::min({p.out_size[2], kLongestLine, (kLineLength + step - 1) / step * step});
    plan.thread_floats = plan.line_length * plan.block_outputs;
  }
  plan.input_floats = plan.copies_input ? p.batch * pixels * plan.pixel_step : 0;
  return plan;
}

// Runs task(i, thread) for i in [0, tasks), the same share for each thread.
template <typename Task>
void share(int64_t tasks, int64_t threads, const Task& task) {
  parallel_for(0, threads, 1, [&](int64_t begin, int64_t end) {
    for (int64_t thread = begin; thread < end; ++thread) {
      for (int64_t i = tasks * thread / threads; i < tasks * (thread + 1) / threads; ++i) {
        task(i, thread);
      }
    }
  });
}

// Copies the input to floats with its channels adjacent, (N, D, H, W, pixel_step); channels that pad a group are 0.
template <typename scalar_t>
void copy_input(const ConvTransposeForwardParams& p, const Plan& plan, float* target, int64_t threads) {
  const int64_t width = p.in_size[2];
  const int64_t pieces = (width + kPackedPixels - 1) / kPackedPixels;
  const int64_t padded = plan.method == Method::few_outputs ? plan.depth : plan.group_inputs;
  share(p.batch * p.in_size[0] * p.in_size[1] * pieces, threads, [&](int64_t task, int64_t) {
    const int64_t row = task / pieces, first = task % pieces * kPackedPixels;
    const int64_t count = std::min(kPackedPixels, width - first);
    const auto* source = static_cast<const scalar_t*>(p.input) + row / p.in_size[1] / p.in_size[0] * p.input_strides[0] +
                         row / p.in_size[1] % p.in_size[0] * p.input_strides[2] +
                         row % p.in_size[1] * p.input_strides[3] + first * p.input_strides[4];
    float* to = target + (row * width + first) * plan.pixel_step;
    if (plan.pixel_step != p.in_channels) {
      std::fill(to, to + count * plan.pixel_step, 0.0f);
    }
    for (int64_t group = 0; group < p.groups; ++group) {
      for (int64_t c = 0; c < plan.group_inputs; ++c) {
        const scalar_t* from = source + (group * plan.group_inputs + c) * p.input_strides[1];
        for (int64_t i = 0; i < count; ++i) {
          to[i * plan.pixel_step + group * padded + c] = static_cast<float>(from[i * p.input_strides[4]]);
        }
      }
    }
  });
}

template <typename scalar_t>
void pack_weight(const ConvTransposeForwardParams& p, const Plan& plan, float* packed, int64_t threads) {
  const int64_t taps = product(p.kernel);
  const int64_t group_blocks = plan.blocks / std::min(p.groups, plan.blocks);
  share(plan.blocks, threads, [&](int64_t block, int64_t) {
    float* target = packed + block * taps * plan.tap_step;
    std::fill(target, target + taps * plan.tap_step, 0.0f);
    const auto copy = [&](int64_t in, int64_t out, int64_t at) {
      const auto* source = static_cast<const scalar_t*>(p.weight) + in * p.weight_strides[0] + out * p.weight_strides[1];
      float* to = target + at;
      for (int64_t d = 0; d < p.kernel[0]; ++d) {
        for (int64_t h = 0; h < p.kernel[1]; ++h) {
          for (int64_t w = 0; w < p.kernel[2]; ++w, to += plan.tap_step) {
            *to = static_cast<float>(
                source[d * p.weight_strides[2] + h * p.weight_strides[3] + w * p.weight_strides[4]]);
          }
        }
      }
    };
    if (plan.method == Method::depthwise) {
      for (int64_t c = 0; c < std::min(kChannelBlock, p.out_channels - block * kChannelBlock); ++c) {
        copy(block * kChannelBlock + c, 0, c);
      }
      return;
    }
    const int64_t group = block / group_blocks;
    const int64_t first = block % group_blocks * plan.block_outputs;
    const int64_t outputs = std::min(plan.block_outputs, plan.group_outputs - first);
    for (int64_t c = 0; c < plan.group_inputs; ++c) {
      for (int64_t out = 0; out < outputs; ++out) {
        copy(group * plan.group_inputs + c, first + out,
             plan.method == Method::few_outputs ? out * plan.depth + c : c * kChannelBlock + out);
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

template <typename scalar_t, typename Loop>
void run_phases(const ConvTransposeForwardParams& p, const Plan& plan, const float* input, const float* weight,
                float* memory, int64_t threads) {
  const int64_t pieces = (p.out_size[2] + plan.line_length - 1) / plan.line_length;
  const int64_t group_blocks = plan.blocks / std::min(p.groups, plan.blocks);
  Line common{};
  int64_t image_step;
  if (plan.copies_input) {
    common.x_strides[2] = plan.pixel_step;
    common.x_strides[1] = common.x_strides[2] * p.in_size[2];
    common.x_strides[0] = common.x_strides[1] * p.in_size[1];
    image_step = common.x_strides[0] * p.in_size[0];
  } else {
    std::copy_n(p.input_strides + 2, 3, common.x_strides);
    image_step = p.input_strides[0];
  }
  common.weight_step = plan.tap_step;
  common.depth = plan.depth;
  // The block of output channels changes last: its weight stays in the cache.
  share(plan.blocks * p.batch * p.out_size[0] * p.out_size[1] * pieces, threads, [&](int64_t task, int64_t thread) {
    Line line = common;
    line.out[2] = task % pieces * plan.line_length;
    int64_t rest = task / pieces;
    line.out[1] = rest % p.out_size[1];
    rest /= p.out_size[1];
    line.out[0] = rest % p.out_size[0];
    rest /= p.out_size[0];
    const int64_t image = rest % p.batch;
    const int64_t block = rest / p.batch;
    line.length = std::min(plan.line_length, p.out_size[2] - line.out[2]);
    line.weight = weight + block * product(p.kernel) * plan.tap_step;

    const bool depthwise = plan.method == Method::depthwise;
    const int64_t group = depthwise ? 0 : block / group_blocks;
    const int64_t first = (depthwise ? block : block % group_blocks) * plan.block_outputs;
    const int64_t channels = std::min(plan.block_outputs, (depthwise ? p.out_channels : plan.group_outputs) - first);
    line.x = input + image * image_step + (depthwise ? first : group * plan.depth);
    float* sums = memory + thread * plan.thread_floats;
    compute_line<Loop>(p, line, sums);
    for (int64_t c = 0; c < channels; ++c) {
      write<scalar_t>(p, sums + c, Loop::kChannels, image, group * plan.group_outputs + first + c, line.out, line.length);
    }
  });
}

// Where each useful tap of each pixel goes among the outputs of a channel: (pixels, taps), -1 outside.
struct Patches {
  std::vector<int64_t> taps;
  std::vector<int64_t> targets;

  explicit Patches(const ConvTransposeForwardParams& p) {
    const int64_t all = product(p.kernel), pixels = product(p.in_size);
    std::vector<int64_t> every(pixels * all);
    for (int64_t tap = 0; tap < all; ++tap) {
      bool useful = false;
      for (int64_t pixel = 0; pixel < pixels; ++pixel) {
        int64_t target = 0, in = pixel, at = tap, step = 1;
        for (int axis = 2; axis >= 0; --axis) {
          const int64_t out = in % p.in_size[axis] * p.stride[axis] - p.padding[axis] +
                              at % p.kernel[axis] * p.dilation[axis];
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
  const Patches patches(p);
  const int64_t taps = static_cast<int64_t>(patches.taps.size());
  const int64_t all_taps = product(p.kernel), pixels = product(p.in_size), outputs = product(p.out_size);
  const int64_t group_blocks = plan.blocks / p.groups;
  const int64_t image_blocks = (p.batch + plan.images - 1) / plan.images;
  share(plan.blocks * image_blocks, threads, [&](int64_t task, int64_t thread) {
    const int64_t block = task / image_blocks, image = task % image_blocks * plan.images;
    const int64_t images = std::min(plan.images, p.batch - image);
    const int64_t group = block / group_blocks, first = block % group_blocks * plan.block_outputs;
    const int64_t channels = std::min(plan.block_outputs, plan.group_outputs - first);
    const int64_t width = round_up(channels * taps), rows = images * pixels;
    float* patch = memory + thread * plan.thread_floats;
    float* converted = patch + rows * width;
    float* sums = converted + 4 * width;
    std::fill(patch, sums + images * channels * outputs, 0.0f);

    // A weight row of one input channel as floats: (channels, taps).
    const auto weight_row = [&](int64_t channel, float* row) -> const float* {
      const auto* source = static_cast<const scalar_t*>(p.weight) +
                           (group * plan.group_inputs + channel) * p.weight_strides[0] + first * all_taps;
      if (taps == all_taps) {
        if constexpr (std::is_same_v<scalar_t, float>) {
          if (width == channels * taps) {
            return source;
          }
        }
        int64_t i = 0;
        for (; i + kLanes <= channels * taps; i += kLanes) {
          simd::store(row + i, simd::load(source + i));
        }
        for (; i < channels * taps; ++i) {
          row[i] = static_cast<float>(source[i]);
        }
      } else {
        for (int64_t c = 0; c < channels; ++c) {
          for (int64_t tap = 0; tap < taps; ++tap) {
            row[c * taps + tap] = static_cast<float>(source[c * all_taps + patches.taps[tap]]);
          }
        }
      }
      return row;
    };
    const float* x = input + image * pixels * plan.pixel_step + group * plan.group_inputs;
    int64_t channel = 0;
    for (; channel + 4 <= plan.group_inputs; channel += 4) {
      const float* weights[4];
      for (int64_t k = 0; k < 4; ++k) {
        weights[k] = weight_row(channel + k, converted + k * width);
      }
      add_weight_rows<4>(x + channel, plan.pixel_step, rows, weights, width, patch);
    }
    for (; channel < plan.group_inputs; ++channel) {
      const float* weights[1] = {weight_row(channel, converted)};
      add_weight_rows<1>(x + channel, plan.pixel_step, rows, weights, width, patch);
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

}  // namespace

template <typename scalar_t>
int64_t conv_transpose_forward_workspace(const ConvTransposeForwardParams& p, int64_t threads) {
  const Plan plan = make_plan<scalar_t>(p);
  return plan.input_floats + plan.weight_floats + threads * plan.thread_floats;
}

template <typename scalar_t>
void conv_transpose_forward(const ConvTransposeForwardParams& p, float* workspace, int64_t threads) {
  const Plan plan = make_plan<scalar_t>(p);
  float* weight = workspace + plan.input_floats;
  float* memory = weight + plan.weight_floats;
  const float* input = workspace;
  if (plan.copies_input) {
    copy_input<scalar_t>(p, plan, workspace, threads);
  } else {
    input = static_cast<const float*>(p.input);
  }
  if (plan.method == Method::points) {
    return run_points<scalar_t>(p, plan, input, memory, threads);
  }
  pack_weight<scalar_t>(p, plan, weight, threads);
  if (plan.method == Method::depthwise) {
    return run_phases<scalar_t, Depthwise>(p, plan, input, weight, memory, threads);
  }
  if (plan.method == Method::many_outputs) {
    return run_phases<scalar_t, ManyOutputs>(p, plan, input, weight, memory, threads);
  }
  switch (plan.group_outputs) {
    case 1: return run_phases<scalar_t, FewOutputs<1>>(p, plan, input, weight, memory, threads);
    case 2: return run_phases<scalar_t, FewOutputs<2>>(p, plan, input, weight, memory, threads);
    case 3: return run_phases<scalar_t, FewOutputs<3>>(p, plan, input, weight, memory, threads);
  }
}

namespace {

using torch::headeronly::MemoryFormat;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// Sizes up to this keep every index computed here, sums of products of two of them, below 2^63.
constexpr int64_t kLargest = int64_t{1} << 30;
constexpr int64_t kMostElements = int64_t{1} << 48;

void read_list(const std::vector<int64_t>& values, const char* name, int64_t dims, int64_t least, int64_t (&target)[3]) {
  STD_TORCH_CHECK(static_cast<int64_t>(values.size()) == dims, "expected ", name, " to have one number for each of the ",
                  dims, " spatial dimensions, but it has ", values.size());
  for (int64_t i = 0; i < dims; ++i) {
    STD_TORCH_CHECK(least <= values[i] && values[i] <= kLargest, "expected ", name, " to be from ", least,
                    " to 2^30, but it is ", values[i]);
    target[3 - dims + i] = values[i];
  }
}

void read_channels(const std::optional<Tensor>& values, const char* name, int64_t channels, float otherwise,
                   float* target) {
  if (!values) {
    std::fill_n(target, channels, otherwise);
    return;
  }
  STD_TORCH_CHECK(values->is_cpu(), "expected ", name, " to be on the CPU");
  STD_TORCH_CHECK(values->dim() == 1 && values->size(0) == channels, "expected ", name, " to have shape (", channels,
                  "), but its shape is ", shape_of(*values));
  DTYPE_SWITCH(values->scalar_type(), name, scalar_t, [&] {
    const auto* source = static_cast<const scalar_t*>(values->const_data_ptr());
    for (int64_t c = 0; c < channels; ++c) {
      target[c] = static_cast<float>(source[c * values->stride(0)]);
    }
  });
}

Tensor forward(const Tensor& input, const Tensor& weight, const std::optional<Tensor>& bias,
               const std::vector<int64_t>& stride, const std::vector<int64_t>& padding,
               const std::vector<int64_t>& output_padding, int64_t groups, const std::vector<int64_t>& dilation,
               const std::optional<Tensor>& scale, const std::optional<Tensor>& shift, const std::string& activation,
               double negative_slope, bool channels_last) {
  CHECK_CPU(input);
  CHECK_CPU(weight);
  STD_TORCH_CHECK(3 <= input.dim() && input.dim() <= 5, "expected input to have 3 to 5 dimensions, but its shape is ",
                  shape_of(input));
  CHECK_DIM(weight, input.dim());
  CHECK_DTYPE(weight, input.scalar_type());
  CHECK_SIZE(weight, 0, input.size(1));
  const int64_t dims = input.dim() - 2;
  STD_TORCH_CHECK(!channels_last || dims > 1, "expected channels_last to be False for 1 spatial dimension");

  ConvTransposeForwardParams p{};
  for (auto* sizes : {&p.in_size, &p.kernel, &p.out_size, &p.stride, &p.dilation}) {
    std::fill_n(*sizes, 3, 1);
  }
  int64_t extra[3] = {};
  read_list(stride, "stride", dims, 1, p.stride);
  read_list(padding, "padding", dims, 0, p.padding);
  read_list(output_padding, "output_padding", dims, 0, extra);
  read_list(dilation, "dilation", dims, 1, p.dilation);
  STD_TORCH_CHECK(groups >= 1 && input.size(1) % groups == 0,
                  "expected groups to be positive and to divide the channels of input, but it is ", groups,
                  " and the shape of input is ", shape_of(input));
  STD_TORCH_CHECK(input.numel() < kMostElements && weight.numel() < kMostElements && weight.size(1) < kLargest &&
                      groups < kLargest,
                  "expected input and weight to have fewer than 2^48 elements, but their shapes are ", shape_of(input),
                  " and ", shape_of(weight));
  p.batch = input.size(0);
  p.in_channels = input.size(1);
  p.groups = groups;
  p.out_channels = weight.size(1) * groups;
  std::vector<int64_t> out_shape{p.batch, p.out_channels};
  for (int64_t i = 0; i < dims; ++i) {
    const int64_t axis = 3 - dims + i;
    p.in_size[axis] = input.size(2 + i);
    p.kernel[axis] = weight.size(2 + i);
    STD_TORCH_CHECK(1 <= p.in_size[axis] && p.in_size[axis] < kLargest && 1 <= p.kernel[axis] &&
                        p.kernel[axis] < kLargest,
                    "expected the spatial sizes of input and weight to be from 1 to 2^30, but their shapes are ",
                    shape_of(input), " and ", shape_of(weight));
    p.out_size[axis] = (p.in_size[axis] - 1) * p.stride[axis] - 2 * p.padding[axis] +
                       p.dilation[axis] * (p.kernel[axis] - 1) + extra[axis] + 1;
    STD_TORCH_CHECK(p.out_size[axis] >= 1, "expected padding to leave at least one output, but it is ", padding[i],
                    " and the size of the output would be ", p.out_size[axis]);
    out_shape.push_back(p.out_size[axis]);
  }
  for (const auto* sizes : {&p.in_size, &p.kernel}) {  // a tensor without channels has no elements, however large these
    STD_TORCH_CHECK(double((*sizes)[0]) * double((*sizes)[1]) * double((*sizes)[2]) < double(kMostElements),
                    "expected the spatial sizes of input and weight to multiply to less than 2^48, but their shapes are ",
                    shape_of(input), " and ", shape_of(weight));
  }
  const auto copy_strides = [&](const Tensor& tensor, int64_t (&strides)[5]) {
    strides[0] = tensor.stride(0);
    strides[1] = tensor.stride(1);
    for (int64_t i = 0; i < dims; ++i) {
      strides[5 - dims + i] = tensor.stride(2 + i);
    }
  };
  copy_strides(input, p.input_strides);
  copy_strides(weight, p.weight_strides);
  p.input = input.const_data_ptr();
  p.weight = weight.const_data_ptr();
  p.activation = parse_activation(activation);
  p.negative_slope = static_cast<float>(negative_slope);

  return DTYPE_SWITCH(input.scalar_type(), "input", scalar_t, [&] {
    const auto format = !channels_last ? MemoryFormat::Contiguous
                        : dims == 2    ? MemoryFormat::ChannelsLast
                                       : MemoryFormat::ChannelsLast3d;
    const Tensor out = torch::stable::empty(out_shape, input.scalar_type(), std::nullopt, input.device(), std::nullopt,
                                            format);
    const Tensor channels = torch::stable::new_empty(input, {3, p.out_channels}, ScalarType::Float);
    float* affine = channels.mutable_data_ptr<float>();
    read_channels(bias, "bias", p.out_channels, 0.0f, affine);
    read_channels(scale, "scale", p.out_channels, 1.0f, affine + p.out_channels);
    read_channels(shift, "shift", p.out_channels, 0.0f, affine + 2 * p.out_channels);
    if (out.numel() == 0) {
      return out;
    }
    p.bias = affine;
    p.scale = affine + p.out_channels;
    p.shift = affine + 2 * p.out_channels;
    p.out = out.mutable_data_ptr();
    copy_strides(out, p.out_strides);
    // A thread is worth waking for some ten microseconds of work.
    const double work = double(input.numel()) * double(weight.size(1)) * double(product(p.kernel)) + double(out.numel());
    const int64_t threads = std::max<int64_t>(
        1, std::min<int64_t>(torch::stable::get_num_threads(), static_cast<int64_t>(std::min(work / 65536.0, 1e6))));
    const Tensor workspace = torch::stable::new_empty(
        input, {conv_transpose_forward_workspace<scalar_t>(p, threads)}, ScalarType::Float);
    conv_transpose_forward<scalar_t>(p, workspace.mutable_data_ptr<float>(), threads);
    return out;
  });
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(gpt4fast, CPU, m) { m.impl("conv_transpose_forward", TORCH_BOX(&forward)); }

}  // namespace gpt4fast::cpu
