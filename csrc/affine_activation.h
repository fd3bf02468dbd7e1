#pragma once

#include <cstdint>
#include <optional>
#include <string>

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include "common/activation.h"
#include "common/checks.h"
#include "common/dtypes.h"

namespace gpt4fast {

// y = activation(scale * (x + bias) + shift), with the parameters of channel (i / inner) % channels at element i in
// the order of memory.
struct AffineActivationParams {
  const void* input;  // (batch, channels, *spatial), dense
  void* output;       // the same shape, dtype and strides
  const float* bias;  // (channels,), or null where the argument was None; so are scale and shift
  const float* scale;
  const float* shift;
  int64_t numel;
  int64_t channels;
  int64_t inner;  // elements in memory between one channel and the next: the spatial size, or 1 where channels are last
  float negative_slope;
};

// Where in memory the channels lie: the spatial size if input is contiguous, 1 if it is channels-last.
inline int64_t elements_between_channels(const torch::stable::Tensor& input) {
  const int64_t dims = input.dim();
  if (input.is_contiguous()) {
    int64_t spatial = 1;
    for (int64_t axis = 2; axis < dims; ++axis) {
      spatial *= input.size(axis);
    }
    return spatial;
  }
  int64_t expected = 1;
  bool channels_last = true;
  for (int64_t step = 0; step < dims; ++step) {  // memory order from the innermost: channels, spatial axes, batch
    const int64_t axis = step == 0 ? 1 : step == dims - 1 ? 0 : dims - step;
    channels_last = channels_last && (input.size(axis) == 1 || input.stride(axis) == expected);
    expected *= input.size(axis);
  }
  STD_TORCH_CHECK(channels_last, "expected input to be contiguous or channels-last, but its shape is ", shape_of(input),
                  " and its strides are neither");
  return 1;
}

// The parameter in float32, whichever floating dtype the user's module keeps it in; `storage` holds a converted copy.
inline const float* channel_parameter(const std::optional<torch::stable::Tensor>& parameter, const char* name,
                                      const torch::stable::Tensor& input, torch::stable::Tensor& storage) {
  if (!parameter) {
    return nullptr;
  }
  STD_TORCH_CHECK(parameter->device() == input.device(), "expected ", name, " to be on the device of input");
  STD_TORCH_CHECK(parameter->dim() == 1 && parameter->size(0) == input.size(1), "expected ", name, " to have shape (",
                  input.size(1), "), one number per channel of input, but its shape is ", shape_of(*parameter));
  STD_TORCH_CHECK(is_native_dtype(parameter->scalar_type()), "expected ", name,
                  " to be float32, bfloat16 or float16, but its dtype is ", name_of(parameter->scalar_type()));
  if (parameter->scalar_type() == torch::headeronly::ScalarType::Float && parameter->is_contiguous()) {
    return parameter->const_data_ptr<float>();  // what follows goes through torch's dispatcher twice
  }
  storage = torch::stable::contiguous(torch::stable::to(*parameter, torch::headeronly::ScalarType::Float));
  return static_cast<const float*>(storage.const_data_ptr());
}

// Checks the arguments, calls launch<scalar_t, kActivation>(params) where there is something to compute, and returns
// the output. Shared by the CPU and the CUDA operator.
template <typename Launch>
torch::stable::Tensor run_affine_activation(const torch::stable::Tensor& input,
                                            const std::optional<torch::stable::Tensor>& bias,
                                            const std::optional<torch::stable::Tensor>& scale,
                                            const std::optional<torch::stable::Tensor>& shift,
                                            const std::string& activation, double negative_slope,
                                            const Launch& launch) {
  STD_TORCH_CHECK(input.dim() >= 2, "expected input to have shape (batch, channels, ...), but its shape is ",
                  shape_of(input));
  const Activation kind = parse_activation(activation);
  torch::stable::Tensor bias_storage, scale_storage, shift_storage;
  AffineActivationParams params{};
  params.bias = channel_parameter(bias, "bias", input, bias_storage);
  params.scale = channel_parameter(scale, "scale", input, scale_storage);
  params.shift = channel_parameter(shift, "shift", input, shift_storage);
  params.numel = input.numel();
  params.channels = input.size(1);
  params.inner = elements_between_channels(input);
  params.negative_slope = static_cast<float>(negative_slope);
  return DTYPE_SWITCH(input.scalar_type(), "input", scalar_t, [&] {
    torch::stable::Tensor output = torch::stable::empty_like(input);
    params.input = input.const_data_ptr();
    params.output = output.mutable_data_ptr();
    if (params.numel > 0) {
      ACTIVATION_SWITCH(kind, kActivation, [&] { launch.template operator()<scalar_t, kActivation>(params); });
    }
    return output;
  });
}

}  // namespace gpt4fast
