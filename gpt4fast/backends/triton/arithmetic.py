"""What the Triton kernels have in common."""

from __future__ import annotations

import triton
import triton.language as tl
from triton import knobs

LOG2E = tl.constexpr(1.4426950408889634)

# The interpreter keeps bfloat16 as integers, and its product would multiply those.
WIDEN = tl.constexpr(knobs.runtime.interpret)


@triton.jit
def tanh(x):
    far = 1 - 2 / (1 + tl.exp2(x * (2 * LOG2E)))
    # Near zero 1 - 2 / 2 would cancel: the series of tanh(x) / x.
    s = x * x
    near = 1 + s * (-1 / 3 + s * (2 / 15 + s * (-17 / 315 + s * (62 / 2835))))
    return tl.where(s < 0.0625, x * near, far)


@triton.jit
def activate(x, slope, ACTIVATION: tl.constexpr):
    """The formulas of csrc/common/activation.h; NaN passes through all of them."""
    if ACTIVATION == "relu":
        x = tl.where(x <= 0, 0.0, x)
    elif ACTIVATION == "leaky_relu":
        x = tl.where(x > 0, x, x * slope)
    elif ACTIVATION == "tanh":
        x = tanh(x)
    elif ACTIVATION == "sigmoid":
        x = 1 / (1 + tl.exp(-x))
    elif ACTIVATION == "gelu":
        x = 0.5 * x * (1 + tl.erf(x * 0.70710678118654752))
    elif ACTIVATION == "silu":
        x = x / (1 + tl.exp(-x))
    return x


@triton.jit
def activation_gradient(grad, x, slope, ACTIVATION: tl.constexpr):
    """``grad`` times the derivative of ``activate`` at ``x``; at a kink torch's choice, the left one."""
    if ACTIVATION == "relu":
        grad = tl.where(x <= 0, 0.0, grad)
    elif ACTIVATION == "leaky_relu":
        grad = tl.where(x > 0, grad, grad * slope)
    elif ACTIVATION == "tanh":
        y = tanh(x)
        grad *= 1 - y * y
    elif ACTIVATION == "sigmoid":
        y = 1 / (1 + tl.exp(-x))
        grad *= y * (1 - y)
    elif ACTIVATION == "gelu":
        density = 0.39894228040143268 * tl.exp(-0.5 * x * x)
        grad *= 0.5 * (1 + tl.erf(x * 0.70710678118654752)) + x * density
    elif ACTIVATION == "silu":
        y = 1 / (1 + tl.exp(-x))
        grad *= y * (1 + x * (1 - y))
    return grad
