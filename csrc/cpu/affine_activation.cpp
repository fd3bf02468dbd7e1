#include "affine_activation.h"

#include <algorithm>

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

namespace gpt4fast {
namespace {

using torch::stable::Tensor;

// Below this many elements a second thread costs more than it saves.
constexpr int64_t kGrain = 32768;

template <typename scalar_t, Activation kActivation>
void transform(const AffineActivationParams& params, int64_t begin, int64_t end) {
  const auto* input = static_cast<const scalar_t*>(params.input);
  auto* output = static_cast<scalar_t*>(params.output);
  const auto apply = [&](int64_t index, float bias, float scale, float shift) {
    const float affine = scale * (static_cast<float>(input[index]) + bias) + shift;
    output[index] = static_cast<scalar_t>(activate<kActivation>(affine, params.negative_slope));
  };
  const auto bias = [&](int64_t channel) { return params.bias ? params.bias[channel] : 0.0f; };
  const auto scale = [&](int64_t channel) { return params.scale ? params.scale[channel] : 1.0f; };
  const auto shift = [&](int64_t channel) { return params.shift ? params.shift[channel] : 0.0f; };
  // Both loops run over stretches that need no division: one channel's plane, or all channels of one position.
  for (int64_t index = begin; index < end;) {
    if (params.inner > 1) {
      const int64_t plane = index / params.inner;
      const int64_t stop = std::min(end, (plane + 1) * params.inner);
      const int64_t channel = plane % params.channels;
      const float plane_bias = bias(channel), plane_scale = scale(channel), plane_shift = shift(channel);
      for (; index < stop; ++index) {
        apply(index, plane_bias, plane_scale, plane_shift);
      }
    } else {
      const int64_t first = index - index % params.channels;
      const int64_t stop = std::min(end, first + params.channels);
      for (; index < stop; ++index) {
        apply(index, bias(index - first), scale(index - first), shift(index - first));
      }
    }
  }
}

Tensor affine_activation(const Tensor& input, const std::optional<Tensor>& bias, const std::optional<Tensor>& scale,
                         const std::optional<Tensor>& shift, const std::string& activation, double negative_slope) {
  CHECK_CPU(input);
  const auto launch = []<typename scalar_t, Activation kActivation>(const AffineActivationParams& params) {
    torch::stable::parallel_for(0, params.numel, kGrain, [&](int64_t begin, int64_t end) {
      transform<scalar_t, kActivation>(params, begin, end);
    });
  };
  return run_affine_activation(input, bias, scale, shift, activation, negative_slope, launch);
}

}  // namespace
}  // namespace gpt4fast

STABLE_TORCH_LIBRARY_IMPL(gpt4fast, CPU, m) {
  m.impl("affine_activation", TORCH_BOX(&gpt4fast::affine_activation));
}
