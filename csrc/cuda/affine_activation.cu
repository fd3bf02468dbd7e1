#include "affine_activation.h"

#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

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

  int64_t position, channel;
  if (params.numel <= UINT32_MAX) {
    const auto index = static_cast<uint32_t>(begin), inner = static_cast<uint32_t>(params.inner);
    position = index % inner;
    channel = index / inner % static_cast<uint32_t>(params.channels);
  } else {
    position = begin % params.inner;
    channel = begin / params.inner % params.channels;
  }
  Vector<scalar_t> values;
  if (whole && aligned) {
    values = *reinterpret_cast<const Vector<scalar_t>*>(input);
  } else {
#pragma unroll
    for (int k = 0; k < kSize; ++k) {
      values.elements[k] = begin + k < params.numel ? input[k] : scalar_t(0.0f);
    }
  }
  float bias = params.bias.at(channel, 0.0f), scale = params.scale.at(channel, 1.0f),
        shift = params.shift.at(channel, 0.0f);
#pragma unroll
  for (int k = 0; k < kSize; ++k) {
    const float affine = scale * (static_cast<float>(values.elements[k]) + bias) + shift;
    values.elements[k] = static_cast<scalar_t>(activate<kActivation>(affine, params.negative_slope));
    if (k + 1 < kSize && ++position == params.inner) {
      position = 0;
      channel = channel + 1 == params.channels ? 0 : channel + 1;
      bias = params.bias.at(channel, 0.0f);
      scale = params.scale.at(channel, 1.0f);
      shift = params.shift.at(channel, 0.0f);
    }
  }
  if (whole) {  // torch's allocations are aligned, so a fresh output always is
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
  const Activation kind = parse_activation(activation);
  AffineActivationParams params = affine_activation_params(input, bias, scale, shift, negative_slope);
  const torch::stable::accelerator::DeviceGuard guard(input.get_device_index());
  return DTYPE_SWITCH(input.scalar_type(), "input", scalar_t, [&] {
    Tensor output = torch::stable::empty_like(input);
    if (params.numel == 0) {
      return output;
    }
    params.input = input.const_data_ptr();
    params.output = output.mutable_data_ptr();
    constexpr int64_t kSize = Vector<scalar_t>::kSize;
    const unsigned blocks = blocks_for((params.numel + kSize - 1) / kSize, kBlockSize);
    ACTIVATION_SWITCH(kind, kActivation, [&] {
      affine_activation_kernel<scalar_t, kActivation><<<blocks, kBlockSize, 0, current_stream(input)>>>(params);
      STD_CUDA_KERNEL_LAUNCH_CHECK();
    });
    return output;
  });
}

}  // namespace
}  // namespace gpt4fast

STABLE_TORCH_LIBRARY_IMPL(gpt4fast, CUDA, m) {
  m.impl("affine_activation", TORCH_BOX(&gpt4fast::affine_activation));
}
