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
