// The operator gpt4fast::conv_transpose_backward on a CPU.
#include "../conv_transpose.h"

#include <algorithm>
#include <tuple>
#include <vector>

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include "../common/checks.h"
#include "../common/empty.h"
#include "conv_transpose_arguments.h"
#include "cpu_level.h"
#include "threads.h"

namespace gpt4fast::cpu {

GPT4FAST_KERNEL_OF_LEVELS(ConvTransposeWeightGradientKernel, conv_transpose_weight_gradient_kernel)

namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// The adjoint of the convolution that p describes, applied to grad_out.
Tensor input_gradient(const Tensor& grad_out, const Tensor& input, const Tensor& weight, bool channels_last,
                      double multiplications, const ConvTransposeParams& p) {
  ConvTransposeParams adjoint = p;
  adjoint.is_adjoint = true;
  adjoint.channels_last = channels_last;
  std::swap(adjoint.in_channels, adjoint.out_channels);
  std::swap(adjoint.weight_strides[0], adjoint.weight_strides[1]);
  for (int axis = 0; axis < 3; ++axis) {
    std::swap(adjoint.in_size[axis], adjoint.out_size[axis]);
  }
  adjoint.input = grad_out.const_data_ptr();
  copy_image_strides(grad_out, adjoint.input_strides);
  const Tensor out = empty_images(sizes_of(input), input, channels_last);
  if (out.numel() > 0) {
    std::vector<float> affine(2 * static_cast<size_t>(adjoint.out_channels + ConvTransposeParams::kMostLanes));
    std::fill_n(affine.begin(), adjoint.out_channels, 1.0f);
    adjoint.scale = affine.data();
    adjoint.offset = affine.data() + adjoint.out_channels + ConvTransposeParams::kMostLanes;
    adjoint.out = out.mutable_data_ptr();
    run_kernel(adjoint, pack_weight(weight, adjoint), multiplications);
  }
  return out;
}

Tensor weight_gradient(const Tensor& grad_out, const Tensor& weight, double multiplications,
                       const ConvTransposeParams& p) {
  const Tensor out = torch::stable::new_empty(weight, sizes_of(weight));
  if (out.numel() == 0) {
    return out;
  }
  if (p.batch == 0) {
    return torch::stable::fill_(out, 0.0);
  }
  int64_t strides[5];
  copy_image_strides(grad_out, strides);
  const ConvTransposeWeightGradientKernel& kernel = active_conv_transpose_weight_gradient_kernel();
  const int64_t threads = threads_for(multiplications), bytes = kernel.workspace(p);
  const Tensor workspace = empty_on_cpu<2>({threads, bytes}, ScalarType::Byte);
  char* memory = static_cast<char*>(workspace.mutable_data_ptr());
  void* target = out.mutable_data_ptr();
  run_on_threads(threads, [&](int64_t thread) {
    kernel.run(p, grad_out.const_data_ptr(), strides, target, memory + thread * bytes, thread, threads);
  });
  return out;
}

// Gradients of input and weight; one that is not needed is empty.
std::tuple<Tensor, Tensor> backward(const Tensor& grad_out, const Tensor& input, const Tensor& weight,
                                    const std::vector<int64_t>& stride, const std::vector<int64_t>& padding,
                                    const std::vector<int64_t>& output_padding, int64_t groups,
                                    const std::vector<int64_t>& dilation, bool channels_last, bool needs_input_grad,
                                    bool needs_weight_grad, bool winograd, bool /*tf32, a GPU's*/) {
  ConvTransposeParams p{};
  CHECK_CPU(input);
  CHECK_CPU(weight);
  const std::vector<int64_t> shape =
      set_input(input, weight, groups, {stride, padding, output_padding, dilation}, winograd, p);
  CHECK_CPU(grad_out);
  CHECK_DIM(grad_out, input.dim());
  CHECK_DTYPE(grad_out, input.scalar_type());
  for (int64_t axis = 0; axis < grad_out.dim(); ++axis) {
    CHECK_SIZE(grad_out, axis, shape[static_cast<size_t>(axis)]);
  }
  const double multiplications = double(input.numel()) * double(weight.numel()) / double(weight.size(0));
  return {needs_input_grad ? input_gradient(grad_out, input, weight, channels_last, multiplications, p)
                           : torch::stable::new_empty(input, {0}),
          needs_weight_grad ? weight_gradient(grad_out, weight, multiplications, p)
                            : torch::stable::new_empty(weight, {0})};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(gpt4fast, CPU, m) {
  m.impl("conv_transpose_backward", TORCH_BOX(&backward));
}

}  // namespace gpt4fast::cpu
