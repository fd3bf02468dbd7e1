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

// What is written behind a packed weight.
struct Signature {
  int64_t level;    // of the kernel that packed it
  int64_t sampled;  // bits of the weight it was made from

  bool operator==(const Signature&) const = default;
};

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

}  // namespace

const ConvTransposeKernel& kernel_for(const ConvTransposeParams& p) {
  if (p.is_winograd) {
    return active_conv_transpose_winograd_kernel();
  }
  if (p.is_adjoint || p.out_channels / p.groups > kFewOutputs) {
    return active_conv_transpose_kernel();
  }
  const bool is_depthwise = p.in_channels == p.groups && p.out_channels == p.groups;
  return is_depthwise && p.kernel[0] * p.kernel[1] * p.kernel[2] <= kMostDepthwiseTaps
             ? active_conv_transpose_depthwise_kernel()
             : active_conv_transpose_few_kernel();
}

Tensor pack_weight(const Tensor& weight, const ConvTransposeParams& p) {
  const ConvTransposeKernel& kernel = kernel_for(p);
  const Signature signature = {static_cast<int64_t>(cpu_level()), sample(p)};
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
  Signature signature;
  CHECK_CPU(packed);
  CHECK_DIM(packed, 1);
  STD_TORCH_CHECK(packed.scalar_type() == ScalarType::Byte && packed.is_contiguous(),
                  "expected packed to be what conv_transpose_pack gives");
  const int64_t bytes = kernel_for(p).packed_bytes(p);
  if (packed.size(0) != bytes + static_cast<int64_t>(sizeof(signature))) {
    return false;
  }
  std::memcpy(&signature, static_cast<const char*>(packed.const_data_ptr()) + bytes, sizeof(signature));
  return signature == Signature{static_cast<int64_t>(cpu_level()), sample(p)};
}

void run_kernel(const ConvTransposeParams& p, const Tensor& packed, double multiplications) {
  const ConvTransposeKernel& kernel = kernel_for(p);
  const int64_t threads = threads_for(multiplications), bytes = kernel.workspace(p, threads);
  const Tensor workspace = empty_on_cpu<2>({threads, bytes}, ScalarType::Byte);
  char* memory = static_cast<char*>(workspace.mutable_data_ptr());
  run_on_threads(threads, [&](int64_t thread) {
    kernel.run(p, packed.const_data_ptr(), memory + thread * bytes, thread, threads);
  });
}

}  // namespace gpt4fast::cpu
