#include "affine_activation.h"

#include <torch/csrc/stable/library.h>

#include "cuda/launch.h"

namespace gpt4fast {
namespace {

using torch::stable::Tensor;

constexpr int kBlockSize = 256;

// 16 bytes, the widest single load or store.
template <typename scalar_t>
struct alignas(16) Vector {
  static constexpr int kSize = 16 / sizeof(scalar_t);
  scalar_t elements[kSize];
};

__device__ __forceinline__ float parameter(const float* values, int64_t channel, float absent) {
  return values ? values[channel] : absent;
}

// Each thread transforms one 16-byte vector. Memory is the limit, so the channel is found with one division per vector
// and then counted forwards; 64-bit division is several times dearer and only taken where the indices need it.
template <typename scalar_t, Activation kActivation>
__global__ void __launch_bounds__(kBlockSize) affine_activation_kernel(const AffineActivationParams params) {
  constexpr int kSize = Vector<scalar_t>::kSize;
  const int64_t begin = (static_cast<int64_t>(blockIdx.x) * kBlockSize + threadIdx.x) * kSize;
  if (begin >= params.numel) {
    return;
  }
  const auto* input = static_cast<const scalar_t*>(params.input) + begin;
  auto* output = static_cast<scalar_t*>(params.output) + begin;
  const bool whole = begin + kSize <= params.numel;
  const bool aligned = reinterpret_cast<uintptr_t>(params.input) % 16 == 0;  // false for a view that starts in between

  Vector<scalar_t> values;
  if (whole && aligned) {
    values = *reinterpret_cast<const Vector<scalar_t>*>(input);
  } else {
#pragma unroll
    for (int k = 0; k < kSize; ++k) {
      values.elements[k] = begin + k < params.numel ? input[k] : scalar_t(0.0f);
    }
  }

  int64_t position, channel;
  if (params.numel <= UINT32_MAX) {
    const auto index = static_cast<uint32_t>(begin), inner = static_cast<uint32_t>(params.inner);
    position = index % inner;
    channel = index / inner % static_cast<uint32_t>(params.channels);
  } else {
    position = begin % params.inner;
    channel = begin / params.inner % params.channels;
  }
  float affine[kSize];
  if (position + kSize <= params.inner) {
    const float bias = parameter(params.bias, channel, 0.0f), scale = parameter(params.scale, channel, 1.0f),
                shift = parameter(params.shift, channel, 0.0f);
#pragma unroll
    for (int k = 0; k < kSize; ++k) {
      affine[k] = scale * (static_cast<float>(values.elements[k]) + bias) + shift;
    }
  } else {
#pragma unroll
    for (int k = 0; k < kSize; ++k) {
      affine[k] = parameter(params.scale, channel, 1.0f) *
                      (static_cast<float>(values.elements[k]) + parameter(params.bias, channel, 0.0f)) +
                  parameter(params.shift, channel, 0.0f);
      const bool next = ++position == params.inner;
      position = next ? 0 : position;
      channel = next ? channel + 1 : channel;
      channel = channel == params.channels ? 0 : channel;
    }
  }

#pragma unroll
  for (int k = 0; k < kSize; ++k) {
    values.elements[k] = static_cast<scalar_t>(activate<kActivation>(affine[k], params.negative_slope));
  }
  if (whole) {  // torch aligns its allocations, so the fresh output needs no second check
    *reinterpret_cast<Vector<scalar_t>*>(output) = values;
  } else {
#pragma unroll
    for (int k = 0; k < kSize; ++k) {
      if (begin + k < params.numel) {
        output[k] = values.elements[k];
      }
    }
  }
}

Tensor affine_activation(const Tensor& input, const std::optional<Tensor>& bias, const std::optional<Tensor>& scale,
                         const std::optional<Tensor>& shift, const std::string& activation, double negative_slope) {
  CHECK_CUDA(input);
  const Device device(input);
  const auto launch = [&device]<typename scalar_t, Activation kActivation>(const AffineActivationParams& params) {
    constexpr int64_t kSize = Vector<scalar_t>::kSize;
    allow_access(params.input, params.numel * sizeof(scalar_t), false);
    allow_access(params.output, params.numel * sizeof(scalar_t), true);
    for (const float* parameters : {params.bias, params.scale, params.shift}) {
      allow_access(parameters, params.channels * sizeof(float), false);
    }
    const int64_t blocks = ceil_div(params.numel, kSize * kBlockSize);
    device.launch(affine_activation_kernel<scalar_t, kActivation>, blocks, kBlockSize, 0, params);
  };
  return run_affine_activation(input, bias, scale, shift, activation, negative_slope, launch);
}

}  // namespace
}  // namespace gpt4fast

STABLE_TORCH_LIBRARY_IMPL(gpt4fast, GPT4FAST_CUDA_KEY, m) {
  m.impl("affine_activation", TORCH_BOX(&gpt4fast::affine_activation));
}
