#pragma once

// What the CPU's operators of transposed convolution have in common: the choice of a kernel, and packed weights.

#include <cstdint>
#include <optional>
#include <vector>

#include <torch/csrc/stable/tensor.h>

#include "../conv_transpose_arguments.h"

namespace gpt4fast::cpu {

// The kernel is chosen by the weight and is_winograd alone, so that a packed one serves inputs of any size.
const ConvTransposeKernel& kernel_for(const ConvTransposeParams& p);

// The weight in the kernel's order, and behind it what it was made from.
torch::stable::Tensor pack_weight(const torch::stable::Tensor& weight, const ConvTransposeParams& p);

// Whether it is what pack_weight would give.
bool is_packed_from(const torch::stable::Tensor& packed, const ConvTransposeParams& p);

// Computes p.out.
void run_kernel(const ConvTransposeParams& p, const torch::stable::Tensor& packed, double multiplications);

}  // namespace gpt4fast::cpu
