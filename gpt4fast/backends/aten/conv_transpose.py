"""Transposed convolution on torch's own kernels, followed by the epilogue. Shapes as in the reference."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from ..autograd import in_transform
from ..reference.conv_transpose import epilogue

# name -> activation(x, negative_slope) that writes to x. An output that nobody else has seen need not be copied again:
# fresh memory costs a page fault for every 4 KiB.
IN_PLACE = {
    "relu": lambda x, slope: torch.relu_(x),
    "leaky_relu": lambda x, slope: F.leaky_relu_(x, slope),
    "tanh": lambda x, slope: torch.tanh_(x),
    "sigmoid": lambda x, slope: torch.sigmoid_(x),
    "gelu": lambda x, slope: torch.ops.aten.gelu_(x),
    "silu": lambda x, slope: F.silu(x, inplace=True),
}
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
    # Torch's compiler and the runtimes that programs are exported to fuse the plain formula themselves.
    needs_grad = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (output, scale, shift))
    if needs_grad or torch.compiler.is_compiling() or in_transform():
        result = epilogue(output, scale, shift, activation, negative_slope)
        return result if result.dtype == output.dtype else result.to(output.dtype)
    shape = (-1, *(1,) * (output.dim() - 2))
    if scale is not None and shift is not None:
        scale, shift = scale.view(shape), shift.view(shape)
        if scale.dtype == shift.dtype == output.dtype:
            torch.addcmul(shift, output, scale, out=output)
        else:  # one rounding, as in torch's batch norm
            output.copy_(torch.addcmul(shift.float(), output, scale.float()))
    elif scale is not None:
        output.mul_(scale.view(shape))
    elif shift is not None:
        output.add_(shift.view(shape))
    return output if activation is None else IN_PLACE[activation](output, negative_slope)
