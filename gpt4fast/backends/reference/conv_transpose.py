"""Transposed convolution in plain PyTorch: the definition that every other implementation is tested against.

Shapes, throughout: input (N, C, *spatial) with 1 to 3 spatial dimensions, weight (C, Cout / groups, *kernel).
"""

from __future__ import annotations

import itertools

import torch
from torch import Tensor
from torch.nn import functional as F

# name -> activation(x, negative_slope)
ACTIVATIONS = {
    "relu": lambda x, slope: F.relu(x),
    "leaky_relu": lambda x, slope: F.leaky_relu(x, slope),
    "tanh": lambda x, slope: torch.tanh(x),
    "sigmoid": lambda x, slope: torch.sigmoid(x),
    "gelu": lambda x, slope: F.gelu(x),
    "silu": lambda x, slope: F.silu(x),
}


def output_sizes(
    sizes: tuple[int, ...],
    kernel: tuple[int, ...],
    stride: tuple[int, ...],
    padding: tuple[int, ...],
    output_padding: tuple[int, ...],
    dilation: tuple[int, ...],
) -> tuple[int, ...]:
    """The spatial size of the output, as torch defines it."""
    return tuple(
        (n - 1) * s - 2 * p + d * (k - 1) + o + 1
        for n, k, s, p, o, d in zip(sizes, kernel, stride, padding, output_padding, dilation, strict=True)
    )


def memory_format(input: Tensor, weight: Tensor) -> torch.memory_format:
    """Torch's rule for the output's layout: channels-last when input or weight is.

    (Torch's slow 3-D kernel, which serves float16, float64 and small float32 inputs on a CPU, ignores the rule.)
    """
    last = {4: torch.channels_last, 5: torch.channels_last_3d}.get(input.dim())
    if last is not None and any(_is_channels_last(t, last) for t in (input, weight)):
        return last
    return torch.contiguous_format


def _is_channels_last(tensor: Tensor, last: torch.memory_format) -> bool:
    return tensor.is_contiguous(memory_format=last) and not tensor.is_contiguous()


def epilogue(
    output: Tensor, scale: Tensor | None, shift: Tensor | None, activation: str | None, negative_slope: float
) -> Tensor:
    """``activation(scale * output + shift)``, scale and shift (Cout,) along dimension 1."""
    shape = (-1, *(1,) * (output.dim() - 2))
    if scale is not None:
        # Channels last in the product: torch 2.13's inductor, with freezing, folds output * scale.view(shape) into the
        # wrong axis of a transposed convolution's weight.
        last = output.dim() - 1  # as a positive number, for torch's older ONNX exporter
        output = (output.movedim(1, last) * scale).movedim(last, 1)
    if shift is not None:
        output = output + shift.view(shape)
    return output if activation is None else ACTIVATIONS[activation](output, negative_slope)


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
    """(N, Cout, *out): every input element adds its kernel-sized patch to the output. Half types in float32 inside."""
    dtype, layout = input.dtype, memory_format(input, weight)
    kernel = weight.shape[2:]
    sizes = output_sizes(input.shape[2:], kernel, stride, padding, output_padding, dilation)
    if dtype in (torch.float16, torch.bfloat16):
        input, weight, bias, scale, shift = (
            None if t is None else t.float() for t in (input, weight, bias, scale, shift)
        )
    grouped_input = input.unflatten(1, (groups, -1))  # (N, groups, C / groups, *spatial)
    grouped_weight = weight.unflatten(0, (groups, -1))  # (groups, C / groups, Cout / groups, *kernel)

    # The whole overlap-added canvas; padding then cuts a margin off, and output_padding leaves more of its end.
    channels = weight.shape[1] * groups
    canvas = input.new_zeros(input.shape[0], channels, *(n + 2 * p for n, p in zip(sizes, padding, strict=True)))
    for tap in itertools.product(*(range(k) for k in kernel)):
        patch = torch.einsum("ngc...,gco->ngo...", grouped_input, grouped_weight[(..., *tap)]).flatten(1, 2)
        places = tuple(
            slice(t * d, t * d + (n - 1) * s + 1, s)
            for t, d, n, s in zip(tap, dilation, input.shape[2:], stride, strict=True)
        )
        canvas[(..., *places)] += patch
    output = canvas[(..., *(slice(p, p + n) for n, p in zip(sizes, padding, strict=True)))]
    if bias is not None:
        output = output + bias.view(-1, *(1,) * len(kernel))
    output = epilogue(output, scale, shift, activation, negative_slope)
    return output.to(dtype).contiguous(memory_format=layout)
