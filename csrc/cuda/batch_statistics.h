#pragma once

#include <tuple>

#include <torch/csrc/stable/tensor.h>

namespace gpt4fast {

// Mean, 1 / sqrt(variance + eps) and biased variance of each channel of input (N, C, *spatial): (C), float32.
std::tuple<torch::stable::Tensor, torch::stable::Tensor, torch::stable::Tensor> batch_statistics(
    const torch::stable::Tensor& input, double eps);

}  // namespace gpt4fast
