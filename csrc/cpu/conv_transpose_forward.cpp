// Transposed convolution on the CPU. Two ways, both without an im2col buffer and with bias, scale, shift and activation
// applied before the one write of each output:
//   by phases (conv_transpose_phases.h), with the weight packed so that the inner loops read it in order;
//   by points (conv_transpose_points.h), for images of few pixels, where packing would cost more than the product.
#include "../conv_transpose.h"

#include <algorithm>
#include <array>
#include <optional>
#include <type_traits>
#include <vector>

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include "../common/activation.h"
#include "../common/checks.h"
#include "../common/dtypes.h"
#include "../common/strings.h"
#include "conv_transpose_phases.h"
#include "conv_transpose_plan.h"
#include "conv_transpose_points.h"

namespace gpt4fast::cpu {
namespace {

constexpr int64_t kPackedPixels = 64;
constexpr int64_t kPackedChannels = 8;  // lines that a cache set surely holds, whatever the strides

// Copies the input to floats with its channels adjacent, (N, D, H, W, pixel_step); channels that pad a group are 0.
template <typename scalar_t>
void copy_input(const ConvTransposeForwardParams& p, const Plan& plan, float* target, int64_t threads) {
  const int64_t width = p.in_size[2];
  const int64_t pieces = (width + kPackedPixels - 1) / kPackedPixels;
  const int64_t padded = plan.method == Method::few_outputs ? plan.depth : plan.group_inputs;
  share(p.batch * p.in_size[0] * p.in_size[1] * pieces, threads, [&](int64_t task, int64_t) {
    const int64_t row = task / pieces, start = task % pieces * kPackedPixels;
    const int64_t count = std::min(kPackedPixels, width - start);
    const auto* source = static_cast<const scalar_t*>(p.input) +
                         row / p.in_size[1] / p.in_size[0] * p.input_strides[0] +
                         row / p.in_size[1] % p.in_size[0] * p.input_strides[2] +
                         row % p.in_size[1] * p.input_strides[3] + start * p.input_strides[4];
    float* to = target + (row * width + start) * plan.pixel_step;
    if (plan.pixel_step != p.in_channels) {
      std::fill(to, to + count * plan.pixel_step, 0.0f);
    }
    for (int64_t group = 0; group < p.groups; ++group) {
      const scalar_t* from = source + group * plan.group_inputs * p.input_strides[1];
      for (int64_t first = 0; first < plan.group_inputs; first += kPackedChannels) {
        const int64_t last = std::min(first + kPackedChannels, plan.group_inputs);
        for (int64_t i = 0; i < count; ++i) {
          for (int64_t c = first; c < last; ++c) {
            to[i * plan.pixel_step + group * padded + c] =
                static_cast<float>(from[c * p.input_strides[1] + i * p.input_strides[4]]);
          }
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
    // All taps of count neighbouring lanes. The lanes are the inner loop: taps lie a power of two apart in the packed
    // weight, too many of them for the ways of a cache set.
    const auto copy = [&](int64_t in, int64_t out, int64_t axis, int64_t count, float* to, int64_t to_step) {
      const auto* source =
          static_cast<const scalar_t*>(p.weight) + in * p.weight_strides[0] + out * p.weight_strides[1];
      for (int64_t d = 0; d < p.kernel[0]; ++d) {
        for (int64_t h = 0; h < p.kernel[1]; ++h) {
          for (int64_t w = 0; w < p.kernel[2]; ++w, to += plan.tap_step) {
            const scalar_t* from = source + d * p.weight_strides[2] + h * p.weight_strides[3] + w * p.weight_strides[4];
            for (int64_t i = 0; i < count; ++i) {
              to[i * to_step] = static_cast<float>(from[i * p.weight_strides[axis]]);
            }
          }
        }
      }
    };
    const bool few = plan.method == Method::few_outputs, depthwise = plan.method == Method::depthwise;
    const int64_t group = depthwise ? 0 : block / group_blocks;
    const int64_t first = (depthwise ? block : block % group_blocks) * plan.block_outputs;
    const int64_t lanes = std::min(plan.block_outputs, (depthwise ? p.out_channels : plan.group_outputs) - first);
    if (lanes < plan.block_outputs || plan.depth != plan.group_inputs) {
      std::fill(target, target + taps * plan.tap_step, 0.0f);
    }
    if (depthwise) {
      return copy(first, 0, 0, lanes, target, 1);
    }
    for (int64_t c = 0; c < plan.group_inputs; ++c) {
      copy(group * plan.group_inputs + c, first, 1, lanes, target + (few ? c : c * kChannelBlock),
           few ? plan.depth : 1);
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
      write<scalar_t>(p, sums + c, Loop::kChannels, image, group * plan.group_outputs + first + c, line.out,
                      line.length);
    }
  });
}

}  // namespace

template <typename scalar_t>
int64_t conv_transpose_forward_workspace(const ConvTransposeForwardParams& p, int64_t threads) {
  const Plan plan = make_plan<scalar_t>(p, threads);
  return plan.input_floats + plan.weight_floats + threads * plan.thread_floats;
}

template <typename scalar_t>
void conv_transpose_forward(const ConvTransposeForwardParams& p, float* workspace, int64_t threads) {
  const Plan plan = make_plan<scalar_t>(p, threads);
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

void read_list(const std::vector<int64_t>& values, const char* name, int64_t dims, int64_t least,
               int64_t (&target)[3]) {
  STD_TORCH_CHECK(static_cast<int64_t>(values.size()) == dims, "expected ", name,
                  " to have one number for each of the ", dims, " spatial dimensions, but it has ", values.size());
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
               const std::optional<Tensor>& scale, const std::optional<Tensor>& shift, StringHandle activation,
               double negative_slope, bool channels_last) {
  ConvTransposeForwardParams p{};
  p.activation = parse_activation(take_string(activation));  // first: a failed check must not lose the string
  CHECK_CPU(input);
  CHECK_CPU(weight);
  STD_TORCH_CHECK(3 <= input.dim() && input.dim() <= 5, "expected input to have 3 to 5 dimensions, but its shape is ",
                  shape_of(input));
  CHECK_DIM(weight, input.dim());
  CHECK_DTYPE(weight, input.scalar_type());
  CHECK_SIZE(weight, 0, input.size(1));
  const int64_t dims = input.dim() - 2;
  STD_TORCH_CHECK(!channels_last || dims > 1, "expected channels_last to be False for 1 spatial dimension");

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
  STD_TORCH_CHECK(
      input.numel() < kMostElements && weight.numel() < kMostElements && weight.size(1) < kLargest && groups < kLargest,
      "expected input and weight to have fewer than 2^48 elements, but their shapes are ", shape_of(input), " and ",
      shape_of(weight));
  p.batch = input.size(0);
  p.in_channels = input.size(1);
  p.groups = groups;
  p.out_channels = weight.size(1) * groups;
  std::vector<int64_t> out_shape{p.batch, p.out_channels};
  for (int64_t i = 0; i < dims; ++i) {
    const int64_t axis = 3 - dims + i;
    p.in_size[axis] = input.size(2 + i);
    p.kernel[axis] = weight.size(2 + i);
    STD_TORCH_CHECK(
        1 <= p.in_size[axis] && p.in_size[axis] < kLargest && 1 <= p.kernel[axis] && p.kernel[axis] < kLargest,
        "expected the spatial sizes of input and weight to be from 1 to 2^30, but their shapes are ", shape_of(input),
        " and ", shape_of(weight));
    p.out_size[axis] = (p.in_size[axis] - 1) * p.stride[axis] - 2 * p.padding[axis] +
                       p.dilation[axis] * (p.kernel[axis] - 1) + extra[axis] + 1;
    STD_TORCH_CHECK(p.out_size[axis] >= 1, "expected padding to leave at least one output, but it is ", padding[i],
                    " and the size of the output would be ", p.out_size[axis]);
    out_shape.push_back(p.out_size[axis]);
  }
  for (const auto* sizes : {&p.in_size, &p.kernel}) {  // a tensor without channels has no elements, however large these
    STD_TORCH_CHECK(
        double((*sizes)[0]) * double((*sizes)[1]) * double((*sizes)[2]) < double(kMostElements),
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
  p.negative_slope = static_cast<float>(negative_slope);

  return DTYPE_SWITCH(input.scalar_type(), "input", scalar_t, [&] {
    const auto format = !channels_last ? MemoryFormat::Contiguous
                        : dims == 2    ? MemoryFormat::ChannelsLast
                                       : MemoryFormat::ChannelsLast3d;
    const Tensor out =
        torch::stable::empty(out_shape, input.scalar_type(), std::nullopt, input.device(), std::nullopt, format);
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
    const double work =
        double(input.numel()) * double(weight.size(1)) * double(product(p.kernel)) + double(out.numel());
    const int64_t threads = std::max<int64_t>(
        1, std::min<int64_t>(torch::stable::get_num_threads(), static_cast<int64_t>(std::min(work / 65536.0, 1e6))));
    const Tensor workspace =
        torch::stable::new_empty(input, {conv_transpose_forward_workspace<scalar_t>(p, threads)}, ScalarType::Float);
    conv_transpose_forward<scalar_t>(p, workspace.mutable_data_ptr<float>(), threads);
    return out;
  });
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(gpt4fast, CPU, m) {
  m.impl("conv_transpose_forward", TORCH_BOX(&forward));
}

}  // namespace gpt4fast::cpu
