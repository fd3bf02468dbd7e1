#include "affine_activation.h"

#include <algorithm>
#include <vector>

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

namespace gpt4fast {
namespace {

using torch::stable::Tensor;

// Below this many elements a second thread costs more than it saves.
constexpr int64_t kGrain = 16384;

// The parameters of all channels, widened to float32 once so that the loops over elements are plain float loops.
struct Channels {
  std::vector<float> bias, scale, shift;

  explicit Channels(const AffineActivationParams& params)
      : bias(params.channels), scale(params.channels), shift(params.channels) {
    for (int64_t channel = 0; channel < params.channels; ++channel) {
      bias[channel] = params.bias.at(channel, 0.0f);
      scale[channel] = params.scale.at(channel, 1.0f);
      shift[channel] = params.shift.at(channel, 0.0f);
    }
  }
};

template <typename scalar_t, Activation kActivation>
void transform(const AffineActivationParams& params, const Channels& channels, int64_t begin, int64_t end) {
  const auto* input = static_cast<const scalar_t*>(params.input);
  auto* output = static_cast<scalar_t*>(params.output);
  const float slope = params.negative_slope;
  const auto apply = [&](int64_t index, int64_t channel) {
    const float affine =
        channels.scale[channel] * (static_cast<float>(input[index]) + channels.bias[channel]) + channels.shift[channel];
    output[index] = static_cast<scalar_t>(activate<kActivation>(affine, slope));
  };
  // Both loops run over stretches that need no division: one channel's plane, or all channels of one position.
  for (int64_t index = begin; index < end;) {
    if (params.inner > 1) {
      const int64_t plane = index / params.inner;
      const int64_t stop = std::min(end, (plane + 1) * params.inner);
      const int64_t channel = plane % params.channels;
      for (; index < stop; ++index) {
        apply(index, channel);
      }
    } else {
      const int64_t first = index - index % params.channels;
      const int64_t stop = std::min(end, first + params.channels);
      for (; index < stop; ++index) {
        apply(index, index - first);
      }
    }
  }
}

Tensor affine_activation(const Tensor& input, const std::optional<Tensor>& bias, const std::optional<Tensor>& scale,
                         const std::optional<Tensor>& shift, const std::string& activation, double negative_slope) {
  CHECK_CPU(input);
  const Activation kind = parse_activation(activation);
  AffineActivationParams params = affine_activation_params(input, bias, scale, shift, negative_slope);
  return DTYPE_SWITCH(input.scalar_type(), "input", scalar_t, [&] {
    Tensor output = torch::stable::empty_like(input);
    params.input = input.const_data_ptr();
    params.output = output.mutable_data_ptr();
    const Channels channels(params);
    ACTIVATION_SWITCH(kind, kActivation, [&] {
      torch::stable::parallel_for(0, params.numel, kGrain, [&](int64_t begin, int64_t end) {
        transform<scalar_t, kActivation>(params, channels, begin, end);
      });
    });
    return output;
  });
}

}  // namespace
}  // namespace gpt4fast

STABLE_TORCH_LIBRARY_IMPL(gpt4fast, CPU, m) {
  m.impl("affine_activation", TORCH_BOX(&gpt4fast::affine_activation));
}
