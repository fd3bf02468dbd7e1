#pragma once

#include <cstdint>
#include <optional>
#include <string>

#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include "common/activation.h"
#include "common/checks.h"
#include "common/dtypes.h"

namespace gpt4fast {

// One number per channel, of whichever floating dtype the user's module keeps it in.
struct ChannelParameter {
  const void* data = nullptr;  // (channels,), or null where the argument was None
  torch::headeronly::ScalarType dtype = torch::headeronly::ScalarType::Float;

  GPT4FAST_HOST_DEVICE float at(int64_t channel, float absent) const {
    if (data == nullptr) {
      return absent;
    }
    if (dtype == torch::headeronly::ScalarType::Float) {
      return static_cast<const float*>(data)[channel];
    }
    if (dtype == torch::headeronly::ScalarType::BFloat16) {
      return static_cast<float>(static_cast<const torch::headeronly::BFloat16*>(data)[channel]);
    }
    return static_cast<float>(static_cast<const torch::headeronly::Half*>(data)[channel]);
  }
};

// y = activation(scale * (x + bias) + shift), with the parameters of channel (i / inner) % channels at element i in
// the order of memory.
struct AffineActivationParams {
  const void* input;  // (batch, channels, *spatial), dense
  void* output;       // the same shape, dtype and strides
  ChannelParameter bias, scale, shift;
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

inline ChannelParameter channel_parameter(const std::optional<torch::stable::Tensor>& parameter, const char* name,
                                          const torch::stable::Tensor& input) {
  if (!parameter) {
    return {};
  }
  STD_TORCH_CHECK(parameter->device() == input.device(), "expected ", name, " to be on the device of input");
  STD_TORCH_CHECK(parameter->dim() == 1 && parameter->size(0) == input.size(1), "expected ", name, " to have shape (",
                  input.size(1), "), one number per channel of input, but its shape is ", shape_of(*parameter));
  STD_TORCH_CHECK(is_native_dtype(parameter->scalar_type()), "expected ", name,
                  " to be float32, bfloat16 or float16, but its dtype is ", name_of(parameter->scalar_type()));
  STD_TORCH_CHECK(parameter->is_contiguous(), "expected ", name, " to be contiguous");
  return {parameter->const_data_ptr(), parameter->scalar_type()};
}

// Checks the arguments and fills everything but the pointers to input and output.
inline AffineActivationParams affine_activation_params(const torch::stable::Tensor& input,
                                                       const std::optional<torch::stable::Tensor>& bias,
                                                       const std::optional<torch::stable::Tensor>& scale,
                                                       const std::optional<torch::stable::Tensor>& shift,
                                                       double negative_slope) {
  STD_TORCH_CHECK(input.dim() >= 2, "expected input to have shape (batch, channels, ...), but its shape is ",
                  shape_of(input));
  AffineActivationParams params{};
  params.bias = channel_parameter(bias, "bias", input);
  params.scale = channel_parameter(scale, "scale", input);
  params.shift = channel_parameter(shift, "shift", input);
  params.numel = input.numel();
  params.channels = input.size(1);
  params.inner = elements_between_channels(input);
  params.negative_slope = static_cast<float>(negative_slope);
  return params;
}

}  // namespace gpt4fast
