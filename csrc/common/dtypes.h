#pragma once

#include <cstdint>

#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Exception.h>
#include <torch/headeronly/util/Half.h>

#include "checks.h"

// Turn a run-time value into a compile-time one, so that a kernel is a template without branches inside its loops:
//
//   DTYPE_SWITCH(input.scalar_type(), "input", scalar_t, [&] {
//     BOOL_SWITCH(is_causal, kIsCausal, [&] { run<scalar_t, kIsCausal>(params); });
//   });
//
// instantiates run<> for three dtypes x two flags and calls the one that the arguments ask for.

#define BOOL_SWITCH(CONDITION, NAME, ...) \
  [&] {                                   \
    if (CONDITION) {                      \
      constexpr bool NAME = true;         \
      return __VA_ARGS__();               \
    } else {                              \
      constexpr bool NAME = false;        \
      return __VA_ARGS__();               \
    }                                     \
  }()

// float32, bfloat16 and float16 are what the native kernels compute; float64 runs in the reference backend.
#define DTYPE_SWITCH(DTYPE, ARGUMENT, NAME, ...)                                                             \
  [&] {                                                                                                      \
    const auto switch_dtype = (DTYPE);                                                                       \
    switch (switch_dtype) {                                                                                  \
      case torch::headeronly::ScalarType::Float: {                                                           \
        using NAME = float;                                                                                  \
        return __VA_ARGS__();                                                                                \
      }                                                                                                      \
      case torch::headeronly::ScalarType::BFloat16: {                                                        \
        using NAME = torch::headeronly::BFloat16;                                                            \
        return __VA_ARGS__();                                                                                \
      }                                                                                                      \
      case torch::headeronly::ScalarType::Half: {                                                            \
        using NAME = torch::headeronly::Half;                                                                \
        return __VA_ARGS__();                                                                                \
      }                                                                                                      \
      default:                                                                                               \
        throw std::runtime_error(gpt4fast::message("expected ", ARGUMENT,                                    \
                                                   " to be float32, bfloat16 or float16, but its dtype is ", \
                                                   gpt4fast::name_of(switch_dtype)));                        \
    }                                                                                                        \
  }()

namespace gpt4fast {

inline bool is_native_dtype(torch::headeronly::ScalarType dtype) {
  using torch::headeronly::ScalarType;
  return dtype == ScalarType::Float || dtype == ScalarType::BFloat16 || dtype == ScalarType::Half;
}

}  // namespace gpt4fast
