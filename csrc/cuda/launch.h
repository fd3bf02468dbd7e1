#pragma once

#include <cstdint>

#include <cuda_runtime.h>

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/tensor.h>

#include "common/checks.h"
#include "common/error_code.h"

namespace gpt4fast {

// The stream that torch works on now, on the tensor's device. Make that device current first (DeviceGuard).
inline cudaStream_t current_stream(const torch::stable::Tensor& tensor) {
  void* stream = nullptr;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(tensor.get_device_index(), &stream));
  return static_cast<cudaStream_t>(stream);
}

// The number of blocks of `block_size` threads that cover `count` threads.
inline unsigned blocks_for(int64_t count, int64_t block_size) {
  const int64_t blocks = (count + block_size - 1) / block_size;
  STD_TORCH_CHECK(blocks <= INT32_MAX, "expected at most ", INT32_MAX, " blocks, but the tensor takes ", blocks);
  return static_cast<unsigned>(blocks);
}

}  // namespace gpt4fast
