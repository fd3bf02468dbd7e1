// The operators gpt4fast::batch_norm_activation and its gradient on a CPU.
#include "../batch_norm.h"

#include <tuple>
#include <vector>

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include "../common/activation.h"
#include "../common/checks.h"
#include "../common/strings.h"
#include "attention_arguments.h"
#include "conv_transpose_arguments.h"
#include "cpu_level.h"
#include "threads.h"

namespace gpt4fast::cpu {

GPT4FAST_KERNEL_OF_LEVELS(BatchNormKernel, batch_norm_kernel)

namespace {

using torch::stable::Tensor;

void set_params(const Tensor& input, const Tensor& weight, const Tensor& bias, StringHandle activation,
                double negative_slope, BatchNormParams& p) {
  p.activation = parse_activation(take_string(activation));  // first: a failed check must not lose the string
  p.negative_slope = static_cast<float>(negative_slope);
  CHECK_CPU(input);
  STD_TORCH_CHECK(input.dim() >= 2 && input.numel() > 0,
                  "expected input to have at least 2 dimensions, none of them empty, but its shape is ",
                  shape_of(input));
  STD_TORCH_CHECK(input.is_contiguous(), "expected input to be contiguous");
  p.dtype = element_type_of(input, "input");
  STD_TORCH_CHECK(p.dtype != ElementType::int8, "expected input to be float32, bfloat16 or float16, but it is int8");
  p.batch = input.size(0);
  p.channels = input.size(1);
  p.pixels = input.numel() / p.batch / p.channels;
  check_vector(weight, "weight", p.channels);
  check_vector(bias, "bias", p.channels);
  p.input = input.const_data_ptr();
  p.weight = weight.const_data_ptr<float>();
  p.bias = bias.const_data_ptr<float>();
}

int64_t threads_of(const Tensor& input) {
  return threads_for(8.0 * double(input.numel()));
}

std::tuple<Tensor, Tensor, Tensor, Tensor> forward(const Tensor& input, const Tensor& weight, const Tensor& bias,
                                                   double eps, StringHandle activation, double negative_slope) {
  BatchNormParams p{};
  set_params(input, weight, bias, activation, negative_slope, p);
  p.eps = eps;
  const Tensor out = torch::stable::new_empty(input, sizes_of(input)),
               mean = torch::stable::new_empty(weight, {p.channels});
  const Tensor rstd = torch::stable::new_empty(weight, {p.channels});
  const Tensor variance = torch::stable::new_empty(weight, {p.channels});
  p.out = out.mutable_data_ptr();
  p.mean = mean.mutable_data_ptr<float>();
  p.rstd = rstd.mutable_data_ptr<float>();
  p.variance = variance.mutable_data_ptr<float>();
  const int64_t threads = threads_of(input);
  run_on_threads(threads, [&](int64_t thread) { active_batch_norm_kernel().forward(p, thread, threads); });
  return {out, mean, rstd, variance};
}

std::tuple<Tensor, Tensor, Tensor> backward(const Tensor& grad_out, const Tensor& input, const Tensor& weight,
                                            const Tensor& bias, const Tensor& mean, const Tensor& rstd,
                                            StringHandle activation, double negative_slope) {
  BatchNormParams p{};
  set_params(input, weight, bias, activation, negative_slope, p);
  check_vector(mean, "mean", p.channels);
  check_vector(rstd, "rstd", p.channels);
  CHECK_CPU(grad_out);
  CHECK_DIM(grad_out, input.dim());
  CHECK_DTYPE(grad_out, input.scalar_type());
  for (int64_t axis = 0; axis < input.dim(); ++axis) {
    CHECK_SIZE(grad_out, axis, input.size(axis));
  }
  STD_TORCH_CHECK(grad_out.is_contiguous(), "expected grad_out to be contiguous");
  const Tensor grad_input = torch::stable::new_empty(input, sizes_of(input));
  const Tensor grad_weight = torch::stable::new_empty(weight, {p.channels});
  const Tensor grad_bias = torch::stable::new_empty(weight, {p.channels});
  p.mean = const_cast<float*>(mean.const_data_ptr<float>());
  p.rstd = const_cast<float*>(rstd.const_data_ptr<float>());
  p.grad_out = grad_out.const_data_ptr();
  p.grad_input = grad_input.mutable_data_ptr();
  p.grad_weight = grad_weight.mutable_data_ptr<float>();
  p.grad_bias = grad_bias.mutable_data_ptr<float>();
  const int64_t threads = threads_of(input);
  run_on_threads(threads, [&](int64_t thread) { active_batch_norm_kernel().backward(p, thread, threads); });
  return {grad_input, grad_weight, grad_bias};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(gpt4fast, CPU, m) {
  m.impl("batch_norm_activation", TORCH_BOX(&forward));
  m.impl("batch_norm_activation_backward", TORCH_BOX(&backward));
}

}  // namespace gpt4fast::cpu
