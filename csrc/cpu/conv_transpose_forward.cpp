// The operators gpt4fast::conv_transpose_forward and conv_transpose_pack on a CPU.
#include "../conv_transpose.h"

#include <optional>
#include <vector>

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include "../common/activation.h"
#include "../common/checks.h"
#include "../common/dtypes.h"
#include "../common/strings.h"
#include "conv_transpose_arguments.h"

namespace gpt4fast::cpu {
namespace {

using torch::stable::Tensor;

std::vector<float> read_channels(const std::optional<Tensor>& values, const char* name, int64_t channels,
                                 float otherwise) {
  std::vector<float> floats(static_cast<size_t>(channels), otherwise);
  if (values) {
    STD_TORCH_CHECK(values->is_cpu(), "expected ", name, " to be on the CPU");
    STD_TORCH_CHECK(values->dim() == 1 && values->size(0) == channels, "expected ", name, " to have shape (", channels,
                    "), but its shape is ", shape_of(*values));
    DTYPE_SWITCH(values->scalar_type(), name, scalar_t, [&] {
      const auto* source = static_cast<const scalar_t*>(values->const_data_ptr());
      for (int64_t c = 0; c < channels; ++c) {
        floats[static_cast<size_t>(c)] = static_cast<float>(source[c * values->stride(0)]);
      }
    });
  }
  return floats;
}

// scale * (x + bias) + shift = scale * x + offset
void set_affine(const std::optional<Tensor>& bias, const std::optional<Tensor>& scale,
                const std::optional<Tensor>& shift, float* memory, ConvTransposeParams& p) {
  const std::vector<float> biases = read_channels(bias, "bias", p.out_channels, 0.0f);
  const std::vector<float> scales = read_channels(scale, "scale", p.out_channels, 1.0f);
  const std::vector<float> shifts = read_channels(shift, "shift", p.out_channels, 0.0f);
  float* offsets = memory + p.out_channels + ConvTransposeParams::kMostLanes;
  for (size_t c = 0; c < scales.size(); ++c) {
    memory[c] = scales[c];
    offsets[c] = scales[c] * biases[c] + shifts[c];
  }
  p.scale = memory;
  p.offset = offsets;
}

Tensor pack(const Tensor& weight, int64_t groups, bool winograd) {
  ConvTransposeParams p{};
  CHECK_CPU(weight);
  set_weight(weight, groups, winograd, p);
  return pack_weight(weight, p);
}

Tensor forward(const Tensor& input, const Tensor& weight, const std::optional<Tensor>& bias,
               const std::vector<int64_t>& stride, const std::vector<int64_t>& padding,
               const std::vector<int64_t>& output_padding, int64_t groups, const std::vector<int64_t>& dilation,
               const std::optional<Tensor>& scale, const std::optional<Tensor>& shift, StringHandle activation,
               double negative_slope, bool channels_last, const std::optional<Tensor>& packed, bool winograd, bool) {
  ConvTransposeParams p{};
  p.activation = parse_activation(take_string(activation));  // first: a failed check must not lose the string
  CHECK_CPU(input);
  CHECK_CPU(weight);
  p.negative_slope = static_cast<float>(negative_slope);
  p.channels_last = channels_last;
  const Tensor out = empty_images(
      set_input(input, weight, groups, {stride, padding, output_padding, dilation}, winograd, p), input, channels_last);
  std::vector<float> affine(2 * static_cast<size_t>(p.out_channels + ConvTransposeParams::kMostLanes));
  set_affine(bias, scale, shift, affine.data(), p);
  if (out.numel() > 0) {
    p.out = out.mutable_data_ptr();
    run_kernel(p, packed && is_packed_from(*packed, p) ? *packed : pack_weight(weight, p),
               double(input.numel()) * double(weight.numel()) / double(weight.size(0)) + double(out.numel()));
  }
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(gpt4fast, CPU, m) {
  m.impl("conv_transpose_forward", TORCH_BOX(&forward));
  m.impl("conv_transpose_pack", TORCH_BOX(&pack));
}

}  // namespace gpt4fast::cpu
