#include "conv_transpose_arguments.h"

#include <algorithm>
#include <array>
#include <cstring>

#include <torch/csrc/stable/ops.h>

#include "../common/checks.h"
#include "../common/dtypes.h"
#include "../common/empty.h"
#include "attention_arguments.h"
#include "cpu_level.h"
#include "threads.h"

namespace gpt4fast::cpu {

GPT4FAST_KERNEL_OF_LEVELS(ConvTransposeKernel, conv_transpose_kernel)
GPT4FAST_KERNEL_OF_LEVELS(ConvTransposeKernel, conv_transpose_depthwise_kernel)
GPT4FAST_KERNEL_OF_LEVELS(ConvTransposeKernel, conv_transpose_few_kernel)
GPT4FAST_KERNEL_OF_LEVELS(ConvTransposeKernel, conv_transpose_winograd_kernel)

namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

constexpr int64_t kFewOutputs = 4;           // channels of a group that conv_transpose_few_kernel.cpp computes
constexpr int64_t kMostDepthwiseTaps = 128;  // of which conv_transpose_depthwise_kernel.cpp keeps lists
constexpr int64_t kMostScratch = 4 << 20;    // bytes of a thread, in the kernels that copy all inputs of a block

enum class Way : int64_t { general, depthwise, few, winograd };

// What is written behind a packed weight.
struct Signature {
  int64_t level;  // of the kernel that packed it
  Way way;
  int64_t is_finite;  // the weight, where that matters
  int64_t groups;
  int64_t sampled;  // bits of the weight it was made from

  bool operator==(const Signature&) const = default;
};

const ConvTransposeKernel& kernel_of(Way way) {
  switch (way) {
    case Way::depthwise: return active_conv_transpose_depthwise_kernel();
    case Way::few: return active_conv_transpose_few_kernel();
    case Way::winograd: return active_conv_transpose_winograd_kernel();
    default: return active_conv_transpose_kernel();
  }
}

template <typename Bits>
bool has_finite_weight(const ConvTransposeParams& p, Bits exponent) {
  const int64_t (&strides)[5] = p.weight_strides;
  bool is_finite = true;
  for (int64_t c = 0; c < p.in_channels; ++c) {
    for (int64_t output = 0; output < p.out_channels / p.groups; ++output) {
      for (int64_t d = 0; d < p.kernel[0]; ++d) {
        for (int64_t h = 0; h < p.kernel[1]; ++h) {
          const Bits* row = static_cast<const Bits*>(p.weight) + c * strides[0] + output * strides[1] + d * strides[2] +
                            h * strides[3];
          for (int64_t w = 0; w < p.kernel[2]; ++w) {
            is_finite &= (row[w * strides[4]] & exponent) != exponent;
          }
        }
      }
    }
  }
  return is_finite;
}

bool has_finite_weight(const ConvTransposeParams& p) {
  switch (p.dtype) {
    case ElementType::float32: return has_finite_weight<uint32_t>(p, 0x7F800000);
    case ElementType::bfloat16: return has_finite_weight<uint16_t>(p, 0x7F80);
    default: return has_finite_weight<uint16_t>(p, 0x7C00);
  }
}

// Whether a thread can copy all inputs of a block: also those between the few that a wide dilation meets.
bool fits(Way way, const ConvTransposeParams& p) {
  if (std::all_of(p.dilation, p.dilation + 3, [](int64_t dilation) { return dilation == 1; })) {
    return true;  // without a microsecond for workspace()
  }
  double inputs = 1;  // of an output: beyond these workspace() might overflow
  for (int axis = 0; axis < 3; ++axis) {
    inputs *= double(p.kernel[axis] - 1) * double(p.dilation[axis]) / double(p.stride[axis]) + 1;
  }
  return inputs <= double(kMostScratch) && kernel_of(way).workspace(p, 1) <= kMostScratch;
}

// The weight and is_winograd decide, so that a packed one serves inputs of any size; but for a very wide dilation,
// which is looked at where there is an input.
Way way_for(const ConvTransposeParams& p, bool is_finite) {
  if (p.is_winograd) {
    return Way::winograd;
  }
  if (p.is_adjoint || p.out_channels / p.groups > kFewOutputs) {
    return Way::general;
  }
  const bool is_depthwise = p.in_channels == p.groups && p.out_channels == p.groups &&
                            p.kernel[0] * p.kernel[1] * p.kernel[2] <= kMostDepthwiseTaps;
  const Way way = is_depthwise ? Way::depthwise : Way::few;
  if (way == Way::few && !is_finite) {
    return Way::general;  // few puts zeros around the image, and zero times infinity is NaN
  }
  return p.in_size[0] == 0 || fits(way, p) ? way : Way::general;
}

// A hash of 64 elements, against writes that torch's version counter does not see (weight.data).
int64_t sample(const ConvTransposeParams& p) {
  constexpr int64_t kSamples = 64;
  const int64_t inputs = p.in_channels / (p.is_adjoint ? p.groups : 1);
  const int64_t outputs = p.out_channels / (p.is_adjoint ? 1 : p.groups);
  const int64_t sizes[] = {inputs, outputs, p.kernel[0], p.kernel[1], p.kernel[2]};
  const int64_t count = inputs * outputs * sizes[2] * sizes[3] * sizes[4], step = count / kSamples + 1;
  uint64_t hash = static_cast<uint64_t>(count);
  for (int64_t at = 0; at < count; at += step) {
    int64_t offset = 0, rest = at;
    for (int axis = 4; axis >= 0; --axis) {
      offset += rest % sizes[axis] * p.weight_strides[axis];
      rest /= sizes[axis];
    }
    const uint64_t bits = p.dtype == ElementType::float32 ? static_cast<const uint32_t*>(p.weight)[offset]
                                                          : static_cast<const uint16_t*>(p.weight)[offset];
    hash = (hash ^ bits) * 0x9E3779B97F4A7C15u;
    hash ^= hash >> 29;
  }
  return static_cast<int64_t>(hash);
}

// What pack_weight would write.
Signature signature_of(const ConvTransposeParams& p, bool is_finite) {
  return {static_cast<int64_t>(cpu_level()), way_for(p, is_finite), is_finite, p.groups, sample(p)};
}

Signature read_signature(const Tensor& packed) {
  Signature signature;
  const auto* end = static_cast<const char*>(packed.const_data_ptr()) + packed.size(0);
  std::memcpy(&signature, end - sizeof(signature), sizeof(signature));
  return signature;
}

}  // namespace

Tensor pack_weight(const Tensor& weight, const ConvTransposeParams& p) {
  const bool is_finite = way_for(p, true) != Way::few || has_finite_weight(p);
  const Signature signature = signature_of(p, is_finite);
  const ConvTransposeKernel& kernel = kernel_of(signature.way);
  const int64_t bytes = kernel.packed_bytes(p);
  const Tensor packed =
      torch::stable::new_empty(weight, {bytes + static_cast<int64_t>(sizeof(signature))}, ScalarType::Byte);
  auto* memory = static_cast<char*>(packed.mutable_data_ptr());
  const int64_t threads = threads_for(double(weight.numel()));
  run_on_threads(threads, [&](int64_t thread) { kernel.pack(p, memory, thread, threads); });
  std::memcpy(memory + bytes, &signature, sizeof(signature));
  return packed;
}

bool is_packed_from(const Tensor& packed, const ConvTransposeParams& p) {
  CHECK_CPU(packed);
  CHECK_DIM(packed, 1);
  STD_TORCH_CHECK(packed.scalar_type() == ScalarType::Byte && packed.is_contiguous(),
                  "expected packed to be what conv_transpose_pack gives");
  if (packed.size(0) < static_cast<int64_t>(sizeof(Signature))) {
    return false;
  }
  const Signature signature = read_signature(packed);
  return signature == signature_of(p, signature.is_finite) &&
         packed.size(0) == kernel_of(signature.way).packed_bytes(p) + static_cast<int64_t>(sizeof(signature));
}

void run_kernel(const ConvTransposeParams& p, const Tensor& packed, double multiplications) {
  const ConvTransposeKernel& kernel = kernel_of(read_signature(packed).way);
  const int64_t threads = threads_for(multiplications), bytes = kernel.workspace(p, threads);
  const Tensor workspace = empty_on_cpu<2>({threads, bytes}, ScalarType::Byte);
  char* memory = static_cast<char*>(workspace.mutable_data_ptr());
  run_on_threads(threads, [&](int64_t thread) {
    kernel.run(p, packed.const_data_ptr(), memory + thread * bytes, thread, threads);
  });
}

}  // namespace gpt4fast::cpu
