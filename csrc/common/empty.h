#pragma once

#include <array>
#include <cstdint>

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/stableivalue_conversions.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/Exception.h>

#include "error_code.h"

namespace gpt4fast {

// An uninitialised tensor whose memory holds the dimensions in the given order, the last one innermost. It takes 0.2
// us, where new_empty and transpose, which go through torch's dispatcher, take 0.7 us each.
template <size_t kDims>
torch::stable::Tensor empty_on(int32_t device_type, int32_t device_index, const std::array<int64_t, kDims>& sizes,
                               torch::headeronly::ScalarType dtype, const std::array<size_t, kDims>& order) {
  std::array<int64_t, kDims> strides;
  int64_t stride = 1;
  for (size_t i = kDims; i-- > 0;) {
    strides[order[i]] = stride;
    const int64_t size = sizes[order[i]] > 0 ? sizes[order[i]] : 1;
    STD_TORCH_CHECK(!__builtin_mul_overflow(stride, size, &stride), "a result has more than 2^63 elements");
  }
  AtenTensorHandle handle = nullptr;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(
      kDims, sizes.data(), strides.data(), torch::stable::detail::to<int32_t>(torch::stable::detail::from(dtype)),
      device_type, device_index, &handle));
  return torch::stable::Tensor(handle);
}

template <size_t kDims>
torch::stable::Tensor empty_on_cpu(const std::array<int64_t, kDims>& sizes, torch::headeronly::ScalarType dtype,
                                   const std::array<size_t, kDims>& order) {
  return empty_on(aoti_torch_device_type_cpu(), -1, sizes, dtype, order);
}

// On the device of `like`.
template <size_t kDims>
torch::stable::Tensor empty_beside(const torch::stable::Tensor& like, const std::array<int64_t, kDims>& sizes,
                                   torch::headeronly::ScalarType dtype, const std::array<size_t, kDims>& order) {
  int32_t type = 0, index = 0;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(like.get(), &type));
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_index(like.get(), &index));
  return empty_on(type, index, sizes, dtype, order);
}

// A contiguous one.
template <size_t kDims>
torch::stable::Tensor empty_on_cpu(const std::array<int64_t, kDims>& sizes, torch::headeronly::ScalarType dtype) {
  std::array<size_t, kDims> order;
  for (size_t i = 0; i < kDims; ++i) {
    order[i] = i;
  }
  return empty_on_cpu(sizes, dtype, order);
}

}  // namespace gpt4fast
