#pragma once

#include <sstream>
#include <stdexcept>
#include <string>

#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

// Python checks arguments and explains; these checks only keep a direct torch.ops.gpt4fast.* call from crashing the
// process. Each names the argument, what it was and what was expected.

#define CHECK_CPU(TENSOR) STD_TORCH_CHECK((TENSOR).is_cpu(), "expected ", #TENSOR, " to be on the CPU")

#define CHECK_CUDA(TENSOR) STD_TORCH_CHECK((TENSOR).is_cuda(), "expected ", #TENSOR, " to be on a CUDA device")

#define CHECK_DIM(TENSOR, DIM)                                                                                         \
  STD_TORCH_CHECK((TENSOR).dim() == (DIM), "expected ", #TENSOR, " to have ", (DIM), " dimensions, but its shape is ", \
                  gpt4fast::shape_of(TENSOR))

#define CHECK_SIZE(TENSOR, AXIS, SIZE)                                                                             \
  STD_TORCH_CHECK((TENSOR).size(AXIS) == (SIZE), "expected ", #TENSOR, " to have size ", (SIZE), " in dimension ", \
                  (AXIS), ", but its shape is ", gpt4fast::shape_of(TENSOR))

#define CHECK_CONTIGUOUS(TENSOR) STD_TORCH_CHECK((TENSOR).is_contiguous(), "expected ", #TENSOR, " to be contiguous")

#define CHECK_DTYPE(TENSOR, DTYPE)                                                                              \
  STD_TORCH_CHECK((TENSOR).scalar_type() == (DTYPE), "expected ", #TENSOR, " to be ", gpt4fast::name_of(DTYPE), \
                  ", but its dtype is ", gpt4fast::name_of((TENSOR).scalar_type()))

namespace gpt4fast {

template <typename... Parts>
std::string message(const Parts&... parts) {
  std::ostringstream text;
  (text << ... << parts);
  return text.str();
}

inline std::string shape_of(const torch::stable::Tensor& tensor) {
  std::ostringstream text;
  text << '(';
  for (int64_t axis = 0; axis < tensor.dim(); ++axis) {
    text << (axis ? ", " : "") << tensor.size(axis);
  }
  text << ')';
  return text.str();
}

// The dtype as Python spells it.
inline const char* name_of(torch::headeronly::ScalarType dtype) {
  using torch::headeronly::ScalarType;
  switch (dtype) {
    case ScalarType::Float: return "float32";
    case ScalarType::Double: return "float64";
    case ScalarType::BFloat16: return "bfloat16";
    case ScalarType::Half: return "float16";
    case ScalarType::Bool: return "bool";
    case ScalarType::Byte: return "uint8";
    case ScalarType::Char: return "int8";
    case ScalarType::Short: return "int16";
    case ScalarType::Int: return "int32";
    case ScalarType::Long: return "int64";
    default: return torch::headeronly::toString(dtype);
  }
}

}  // namespace gpt4fast
