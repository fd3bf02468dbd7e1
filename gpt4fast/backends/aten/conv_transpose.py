"""Transposed convolution on torch's own kernels, followed by the epilogue. Shapes as in the reference."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from ..autograd import in_transform
from ..reference.conv_transpose import epilogue, memory_format

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
    if is_matrix_product(input, weight, padding, output_padding, groups, dilation):
        output = _multiply_pixels(input, weight, bias, padding, output_padding)
    else:
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


def is_matrix_product(
    input: Tensor,
    weight: Tensor,
    padding: tuple[int, ...],
    output_padding: tuple[int, ...],
    groups: int,
    dilation: tuple[int, ...],
) -> bool:
    """Whether the images are single pixels, as those that generators begin with: each meets every number of the kernel
    once. The product takes a quarter to a half of the time of torch's convolution, with its gradients too (CPU)."""
    return (
        input.is_cpu
        and not (torch.compiler.is_compiling() or in_transform())  # to ask for a size would pin it
        and input.shape[2:].numel() == 1
        and groups == 1
        and max(dilation) == 1
        and all(more <= cut for more, cut in zip(output_padding, padding, strict=True))
        and memory_format(input, weight) == torch.contiguous_format
        and _parts(input) is not None
    )


def _parts(input: Tensor) -> int | None:
    """In how many equal parts the channels are summed, or None if there is no good number of them. A product in float32
    adds its terms one after another: over 100 channels it errs twice as much as torch's convolution, in two parts 1.4
    times."""
    channels = input.shape[1]
    if input.dtype != torch.float32:
        return 1
    least = max(2, -(-channels // 128))
    return next((parts for parts in range(least, least + 4) if channels % parts == 0), None)


def _multiply_pixels(input: Tensor, weight: Tensor, bias: Tensor | None, padding, output_padding) -> Tensor:
    """(N, Cout, *out), where out is what padding leaves of the kernel."""
    for dim, (cut, more) in enumerate(zip(padding, output_padding, strict=True), start=2):
        weight = weight.narrow(dim, cut, weight.shape[dim] - 2 * cut + more)
    parts, (batch, channels), sizes = _parts(input), input.shape[:2], weight.shape[1:]
    pixels = input.reshape(batch, parts, channels // parts).transpose(0, 1)
    products = torch.bmm(pixels, weight.reshape(parts, channels // parts, sizes.numel()))
    output = (products[0] if parts == 1 else products.sum(0)).view(batch, *sizes)
    return output if bias is None else output + bias.view(-1, *(1,) * (len(sizes) - 1))
