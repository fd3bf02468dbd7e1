#pragma once

// What the CPU's operators of transposed convolution have in common: the choice of a kernel, and packed weights.

#include <cstdint>
#include <optional>
#include <vector>

#include <torch/csrc/stable/tensor.h>

#include "../conv_transpose_arguments.h"

namespace gpt4fast::cpu {

// The weight in the order of the kernel that p asks for, and behind it which that is and what it was made from. Without
// an input, whose sizes are 0 then, a kernel that serves nearly all of them.
torch::stable::Tensor pack_weight(const torch::stable::Tensor& weight, const ConvTransposeParams& p);

// Whether it is what pack_weight would give.
bool is_packed_from(const torch::stable::Tensor& packed, const ConvTransposeParams& p);

// Computes p.out by the kernel that packed the weight.
void run_kernel(const ConvTransposeParams& p, const torch::stable::Tensor& packed, double multiplications);

}  // namespace gpt4fast::cpu
