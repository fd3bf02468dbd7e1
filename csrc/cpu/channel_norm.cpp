// The operator gpt4fast::channel_norm_activation on a CPU.
#include "../channel_norm.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include "../common/activation.h"
#include "../common/checks.h"
#include "../common/strings.h"
#include "attention_arguments.h"
#include "cpu_level.h"
#include "threads.h"

namespace gpt4fast::cpu {

GPT4FAST_KERNEL_OF_LEVELS(ChannelNormKernel* const, channel_norm_kernel)

namespace {

using torch::stable::Tensor;

// Whether the channels of a pixel are neighbours, and pixels follow one another without gaps.
bool is_channels_last(const Tensor& tensor) {
  int64_t step = tensor.size(1);
  for (int64_t axis = tensor.dim() - 1; axis >= 0; --axis) {
    if (axis == 1) {
      continue;
    }
    if (tensor.size(axis) != 1 && tensor.stride(axis) != step) {
      return false;
    }
    step *= tensor.size(axis);
  }
  return tensor.size(1) == 1 || tensor.stride(1) == 1;
}

Tensor forward(const Tensor& input, const Tensor& weight, const Tensor& bias, double eps, StringHandle activation,
               double negative_slope) {
  ChannelNormParams p{};
  p.activation = parse_activation(take_string(activation));  // first: a failed check must not lose the string
  p.negative_slope = static_cast<float>(negative_slope);
  p.eps = static_cast<float>(eps);
  CHECK_CPU(input);
  STD_TORCH_CHECK(input.dim() >= 2 && input.numel() > 0,
                  "expected input to have at least 2 dimensions, none of them empty, but its shape is ",
                  shape_of(input));
  p.channels_last = !input.is_contiguous();
  STD_TORCH_CHECK(!p.channels_last || is_channels_last(input), "expected input to be contiguous or channels last");
  p.dtype = element_type_of(input, "input");
  STD_TORCH_CHECK(p.dtype != ElementType::int8, "expected input to be float32, bfloat16 or float16, but it is int8");
  p.batch = input.size(0);
  p.channels = input.size(1);
  p.pixels = input.numel() / p.batch / p.channels;
  check_vector(weight, "weight", p.channels);
  check_vector(bias, "bias", p.channels);
  p.weight = weight.const_data_ptr<float>();
  p.bias = bias.const_data_ptr<float>();
  p.input = input.const_data_ptr();
  const Tensor out = torch::stable::empty_like(input);
  p.out = out.mutable_data_ptr();
  const int64_t threads = threads_for(8.0 * double(input.numel()));
  run_on_threads(threads, [&](int64_t thread) { active_channel_norm_kernel()(p, thread, threads); });
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(gpt4fast, CPU, m) {
  m.impl("channel_norm_activation", TORCH_BOX(&forward));
}

}  // namespace gpt4fast::cpu
