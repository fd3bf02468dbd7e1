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

// The error function, within 3e-7: a rational function of degree 13 over 8 (as in XLA and Eigen), 1 from 4 on.
inline Vector erf(Vector x) {
  const Vector least = broadcast(-4.0f), clamped = Vector{} - maximum(Vector{} - maximum(x, least), least);
  const Vector square = clamped * clamped;
  Vector above = broadcast(-2.72614225801306e-10f);
  for (const float coefficient : {2.77068142495902e-08f, -2.10102402082508e-06f, -5.69250639462346e-05f,
                                  -7.34990630326855e-04f, -2.95459980854025e-03f, -1.60960333262415e-02f}) {
    above = multiply_add(above, square, broadcast(coefficient));
  }
  Vector below = broadcast(-1.45660718464996e-05f);
  for (const float coefficient :
       {-2.13374055278905e-04f, -1.68282697438203e-03f, -7.37332916720468e-03f, -1.42647390514189e-02f}) {
    below = multiply_add(below, square, broadcast(coefficient));
  }
  return clamped * above / below;
}

// The normal distribution's.
inline Vector cumulative(Vector x) {
  return multiply_add(erf(x * 0.707106781f), broadcast(0.5f), broadcast(0.5f));
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
    return x * cumulative(x);
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
    const Vector density = exp2<5>(maximum(x * x * -0.721347520f, broadcast(-126.0f))) * 0.398942280f;
    return cumulative(x) + x * density;
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
