#pragma once

#include <initializer_list>

#include "../activation.h"
#include "simd/simd.h"

namespace gpt4fast::cpu::GPT4FAST_LEVEL {

inline Vector sigmoid(Vector x) {
  // Below -126 the power would be below the smallest normal number.
  const Vector power = exp2<5>(maximum(x * -1.442695041f, broadcast(-126.0f)));
  return broadcast(1.0f) / (broadcast(1.0f) + power);
}

// Half of erfc(size) for size >= 0. Relative error 1.2e-7 (Press et al., "Numerical Recipes in C", 1992, erfcc).
inline Vector half_erfc(Vector size) {
  const Vector t = broadcast(1.0f) / multiply_add(size, broadcast(0.5f), broadcast(1.0f));
  Vector series = multiply_add(t, broadcast(0.17087277f), broadcast(-0.82215223f));
  for (const float coefficient :
       {1.48851587f, -1.13520398f, 0.27886807f, -0.18628806f, 0.09678418f, 0.37409196f, 1.00002368f, -1.26551223f}) {
    series = multiply_add(series, t, broadcast(coefficient));
  }
  const Vector exponent = (series - size * size) * 1.442695041f;
  return t * exp2<5>(maximum(exponent, broadcast(-126.0f))) * 0.5f;
}

// Formulas as in common/activation.h, a few units in the last place off. NaN passes through all of them.
template <Activation kActivation>
inline Vector activate(Vector x, float negative_slope) {
  if constexpr (kActivation == Activation::relu) {
    return maximum(x, Vector{});
  } else if constexpr (kActivation == Activation::leaky_relu) {
    return select(greater(x, Vector{}), x, x * negative_slope);
  } else if constexpr (kActivation == Activation::tanh) {
    return tanh(x);
  } else if constexpr (kActivation == Activation::sigmoid) {
    return sigmoid(x);
  } else if constexpr (kActivation == Activation::silu) {
    return x * sigmoid(x);
  } else if constexpr (kActivation == Activation::gelu) {
    const Vector size = maximum(x, Vector{} - x) * 0.707106781f;
    const Vector tail = half_erfc(size);
    return x * select(greater(x, Vector{}), broadcast(1.0f) - tail, tail);
  } else {
    return x;
  }
}

// Its derivative.
template <Activation kActivation>
inline Vector activation_slope(Vector x, float negative_slope) {
  const Vector one = broadcast(1.0f);
  if constexpr (kActivation == Activation::relu) {
    return select(greater(x, Vector{}), one, Vector{});
  } else if constexpr (kActivation == Activation::leaky_relu) {
    return select(greater(x, Vector{}), one, broadcast(negative_slope));
  } else if constexpr (kActivation == Activation::tanh) {
    const Vector y = tanh(x);
    return one - y * y;
  } else if constexpr (kActivation == Activation::sigmoid) {
    const Vector y = sigmoid(x);
    return y * (one - y);
  } else if constexpr (kActivation == Activation::silu) {
    const Vector y = sigmoid(x);
    return y * (one + x * (one - y));
  } else if constexpr (kActivation == Activation::gelu) {
    const Vector tail = half_erfc(maximum(x, Vector{} - x) * 0.707106781f);
    const Vector density = exp2<5>(maximum(x * x * -0.721347520f, broadcast(-126.0f))) * 0.398942280f;
    return select(greater(x, Vector{}), one - tail, tail) + x * density;
  } else {
    return one;
  }
}

// Calls use with a constant for the activation, so that loops are compiled without branches.
template <template <Activation> typename Function, typename Use>
inline void with_function(Activation activation, Use use) {
  switch (activation) {
    case Activation::relu: return use(Function<Activation::relu>());
    case Activation::leaky_relu: return use(Function<Activation::leaky_relu>());
    case Activation::tanh: return use(Function<Activation::tanh>());
    case Activation::sigmoid: return use(Function<Activation::sigmoid>());
    case Activation::gelu: return use(Function<Activation::gelu>());
    case Activation::silu: return use(Function<Activation::silu>());
    default: return use(Function<Activation::none>());
  }
}

template <Activation kActivation>
struct ActivationFunction {
  Vector operator()(Vector x, float negative_slope) const { return activate<kActivation>(x, negative_slope); }
};

template <Activation kActivation>
struct ActivationSlope {
  Vector operator()(Vector x, float negative_slope) const { return activation_slope<kActivation>(x, negative_slope); }
};

template <typename Use>
inline void with_activation(Activation activation, Use use) {
  with_function<ActivationFunction>(activation, use);
}

template <typename Use>
inline void with_activation_slope(Activation activation, Use use) {
  with_function<ActivationSlope>(activation, use);
}

}  // namespace gpt4fast::cpu::GPT4FAST_LEVEL
