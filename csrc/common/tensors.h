#pragma once

// What kernels are told about a tensor, once it is known to be one they can take.

#include <cstdint>
#include <sstream>

#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include "../element_type.h"
#include "checks.h"

namespace gpt4fast {

inline ElementType element_type_of(const torch::stable::Tensor& tensor, const char* name) {
  using torch::headeronly::ScalarType;
  switch (tensor.scalar_type()) {
    case ScalarType::Float: return ElementType::float32;
    case ScalarType::BFloat16: return ElementType::bfloat16;
    case ScalarType::Half: return ElementType::float16;
    case ScalarType::Char: return ElementType::int8;
    default:
      STD_TORCH_CHECK(false, "expected ", name, " to be float32, bfloat16 or float16, but its dtype is ",
                      name_of(tensor.scalar_type()));
  }
}

template <size_t kCount>
void copy_strides(const torch::stable::Tensor& tensor, int64_t (&strides)[kCount]) {
  for (size_t axis = 0; axis < kCount; ++axis) {
    strides[axis] = tensor.stride(static_cast<int64_t>(axis));
  }
}

// Shape, dtype, and that it is where `beside` is.
inline void check_tensor(const torch::stable::Tensor& tensor, const char* name, std::initializer_list<int64_t> shape,
                         torch::headeronly::ScalarType dtype, const torch::stable::Tensor& beside) {
  bool fits = tensor.dim() == static_cast<int64_t>(shape.size());
  int64_t axis = 0;
  for (const int64_t size : shape) {
    fits = fits && tensor.size(axis++) == size;
  }
  if (!fits) {
    std::ostringstream expected;
    for (const int64_t size : shape) {
      expected << (expected.tellp() > 0 ? ", " : "") << size;
    }
    STD_TORCH_CHECK(false, "expected ", name, " to have shape (", expected.str(), "), but its shape is ",
                    shape_of(tensor));
  }
  STD_TORCH_CHECK(tensor.device() == beside.device(), "expected ", name, " to be on the device of the first argument");
  STD_TORCH_CHECK(tensor.scalar_type() == dtype, "expected ", name, " to be ", name_of(dtype), ", but its dtype is ",
                  name_of(tensor.scalar_type()));
}

// A float32 vector on the CPU, (size), contiguous.
inline void check_vector(const torch::stable::Tensor& vector, const char* name, int64_t size) {
  STD_TORCH_CHECK(vector.is_cpu() && vector.scalar_type() == torch::headeronly::ScalarType::Float &&
                      vector.dim() == 1 && vector.size(0) == size && vector.is_contiguous(),
                  "expected ", name, " to be a contiguous float32 tensor of shape (", size,
                  ") on the CPU, but its shape is ", shape_of(vector), " and its dtype ",
                  name_of(vector.scalar_type()));
}

}  // namespace gpt4fast
