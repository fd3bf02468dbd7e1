#pragma once

// The arguments of the operators of transposed convolution, checked and turned into parameters, on any device.

#include <algorithm>
#include <array>
#include <cstdint>
#include <vector>

#include <torch/csrc/stable/tensor.h>

#include "common/empty.h"
#include "common/tensors.h"
#include "conv_transpose.h"

namespace gpt4fast {

struct ConvTransposeGeometry {
  const std::vector<int64_t>& stride;
  const std::vector<int64_t>& padding;
  const std::vector<int64_t>& output_padding;
  const std::vector<int64_t>& dilation;
};

// Sizes up to this keep every index computed here, sums of products of two of them, below 2^63.
inline constexpr int64_t kLargest = int64_t{1} << 30;
inline constexpr int64_t kMostElements = int64_t{1} << 48;

inline void read_list(const std::vector<int64_t>& values, const char* name, int64_t dims, int64_t least,
                      int64_t (&target)[3]) {
  STD_TORCH_CHECK(static_cast<int64_t>(values.size()) == dims, "expected ", name,
                  " to have one number for each of the ", dims, " spatial dimensions, but it has ", values.size());
  for (int64_t i = 0; i < dims; ++i) {
    STD_TORCH_CHECK(least <= values[i] && values[i] <= kLargest, "expected ", name, " to be from ", least,
                    " to 2^30, but it is ", values[i]);
    target[3 - dims + i] = values[i];
  }
}

// Sizes of 1, or twice a stride. Not of 2: where there is no stride, torch's own sums are so exact (a product, then
// four terms) that Winograd's err 2.0 to 2.6 times as much; with one, 0.5 to 1.7.
inline bool has_winograd_kernel(const ConvTransposeParams& p) {
  const int64_t taps = p.kernel[0] * p.kernel[1] * p.kernel[2];
  return 1 < taps && taps <= ConvTransposeParams::kMostWinogradTaps &&
         std::all_of(p.kernel, p.kernel + 3, [](int64_t size) { return size == 1 || (size > 2 && size % 2 == 0); });
}

// Strides of (N, C, *spatial), spatial dimensions that are absent before those that are there.
inline void copy_image_strides(const torch::stable::Tensor& tensor, int64_t (&strides)[5]) {
  const int64_t dims = tensor.dim() - 2;
  std::fill_n(strides, 5, 0);
  strides[0] = tensor.stride(0);
  strides[1] = tensor.stride(1);
  for (int64_t i = 0; i < dims; ++i) {
    strides[5 - dims + i] = tensor.stride(2 + i);
  }
}

inline std::vector<int64_t> sizes_of(const torch::stable::Tensor& tensor) {
  std::vector<int64_t> sizes;
  for (int64_t axis = 0; axis < tensor.dim(); ++axis) {
    sizes.push_back(tensor.size(axis));
  }
  return sizes;
}

// Those of the weight alone. Throws std::runtime_error, like what follows, where an argument would make a kernel leave
// its memory. winograd asks for cpu/conv_transpose_winograd_kernel.cpp, which serves kernels of twice the stride.
inline void set_weight(const torch::stable::Tensor& weight, int64_t groups, bool winograd, ConvTransposeParams& p) {
  STD_TORCH_CHECK(3 <= weight.dim() && weight.dim() <= 5,
                  "expected weight to have 3 to 5 dimensions, but its shape is ", shape_of(weight));
  STD_TORCH_CHECK(groups >= 1 && weight.size(0) % groups == 0,
                  "expected groups to be positive and to divide the channels of input, but it is ", groups,
                  " and the shape of weight is ", shape_of(weight));
  STD_TORCH_CHECK(weight.numel() < kMostElements && weight.size(1) < kLargest && groups < kLargest,
                  "expected weight to have fewer than 2^48 elements, but its shape is ", shape_of(weight));
  p.in_channels = weight.size(0);
  p.groups = groups;
  p.out_channels = weight.size(1) * groups;
  const int64_t dims = weight.dim() - 2;
  std::fill_n(p.kernel, 3, 1);
  for (int64_t i = 0; i < dims; ++i) {
    p.kernel[3 - dims + i] = weight.size(2 + i);
    STD_TORCH_CHECK(1 <= weight.size(2 + i) && weight.size(2 + i) < kLargest,
                    "expected the spatial sizes of weight to be from 1 to 2^30, but its shape is ", shape_of(weight));
  }
  STD_TORCH_CHECK(double(p.kernel[0]) * double(p.kernel[1]) * double(p.kernel[2]) < double(kMostElements),
                  "expected the spatial sizes of weight to multiply to less than 2^48, but its shape is ",
                  shape_of(weight));
  copy_image_strides(weight, p.weight_strides);
  p.weight = weight.const_data_ptr();
  p.is_winograd = winograd;
  STD_TORCH_CHECK(!winograd || has_winograd_kernel(p),
                  "expected winograd to be False for a kernel of this shape: ", shape_of(weight));
  p.dtype = element_type_of(weight, "weight");
  STD_TORCH_CHECK(p.dtype != ElementType::int8, "expected weight to be float32, bfloat16 or float16, but it is int8");
}

// All but the output. Returns its shape.
inline std::vector<int64_t> set_input(const torch::stable::Tensor& input, const torch::stable::Tensor& weight,
                                      int64_t groups, const ConvTransposeGeometry& geometry, bool winograd,
                                      ConvTransposeParams& p) {
  STD_TORCH_CHECK(3 <= input.dim() && input.dim() <= 5, "expected input to have 3 to 5 dimensions, but its shape is ",
                  shape_of(input));
  p.dtype = element_type_of(input, "input");
  CHECK_DIM(weight, input.dim());
  CHECK_DTYPE(weight, input.scalar_type());
  CHECK_SIZE(weight, 0, input.size(1));
  set_weight(weight, groups, winograd, p);
  const int64_t dims = input.dim() - 2;

  for (auto* sizes : {&p.in_size, &p.out_size, &p.stride, &p.dilation}) {
    std::fill_n(*sizes, 3, 1);
  }
  int64_t extra[3] = {};
  read_list(geometry.stride, "stride", dims, 1, p.stride);
  read_list(geometry.padding, "padding", dims, 0, p.padding);
  read_list(geometry.output_padding, "output_padding", dims, 0, extra);
  read_list(geometry.dilation, "dilation", dims, 1, p.dilation);
  STD_TORCH_CHECK(input.numel() < kMostElements, "expected input to have fewer than 2^48 elements, but its shape is ",
                  shape_of(input));
  p.batch = input.size(0);
  std::vector<int64_t> out_shape{p.batch, p.out_channels};
  for (int64_t i = 0; i < dims; ++i) {
    const int64_t axis = 3 - dims + i;
    p.in_size[axis] = input.size(2 + i);
    STD_TORCH_CHECK(1 <= p.in_size[axis] && p.in_size[axis] < kLargest,
                    "expected the spatial sizes of input to be from 1 to 2^30, but its shape is ", shape_of(input));
    p.out_size[axis] = (p.in_size[axis] - 1) * p.stride[axis] - 2 * p.padding[axis] +
                       p.dilation[axis] * (p.kernel[axis] - 1) + extra[axis] + 1;
    STD_TORCH_CHECK(p.out_size[axis] >= 1, "expected padding to leave at least one output, but it is ",
                    geometry.padding[i], " and the size of the output would be ", p.out_size[axis]);
    out_shape.push_back(p.out_size[axis]);
    STD_TORCH_CHECK(!winograd || (p.kernel[axis] == 1 ? p.stride[axis] == 1
                                                      : p.kernel[axis] == 2 * p.stride[axis] && p.dilation[axis] == 1),
                    "expected winograd to be False for a kernel of ", p.kernel[axis], " with stride ", p.stride[axis],
                    " and dilation ", p.dilation[axis]);
  }
  // A tensor without channels has no elements, however large these.
  STD_TORCH_CHECK(double(p.in_size[0]) * double(p.in_size[1]) * double(p.in_size[2]) < double(kMostElements),
                  "expected the spatial sizes of input to multiply to less than 2^48, but its shape is ",
                  shape_of(input));
  copy_image_strides(input, p.input_strides);
  p.input = input.const_data_ptr();
  return out_shape;
}

// Uninitialised, channels last or first.
template <size_t kDims>
torch::stable::Tensor empty_images(const std::vector<int64_t>& shape, const torch::stable::Tensor& like,
                                   bool channels_last) {
  std::array<int64_t, kDims> sizes;
  std::array<size_t, kDims> order;
  for (size_t i = 0; i < kDims; ++i) {
    sizes[i] = shape[i];
    order[i] = i == 0 || !channels_last ? i : i == kDims - 1 ? 1 : i + 1;
  }
  return empty_beside(like, sizes, like.scalar_type(), order);
}

inline torch::stable::Tensor empty_images(const std::vector<int64_t>& shape, const torch::stable::Tensor& like,
                                          bool channels_last) {
  STD_TORCH_CHECK(!channels_last || shape.size() > 3, "expected channels_last to be False for 1 spatial dimension");
  switch (shape.size()) {
    case 3: return empty_images<3>(shape, like, channels_last);
    case 4: return empty_images<4>(shape, like, channels_last);
    default: return empty_images<5>(shape, like, channels_last);
  }
}

}  // namespace gpt4fast
