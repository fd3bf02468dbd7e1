"""Transposed convolution on torch's own kernels, followed by the epilogue. Shapes as in the reference."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F

from ..reference.conv_transpose import epilogue

FUNCTIONS = {1: F.conv_transpose1d, 2: F.conv_transpose2d, 3: F.conv_transpose3d}


def conv_transpose(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: tuple[int, ...],
    padding: tuple[int, ...],
    output_padding: tuple[int, ...],
    groups: int,
    dilation: tuple[int, ...],
    scale: Tensor | None,
    shift: Tensor | None,
    activation: str | None,
    negative_slope: float,
) -> Tensor:
    """(N, Cout, *out)."""
    convolve = FUNCTIONS[input.dim() - 2]
    output = convolve(input, weight, bias, stride, padding, output_padding, groups, dilation)
    return epilogue(output, scale, shift, activation, negative_slope)
