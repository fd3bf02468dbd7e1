// The epilogue of a convolution of torch's, and the pass of a batch norm that normalises: one read, one write.
#include "affine_activation.h"

#include <torch/csrc/stable/library.h>

#include "common/strings.h"
#include "cuda/channels.cuh"
#include "cuda/launch.h"

namespace gpt4fast {
namespace {

using torch::stable::Tensor;

// y = activation(scale * rstd * (x + bias - mean) + shift).
struct AffineActivationLaunch : AffineActivationParams {
  const float *mean, *rstd;  // (channels,), or null
  Activation activation;
  HalfType half;
};

struct Affine {
  float offset, factor, shift;
};

// One kernel serves every activation: the branch is the same for all threads.
template <typename element_t>
__global__ void __launch_bounds__(kVectorThreads) affine_activation_kernel(const AffineActivationLaunch params) {
  constexpr int kSize = Vector<element_t>::kSize;
  const int64_t begin = (static_cast<int64_t>(blockIdx.x) * kVectorThreads + threadIdx.x) * kSize;
  if (begin >= params.numel) {
    return;
  }
  Vector<element_t> values = load_vector<element_t>(params.input, begin, params.numel);
  const auto number = [](const float* vector, int64_t channel, float absent) {
    return vector ? vector[channel] : absent;
  };
  const auto read = [&](int64_t channel) {
    return Affine{number(params.bias, channel, 0.0f) - number(params.mean, channel, 0.0f),
                  number(params.scale, channel, 1.0f) * number(params.rstd, channel, 1.0f),
                  number(params.shift, channel, 0.0f)};
  };
  float numbers[kSize];
  values.get(numbers, params.half);
  for_channels<kSize>(begin, params.numel, params.inner, params.channels, read,
                      [&](int k, const Affine& a) { numbers[k] = a.factor * (numbers[k] + a.offset) + a.shift; });
  ACTIVATION_SWITCH(params.activation, kActivation, [&] {
    for (int k = 0; k < kSize; ++k) {
      numbers[k] = activate<kActivation>(numbers[k], params.negative_slope);
    }
  });
  values.set(numbers, params.half);
  store_vector(params.output, values, begin, params.numel);
}

Tensor run(const Tensor& input, const std::optional<Tensor>& bias, const std::optional<Tensor>& scale,
           const std::optional<Tensor>& shift, const float* mean, const float* rstd, const std::string& activation,
           double negative_slope) {
  const Device device(input);
  const auto launch = [&]<typename scalar_t, Activation kActivation>(const AffineActivationParams& params) {
    using element_t = element_of<scalar_t>;
    const AffineActivationLaunch p{params, mean, rstd, kActivation, half_type(input.scalar_type())};
    allow_access(p.input, p.numel * sizeof(element_t), false);
    allow_access(p.output, p.numel * sizeof(element_t), true);
    for (const float* parameters : {p.bias, p.scale, p.shift, p.mean, p.rstd}) {
      allow_access(parameters, p.channels * sizeof(float), false);
    }
    const int64_t blocks = ceil_div(p.numel, Vector<element_t>::kSize * kVectorThreads);
    device.launch(affine_activation_kernel<element_t>, blocks, kVectorThreads, 0, p);
  };
  return run_affine_activation(input, bias, scale, shift, activation, negative_slope, launch);
}

Tensor affine_activation(const Tensor& input, const std::optional<Tensor>& bias, const std::optional<Tensor>& scale,
                         const std::optional<Tensor>& shift, const std::string& activation, double negative_slope) {
  CHECK_CUDA(input);
  return run(input, bias, scale, shift, nullptr, nullptr, activation, negative_slope);
}

// activation(weight * (input - mean) * rstd + bias), all vectors (C,).
Tensor batch_norm_apply(const Tensor& input, const Tensor& mean, const Tensor& rstd, const Tensor& weight,
                        const Tensor& bias, StringHandle activation, double negative_slope) {
  const std::string name = take_string(activation);  // first: a failed check must not lose the string
  CHECK_CUDA(input);
  STD_TORCH_CHECK(input.dim() >= 2, "expected input to have shape (batch, channels, ...), but its shape is ",
                  shape_of(input));
  Tensor storage[2];
  const float* center = channel_parameter(mean, "mean", input, storage[0]);
  const float* factor = channel_parameter(rstd, "rstd", input, storage[1]);
  return run(input, std::nullopt, weight, bias, center, factor, name, negative_slope);
}

}  // namespace
}  // namespace gpt4fast

STABLE_TORCH_LIBRARY_IMPL(gpt4fast, GPT4FAST_CUDA_KEY, m) {
  m.impl("affine_activation", TORCH_BOX(&gpt4fast::affine_activation));
  m.impl("batch_norm_apply", TORCH_BOX(&gpt4fast::batch_norm_apply));
}
