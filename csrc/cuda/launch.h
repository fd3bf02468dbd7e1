#pragma once

// Launching kernels, by nvcc for a GPU, or by g++ for the emulation of one (emulation/emulator.h).

#include <cstdint>

#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include "common/checks.h"
#include "common/error_code.h"

#if defined(__CUDACC__)

#include <array>
#include <atomic>
#include <mutex>
#include <set>
#include <utility>

#include <cuda_runtime.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>

#define GPT4FAST_CUDA_KEY CUDA

#else

#include "emulation/cuda_runtime.h"

#define GPT4FAST_CUDA_KEY CPU
#undef CHECK_CUDA
#define CHECK_CUDA(TENSOR) CHECK_CPU(TENSOR)

#endif

namespace gpt4fast {

constexpr int64_t ceil_div(int64_t a, int64_t b) {
  return (a + b - 1) / b;
}

// Shared memory that a block may have where a multiprocessor has least of it, at compute capability 8.6.
inline constexpr size_t kMostSharedBytes = 99 << 10;
// And on Hopper.
inline constexpr size_t kHopperSharedBytes = 227 << 10;

// The device of a tensor, made current, and torch's stream on it. Each operator makes one before it passes memory on.
class Device {
 public:
  explicit Device(const torch::stable::Tensor& tensor);

  // Multiprocessors, and the bytes of shared memory that each of them has.
  int processors() const { return processors_; }
  int shared_bytes() const { return shared_bytes_; }

  // Whether it runs what is compiled for sm_90a. The emulation does.
  bool is_hopper() const { return is_hopper_; }

  template <typename... Parameters, typename... Arguments>
  void launch(void (*kernel)(Parameters...), int64_t blocks, unsigned threads, size_t shared_bytes,
              const Arguments&... arguments) const;

  // A new tensor for kernels to write to: NaN in the emulation, so that what is not written shows.
  torch::stable::Tensor fresh(const torch::stable::Tensor& tensor) const;

 private:
  int processors_, shared_bytes_;
  bool is_hopper_;
#if defined(__CUDACC__)
  int32_t index_;
  torch::stable::accelerator::DeviceGuard guard_;
  cudaStream_t stream_;
#endif
};

// Kernels may read these bytes, or write them, too. The emulation keeps to it; compute-sanitizer knows by itself.
void allow_access(const void* data, int64_t bytes, bool writable);

#if defined(__CUDACC__)

// Asked once: a call to the driver at every launch takes the host as long as the launch.
template <cudaDeviceAttr kAttribute>
int attribute_of(int32_t device) {
  static std::array<std::atomic<int>, 64> known{};
  std::atomic<int>& kept = known.at(static_cast<size_t>(device));
  int number = kept;
  if (number == 0) {
    STD_CUDA_CHECK(cudaDeviceGetAttribute(&number, kAttribute, device));
    kept = number;
  }
  return number;
}

// Likewise: whether it is the first launch of a kernel on a device.
inline bool is_first_launch(const void* kernel, int32_t device) {
  static std::mutex mutex;
  static std::set<std::pair<const void*, int32_t>> known;
  const std::lock_guard<std::mutex> lock(mutex);
  return known.emplace(kernel, device).second;
}

inline Device::Device(const torch::stable::Tensor& tensor)
    : processors_(attribute_of<cudaDevAttrMultiProcessorCount>(tensor.get_device_index())),
      shared_bytes_(attribute_of<cudaDevAttrMaxSharedMemoryPerMultiprocessor>(tensor.get_device_index())),
      is_hopper_(attribute_of<cudaDevAttrComputeCapabilityMajor>(tensor.get_device_index()) == 9),
      index_(tensor.get_device_index()),
      guard_(tensor.get_device_index()) {
  void* stream = nullptr;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(index_, &stream));
  stream_ = static_cast<cudaStream_t>(stream);
}

template <typename... Parameters, typename... Arguments>
void Device::launch(void (*kernel)(Parameters...), int64_t blocks, unsigned threads, size_t shared_bytes,
                    const Arguments&... arguments) const {
  STD_TORCH_CHECK(blocks <= INT32_MAX, "expected at most ", INT32_MAX, " blocks, but the tensors take ", blocks);
  if (shared_bytes > (48 << 10) && is_first_launch(reinterpret_cast<const void*>(kernel), index_)) {
    STD_CUDA_CHECK(
        cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(shared_bytes)));
  }
  kernel<<<static_cast<unsigned>(blocks), threads, shared_bytes, stream_>>>(arguments...);
  STD_CUDA_KERNEL_LAUNCH_CHECK();
}

inline torch::stable::Tensor Device::fresh(const torch::stable::Tensor& tensor) const {
  return tensor;
}

inline void allow_access(const void*, int64_t, bool) {}

template <typename Shared>
__device__ __forceinline__ Shared& shared_memory() {
  extern __shared__ __align__(1024) unsigned char dynamic_shared_memory[];
  return *reinterpret_cast<Shared*>(dynamic_shared_memory);
}

#else

inline Device::Device(const torch::stable::Tensor&) : processors_(4), shared_bytes_(228 << 10), is_hopper_(true) {
  emulation::forget_accesses();
}

template <typename... Parameters, typename... Arguments>
void Device::launch(void (*kernel)(Parameters...), int64_t blocks, unsigned threads, size_t shared_bytes,
                    const Arguments&... arguments) const {
  // Not checked: the arguments lie on the stack of the host.
  const auto call = [&]() __attribute__((no_sanitize("kernel-address"))) { kernel(arguments...); };
  emulation::run(
      static_cast<unsigned>(blocks), threads, shared_bytes,
      [](const void* data)
          __attribute__((no_sanitize("kernel-address"))) { (*static_cast<const decltype(call)*>(data))(); },
      &call);
}

inline torch::stable::Tensor Device::fresh(const torch::stable::Tensor& tensor) const {
  const auto bytes = static_cast<size_t>(tensor.numel()) * tensor.element_size();
  std::fill_n(static_cast<unsigned char*>(tensor.mutable_data_ptr()), bytes, 0xFF);
  emulation::allow_access(tensor.const_data_ptr(), bytes, true);
  return tensor;
}

inline void allow_access(const void* data, int64_t bytes, bool writable) {
  emulation::allow_access(data, static_cast<size_t>(bytes), writable);
}

template <typename Shared>
Shared& shared_memory() {
  return *static_cast<Shared*>(emulation::dynamic_shared_memory());
}

#endif

// Bytes from the first element of a tensor to behind its last one.
inline int64_t extent_of(const torch::stable::Tensor& tensor) {
  int64_t elements = 1;
  for (int64_t axis = 0; axis < tensor.dim(); ++axis) {
    if (tensor.size(axis) == 0) {
      return 0;
    }
    elements += (tensor.size(axis) - 1) * tensor.stride(axis);
  }
  return elements * static_cast<int64_t>(tensor.element_size());
}

inline void allow_access(const torch::stable::Tensor& tensor, bool writable) {
  allow_access(tensor.const_data_ptr(), extent_of(tensor), writable);
}

// Whether each row of a tensor (., ., ., D) is whole 16 bytes, at a multiple of 16.
inline bool has_wide_rows(const torch::stable::Tensor& tensor) {
  const auto size = static_cast<int64_t>(tensor.element_size());
  bool wide = tensor.stride(3) == 1 && tensor.size(3) * size % 16 == 0 &&
              reinterpret_cast<uintptr_t>(tensor.const_data_ptr()) % 16 == 0;
  for (int axis = 0; axis < 3; ++axis) {
    wide = wide && tensor.stride(axis) * size % 16 == 0;
  }
  return wide;
}

}  // namespace gpt4fast
