#pragma once

#include <cmath>
#include <string>

#include "../activation.h"
#include "checks.h"
#include "host_device.h"

namespace gpt4fast {

// One formula for every host and device kernel, in float32. NaN passes through all of them, as in torch.
template <Activation kActivation>
GPT4FAST_HOST_DEVICE float activate(float x, float negative_slope) {
  if constexpr (kActivation == Activation::relu) {
    return x <= 0.0f ? 0.0f : x;
  } else if constexpr (kActivation == Activation::leaky_relu) {
    return x > 0.0f ? x : x * negative_slope;
  } else if constexpr (kActivation == Activation::tanh) {
    return ::tanhf(x);
  } else if constexpr (kActivation == Activation::sigmoid) {
    return 1.0f / (1.0f + ::expf(-x));
  } else if constexpr (kActivation == Activation::gelu) {
    constexpr float kSqrtHalf = 0.70710678118654752440f;
    return 0.5f * x * (1.0f + ::erff(x * kSqrtHalf));
  } else if constexpr (kActivation == Activation::silu) {
    return x / (1.0f + ::expf(-x));
  } else {
    return x;
  }
}

// `grad` times the derivative of `activate` at x; at a kink torch's choice, the left one.
template <Activation kActivation>
GPT4FAST_HOST_DEVICE float activation_gradient(float grad, float x, float negative_slope) {
  if constexpr (kActivation == Activation::relu) {
    return x <= 0.0f ? 0.0f : grad;
  } else if constexpr (kActivation == Activation::leaky_relu) {
    return x > 0.0f ? grad : grad * negative_slope;
  } else if constexpr (kActivation == Activation::tanh) {
    const float y = ::tanhf(x);
    return grad * (1.0f - y * y);
  } else if constexpr (kActivation == Activation::sigmoid) {
    const float y = 1.0f / (1.0f + ::expf(-x));
    return grad * y * (1.0f - y);
  } else if constexpr (kActivation == Activation::gelu) {
    constexpr float kSqrtHalf = 0.70710678118654752440f, kDensity = 0.39894228040143267794f;
    return grad * (0.5f * (1.0f + ::erff(x * kSqrtHalf)) + x * kDensity * ::expf(-0.5f * x * x));
  } else if constexpr (kActivation == Activation::silu) {
    const float y = 1.0f / (1.0f + ::expf(-x));
    return grad * y * (1.0f + x * (1.0f - y));
  } else {
    return grad;
  }
}

inline Activation parse_activation(const std::string& name) {
  constexpr const char* kNames[] = {"none", "relu", "leaky_relu", "tanh", "sigmoid", "gelu", "silu"};
  for (int index = 0; index < 7; ++index) {
    if (name == kNames[index]) {
      return static_cast<Activation>(index);
    }
  }
  throw std::runtime_error(message(
      "expected activation to be one of none, relu, leaky_relu, tanh, sigmoid, gelu, silu, but it is '", name, "'"));
}

}  // namespace gpt4fast

// Calls the lambda with the constant NAME set to the activation: see BOOL_SWITCH in dtypes.h.
#define ACTIVATION_CASE(ACTIVATION, NAME, ...)                              \
  case gpt4fast::Activation::ACTIVATION: {                                  \
    constexpr gpt4fast::Activation NAME = gpt4fast::Activation::ACTIVATION; \
    return __VA_ARGS__();                                                   \
  }

#define ACTIVATION_SWITCH(VALUE, NAME, ...)                               \
  [&] {                                                                   \
    switch (VALUE) {                                                      \
      ACTIVATION_CASE(relu, NAME, __VA_ARGS__)                            \
      ACTIVATION_CASE(leaky_relu, NAME, __VA_ARGS__)                      \
      ACTIVATION_CASE(tanh, NAME, __VA_ARGS__)                            \
      ACTIVATION_CASE(sigmoid, NAME, __VA_ARGS__)                         \
      ACTIVATION_CASE(gelu, NAME, __VA_ARGS__)                            \
      ACTIVATION_CASE(silu, NAME, __VA_ARGS__)                            \
      default: {                                                          \
        constexpr gpt4fast::Activation NAME = gpt4fast::Activation::none; \
        return __VA_ARGS__();                                             \
      }                                                                   \
    }                                                                     \
  }()
