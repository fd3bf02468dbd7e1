// Transposed convolution as one implicit matrix product for each output phase: outputs whose position leaves the same
// remainder by the stride meet the same taps of the kernel, so that no multiplication is by a zero between pixels. The
// gradient of its input is a convolution with that stride, one matrix product by the same kernel. Inputs whose channels
// are not neighbours are brought into rows first, and so are weights, unless they are channels last and of half types:
// at every call, for they may have been written to.
#include <numeric>
#include <optional>
#include <string>
#include <tuple>
#include <vector>

#include <torch/csrc/stable/library.h>

#include "affine_activation.h"
#include "common/strings.h"
#include "conv_transpose_arguments.h"
#include "cuda/batch_statistics.h"
#include "cuda/block_sums.cuh"
#include "cuda/conv_transpose_kernel.cuh"
#include "cuda/conv_transpose_layout.cuh"
#include "cuda/conv_transpose_weight_gradient.h"
#include "cuda/launch.h"

namespace gpt4fast {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

void check_sizes(const ConvTransposeLaunch& p) {
  constexpr double kMost = 1 << 30;
  double pixels = double(p.batch), taps = double(std::max(p.in_channels, p.out_channels));
  for (int axis = 0; axis < 3; ++axis) {
    const int64_t reach = p.padding[axis] + p.dilation[axis] * p.kernel[axis];
    STD_TORCH_CHECK(reach < kMost,
                    "expected padding and dilation to reach less than 2^30 elements on a GPU, but it is ", reach);
    pixels *= double(p.out_size[axis]);
    taps *= double(p.kernel[axis]);
  }
  STD_TORCH_CHECK(pixels < kMost && taps < kMost,
                  "expected fewer than 2^30 pixels of the output, and elements of weight for one of its channels, on a "
                  "GPU, but they are ",
                  pixels, " and ", taps);
}

// Of an image (N, G * channels, D, H, W), where the kernels find it: itself where each group's channels are neighbours
// and whole 16 bytes, else a copy for which that holds.
struct ImageRows {
  Tensor tensor;
  const void* data;
  int64_t strides[5];  // of N, none, D, H and W
  int64_t padded;      // channels of a group, zeros behind them
};

ImageRows image_rows(const Device& device, const Tensor& image, int64_t groups, const int64_t (&sizes)[3]) {
  allow_access(image, false);
  const int64_t size = static_cast<int64_t>(image.element_size()), channels = image.size(1) / groups;
  ImageRows rows{image, image.const_data_ptr(), {}, ceil_div(channels * size, 16) * 16 / size};
  copy_image_strides(image, rows.strides);
  bool wide = rows.strides[1] == 1 && rows.padded == channels && reinterpret_cast<uintptr_t>(rows.data) % 16 == 0;
  for (const int axis : {0, 2, 3, 4}) {
    wide = wide && rows.strides[axis] * size % 16 == 0;
  }
  if (wide) {
    return rows;
  }
  const int64_t batch = image.size(0), pixels = sizes[0] * sizes[1] * sizes[2], width = groups * rows.padded;
  rows.tensor = device.fresh(torch::stable::new_empty(image, {batch * pixels * width}));
  const int64_t* strides = rows.strides;
  launch_channel_rows(device, {image.const_data_ptr(),
                               rows.tensor.mutable_data_ptr(),
                               size,
                               batch,
                               groups,
                               channels,
                               rows.padded,
                               strides[0],
                               strides[1] * channels,
                               strides[1],
                               {{1}, {sizes[0], strides[2]}, {sizes[1], strides[3]}, {sizes[2], strides[4]}}});
  rows.data = rows.tensor.const_data_ptr();
  const int64_t dense[5] = {pixels * width, 1, sizes[1] * sizes[2] * width, sizes[2] * width, width};
  std::copy_n(dense, 5, rows.strides);
  return rows;
}

void set_input_rows(const ImageRows& rows, ConvTransposeLaunch& p) {
  p.input = rows.data;
  p.padded = rows.padded;
  std::copy_n(rows.strides, 5, p.input_strides);
}

// The weight itself where a group's input channels are neighbours and whole 16 bytes, or its output channels, of half
// types (channels last, of two or three dimensions), else a copy in rows of input channels.
Tensor set_weight_rows(const Device& device, const Tensor& weight, ConvTransposeLaunch& p) {
  allow_access(weight, false);
  const auto size = static_cast<int64_t>(weight.element_size());
  const int64_t outputs = p.out_channels / p.groups, channels = p.in_channels / p.groups;
  int64_t* strides = p.weight_strides;
  p.weight_group_stride = p.is_adjoint ? strides[1] * outputs : strides[0] * channels;
  const auto is_wide = [&](int axis, int64_t neighbours) {  // rows along an axis
    bool wide = strides[axis] == 1 && neighbours * size % 16 == 0 && strides[1 - axis] * size % 16 == 0 &&
                p.weight_group_stride * size % 16 == 0 && reinterpret_cast<uintptr_t>(p.weight) % 16 == 0;
    for (const int other : {2, 3, 4}) {
      wide = wide && strides[other] * size % 16 == 0;
    }
    return wide;
  };
  p.weight_is_direct = size == 2 && is_wide(1, outputs);
  if (p.weight_is_direct || is_wide(0, channels)) {
    return weight;
  }
  const int64_t* kernel = p.kernel;
  const Tensor rows = device.fresh(
      torch::stable::new_empty(weight, {p.groups * kernel[0] * kernel[1] * kernel[2] * outputs * p.padded}));
  launch_channel_rows(
      device, {p.weight,
               rows.mutable_data_ptr(),
               size,
               p.groups,
               1,
               channels,
               p.padded,
               p.weight_group_stride,
               0,
               strides[0],
               {{kernel[0], strides[2]}, {kernel[1], strides[3]}, {kernel[2], strides[4]}, {outputs, strides[1]}}});
  p.weight = rows.const_data_ptr();
  const int64_t row = p.padded,
                dense[5] = {1, row, kernel[1] * kernel[2] * outputs * row, kernel[2] * outputs * row, outputs * row};
  std::copy_n(dense, 5, strides);
  p.weight_group_stride = kernel[0] * dense[2];
  return rows;
}

// The stride has no meaning where the input is one pixel. With one over the kernel's reach each phase has a single tap,
// and no output is summed over taps that do not meet it.
void widen_stride_of_one_pixel(ConvTransposeLaunch& p) {
  for (int axis = 0; axis < 3; ++axis) {
    if (p.in_size[axis] == 1) {
      p.stride[axis] = std::max(p.stride[axis], p.dilation[axis] * (p.kernel[axis] - 1) + 1);
    }
  }
}

// Which taps meet which outputs; the convolution that p describes.
void set_steps(ConvTransposeLaunch& p) {
  for (int axis = 0; axis < 3; ++axis) {
    const int64_t common = std::gcd(p.stride[axis], p.dilation[axis]);
    p.source_stride[axis] = 1;
    p.tap_steps[axis] = p.stride[axis] / common;
    p.shift_steps[axis] = p.dilation[axis] / common;
  }
}

struct ConvTransposeArguments {
  const Tensor &input, &weight;
  const std::optional<Tensor>& bias;
  ConvTransposeGeometry geometry;
  int64_t groups;
  bool channels_last, tf32;
};

// p has the epilogue's activation.
Tensor convolve(const ConvTransposeArguments& a, const std::optional<Tensor>& scale, const std::optional<Tensor>& shift,
                ConvTransposeLaunch& p, const Device& device, Tensor* parts) {
  STD_TORCH_CHECK(a.weight.device() == a.input.device(), "expected weight to be on the device of input");
  const std::vector<int64_t> shape = set_input(a.input, a.weight, a.groups, a.geometry, false, p);
  const Tensor out = device.fresh(empty_images(shape, a.input, a.channels_last));
  copy_image_strides(out, p.out_strides);
  p.out = out.mutable_data_ptr();
  p.channels_last = a.channels_last;
  Tensor storage[3];
  p.bias = channel_parameter(a.bias, "bias", out, storage[0]);
  p.factor = channel_parameter(scale, "scale", out, storage[1]);
  p.shift = channel_parameter(shift, "shift", out, storage[2]);
  for (const float* values : {p.bias, p.factor, p.shift}) {
    allow_access(values, p.out_channels * sizeof(float), false);
  }
  STD_TORCH_CHECK(!parts || out.numel() > 0, "expected an input that is not empty, but its shape is ",
                  shape_of(a.input));
  if (out.numel() == 0) {
    return out;
  }
  check_sizes(p);
  const ImageRows input_rows = image_rows(device, a.input, a.groups, p.in_size);
  set_input_rows(input_rows, p);
  const Tensor weight_rows = set_weight_rows(device, a.weight, p);
  widen_stride_of_one_pixel(p);
  set_steps(p);
  launch_conv_transpose(device, p, a.tf32, out, parts);
  return out;
}

Tensor forward(const Tensor& input, const Tensor& weight, const std::optional<Tensor>& bias,
               const std::vector<int64_t>& stride, const std::vector<int64_t>& padding,
               const std::vector<int64_t>& output_padding, int64_t groups, const std::vector<int64_t>& dilation,
               const std::optional<Tensor>& scale, const std::optional<Tensor>& shift, StringHandle activation,
               double negative_slope, bool channels_last, const std::optional<Tensor>& packed, bool winograd,
               bool tf32) {
  ConvTransposeLaunch p{};
  p.activation = parse_activation(take_string(activation));  // first: a failed check must not lose the string
  p.negative_slope = static_cast<float>(negative_slope);
  CHECK_CUDA(input);
  STD_TORCH_CHECK(!packed && !winograd, "expected packed to be None and winograd False on a GPU");
  const Device device(input);
  return convolve({input, weight, bias, {stride, padding, output_padding, dilation}, groups, channels_last, tf32},
                  scale, shift, p, device, nullptr);
}

std::tuple<Tensor, Tensor, Tensor, Tensor> forward_with_statistics(
    const Tensor& input, const Tensor& weight, const std::optional<Tensor>& bias, const std::vector<int64_t>& stride,
    const std::vector<int64_t>& padding, const std::vector<int64_t>& output_padding, int64_t groups,
    const std::vector<int64_t>& dilation, bool channels_last, double eps, bool tf32) {
  ConvTransposeLaunch p{};
  CHECK_CUDA(input);
  const Device device(input);
  Tensor parts;
  const Tensor out =
      convolve({input, weight, bias, {stride, padding, output_padding, dilation}, groups, channels_last, tf32},
               std::nullopt, std::nullopt, p, device, &parts);
  return std::tuple_cat(std::tuple(out), p.parts ? merge_statistics(device, parts, eps) : batch_statistics(out, eps));
}

// The adjoint of the convolution that `forward` describes, applied to grad_out.
Tensor input_gradient(const Device& device, const Tensor& input, const Tensor& weight, const ImageRows& grad_rows,
                      bool channels_last, bool tf32, const ConvTransposeLaunch& forward) {
  ConvTransposeLaunch p = forward;
  p.is_adjoint = true;
  std::swap(p.in_channels, p.out_channels);
  std::swap(p.weight_strides[0], p.weight_strides[1]);
  for (int axis = 0; axis < 3; ++axis) {
    std::swap(p.in_size[axis], p.out_size[axis]);
    p.padding[axis] = -p.padding[axis];
    p.dilation[axis] = -p.dilation[axis];
    p.stride[axis] = 1;
  }
  const Tensor out = device.fresh(empty_images(sizes_of(input), input, channels_last));
  copy_image_strides(out, p.out_strides);
  p.out = out.mutable_data_ptr();
  p.channels_last = channels_last;
  set_input_rows(grad_rows, p);
  const Tensor weight_rows = set_weight_rows(device, weight, p);
  set_steps(p);
  std::copy_n(forward.stride, 3, p.source_stride);
  launch_conv_transpose(device, p, tf32, out, nullptr);
  return out;
}

Tensor weight_gradient(const Device& device, const Tensor& input, const Tensor& weight, const ImageRows& grad_rows,
                       bool tf32, const ConvTransposeLaunch& forward) {
  const ImageRows input_rows = image_rows(device, input, forward.groups, forward.in_size);
  ConvTransposeWeightGradientLaunch p{};
  p.input = input_rows.data;
  p.grad_out = grad_rows.data;
  p.batch = forward.batch;
  p.groups = forward.groups;
  p.channels = forward.in_channels / forward.groups;
  p.outputs = forward.out_channels / forward.groups;
  p.input_padded = input_rows.padded;
  p.grad_padded = grad_rows.padded;
  std::copy_n(input_rows.strides, 5, p.input_strides);
  std::copy_n(grad_rows.strides, 5, p.grad_strides);
  for (int axis = 0; axis < 3; ++axis) {
    p.in_size[axis] = forward.in_size[axis];
    p.out_size[axis] = forward.out_size[axis];
    p.kernel[axis] = forward.kernel[axis];
    p.stride[axis] = forward.stride[axis];
    p.padding[axis] = forward.padding[axis];
    p.dilation[axis] = forward.dilation[axis];
  }
  return conv_transpose_weight_gradient(device, p, weight, tf32);
}

// Gradients of input and weight; one that is not needed is empty.
std::tuple<Tensor, Tensor> backward(const Tensor& grad_out, const Tensor& input, const Tensor& weight,
                                    const std::vector<int64_t>& stride, const std::vector<int64_t>& padding,
                                    const std::vector<int64_t>& output_padding, int64_t groups,
                                    const std::vector<int64_t>& dilation, bool channels_last, bool needs_input_grad,
                                    bool needs_weight_grad, bool /*winograd, a CPU's*/, bool tf32) {
  ConvTransposeLaunch p{};
  CHECK_CUDA(input);
  STD_TORCH_CHECK(weight.device() == input.device(), "expected weight to be on the device of input");
  STD_TORCH_CHECK(grad_out.device() == input.device(), "expected grad_out to be on the device of input");
  const Device device(input);
  const std::vector<int64_t> shape =
      set_input(input, weight, groups, {stride, padding, output_padding, dilation}, false, p);
  CHECK_DIM(grad_out, input.dim());
  CHECK_DTYPE(grad_out, input.scalar_type());
  for (int64_t axis = 0; axis < grad_out.dim(); ++axis) {
    CHECK_SIZE(grad_out, axis, shape[static_cast<size_t>(axis)]);
  }
  const auto empty = [&](const Tensor& like) { return torch::stable::new_empty(like, {0}); };
  if (input.numel() == 0 || weight.numel() == 0) {
    return {needs_input_grad ? torch::stable::empty_like(input) : empty(input),
            needs_weight_grad ? torch::stable::fill_(torch::stable::new_empty(weight, sizes_of(weight)), 0.0)
                              : empty(weight)};
  }
  check_sizes(p);
  double pixels = double(p.batch);
  for (int axis = 0; axis < 3; ++axis) {
    pixels *= double(p.in_size[axis]);
    STD_TORCH_CHECK(
        pixels < double(kLargest) && double(p.in_size[axis]) * double(p.stride[axis]) < double(kLargest),
        "expected fewer than 2^30 pixels of input, and sizes times stride of less, on a GPU, but its shape is ",
        shape_of(input), " and stride ", p.stride[axis]);
  }
  const ImageRows grad_rows = image_rows(device, grad_out, groups, p.out_size);
  return {needs_input_grad ? input_gradient(device, input, weight, grad_rows, channels_last, tf32, p) : empty(input),
          needs_weight_grad ? weight_gradient(device, input, weight, grad_rows, tf32, p) : empty(weight)};
}

}  // namespace
}  // namespace gpt4fast

STABLE_TORCH_LIBRARY_IMPL(gpt4fast, GPT4FAST_CUDA_KEY, m) {
  m.impl("conv_transpose_forward", TORCH_BOX(&gpt4fast::forward));
  m.impl("conv_transpose_with_statistics", TORCH_BOX(&gpt4fast::forward_with_statistics));
  m.impl("conv_transpose_backward", TORCH_BOX(&gpt4fast::backward));
}
