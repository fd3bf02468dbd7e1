#pragma once

// What the operators of transposed convolution have in common: their arguments, checked and turned into parameters.

#include <cstdint>
#include <optional>
#include <vector>

#include <torch/csrc/stable/tensor.h>

#include "../conv_transpose.h"

namespace gpt4fast::cpu {

struct ConvTransposeGeometry {
  const std::vector<int64_t>& stride;
  const std::vector<int64_t>& padding;
  const std::vector<int64_t>& output_padding;
  const std::vector<int64_t>& dilation;
};

// Those of the weight alone. Throws std::runtime_error, like what follows, where an argument would make a kernel leave
// its memory. winograd asks for conv_transpose_winograd_kernel.cpp, which serves kernels of twice the stride.
void set_weight(const torch::stable::Tensor& weight, int64_t groups, bool winograd, ConvTransposeParams& p);

// All but the output. Returns its shape.
std::vector<int64_t> set_input(const torch::stable::Tensor& input, const torch::stable::Tensor& weight, int64_t groups,
                               const ConvTransposeGeometry& geometry, bool winograd, ConvTransposeParams& p);

// The kernel is chosen by the weight and is_winograd alone, so that a packed one serves inputs of any size.
const ConvTransposeKernel& kernel_for(const ConvTransposeParams& p);

// The weight in the kernel's order, and behind it what it was made from.
torch::stable::Tensor pack_weight(const torch::stable::Tensor& weight, const ConvTransposeParams& p);

// Whether it is what pack_weight would give.
bool is_packed_from(const torch::stable::Tensor& packed, const ConvTransposeParams& p);

// Computes p.out.
void run_kernel(const ConvTransposeParams& p, const torch::stable::Tensor& packed, double multiplications);

// Strides of (N, C, *spatial), spatial dimensions that are absent before those that are there.
void copy_strides(const torch::stable::Tensor& tensor, int64_t (&strides)[5]);

std::vector<int64_t> sizes_of(const torch::stable::Tensor& tensor);

// Uninitialised, channels last or first.
torch::stable::Tensor empty_images(const std::vector<int64_t>& shape, const torch::stable::Tensor& like,
                                   bool channels_last);

}  // namespace gpt4fast::cpu
