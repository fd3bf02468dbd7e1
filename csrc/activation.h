#pragma once

namespace gpt4fast {

enum class Activation { none, relu, leaky_relu, tanh, sigmoid, gelu, silu };

}  // namespace gpt4fast
