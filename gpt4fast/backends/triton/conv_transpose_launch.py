"""Launches of the Triton kernels of transposed convolution: grids, arguments and tiles from the tensors of a call."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from . import conv_transpose_config as config
from . import tuning
from .device import capability_of, processors_of
from .replay import replayable


class Convolved(NamedTuple):
    """Statistics of each channel of the output, (3, channels, parts), as ``batch_norm_kernels`` has them, where they
    were asked for; and what launches the same kernel again for other tensors like these: source, weight, output, bias,
    scale, shift, parts."""

    parts: Tensor | None
    again: Callable[..., None]


def convolve(
    source: Tensor,
    weight: Tensor,
    output: Tensor,
    groups: int,
    adjoint: bool,
    up: Sequence[int],
    down: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    bias: Tensor | None = None,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    activation: str | None = None,
    negative_slope: float = 0.0,
    statistics: bool = False,
) -> Convolved:
    """Write (N, channels, *out) to ``output``, which is not empty: the transposed convolution of ``source``, or the
    adjoint."""
    from . import conv_transpose_kernels as kernels

    depthwise = is_depthwise(weight, groups)
    source, weight, output = lift(source), lift(weight), lift(output)
    channels = source.shape[1] // groups
    outputs = output.shape[1] // groups
    if depthwise:
        channels, outputs, groups = 1, output.shape[1], 1
        weight_strides = 0, 0, weight.stride(0)
    else:
        # A tile is fetched along channels: only there can Triton see that elements are neighbours.
        source, weight = channels_in_rows(source), channels_in_rows(weight)
        along = weight.stride()[:2]
        weight_strides = (weight.shape[0] // groups * along[0], *(reversed(along) if adjoint else along))
    kernel = weight.shape[2:]
    up, down, dilation = (_threefold(t, 1) for t in (up, down, dilation))
    padding = _threefold(padding, 0)
    steps = tuple(u // math.gcd(u, d) for u, d in zip(up, dilation, strict=True))
    inverses = tuple(
        pow(d // math.gcd(u, d), -1, step) for u, d, step in zip(up, dilation, steps, strict=True)
    )  # of 1 step 0
    places = tuple(config.ceil_div(n, u) for n, u in zip(output.shape[2:], up, strict=True))
    pixels, phases = output.shape[0] * math.prod(places), math.prod(up)
    channels_last = output.stride(1) == 1
    precision, tensor_cores = _precision(source.dtype)
    if depthwise:
        tile = config.depthwise_tile(pixels, outputs, channels_last)
    else:
        tile = config.convolution_tile(
            pixels, outputs, channels, phases * groups, source.element_size(), tensor_cores, capability_of(source),
            processors_of(source),
        )  # fmt: skip

    def launch(tile: dict[str, int]) -> Convolved:
        grid = config.ceil_div(pixels, tile["BLOCK_M"]) * phases, config.ceil_div(outputs, tile["BLOCK_N"]), groups
        parts = output.new_empty(3, output.shape[1], grid[0], dtype=torch.float32) if statistics else None
        numbers = (
            source.shape[0], channels, outputs, tuple(source.shape[2:]), tuple(output.shape[2:]), places,
            source.stride(), (*weight_strides, *weight.stride()[2:]), output.stride(), float(negative_slope),
            tuple(kernel), up, down, padding, dilation, steps, inverses, activation, depthwise, channels_last,
            precision, tile["BLOCK_M"], tile["BLOCK_N"], tile["BLOCK_K"],
        )  # fmt: skip
        again = replayable(
            kernels.convolution_kernel, grid, (source, weight, output, bias, scale, shift, parts), numbers, tile
        )
        return Convolved(parts, again)

    sizes = pixels.bit_length(), outputs.bit_length(), channels.bit_length(), groups.bit_length()
    features = tuple(kernel), up, down, dilation, depthwise, channels_last, statistics, precision, str(source.dtype)
    with torch.cuda.device_of(source):
        return launch(tuning.fastest("convolution", (*sizes, *features), tile, launch, source))


def weight_gradient(
    grad: Tensor,
    input: Tensor,
    weight: Tensor,
    stride: Sequence[int],
    padding: Sequence[int],
    groups: int,
    dilation: Sequence[int],
) -> Tensor:
    """(C, Cout / groups, *kernel), like ``weight``."""
    from . import conv_transpose_kernels as kernels

    if input.numel() == 0:
        return torch.zeros_like(weight)
    depthwise = is_depthwise(weight, groups)
    channels, outputs, groups = (1, groups, 1) if depthwise else (weight.shape[0] // groups, weight.shape[1], groups)
    input, grad = (lift(t) if depthwise else channels_in_rows(lift(t)) for t in (input, grad))
    kernel, taps = tuple(weight.shape[2:]), weight.shape[2:].numel()
    pixels = input.shape[0] * input.shape[2:].numel()
    channels_last = input.stride(1) == 1
    precision, tensor_cores = _precision(input.dtype)
    if depthwise:
        tile = config.depthwise_tile(pixels, outputs, channels_last)
    else:
        tile = config.weight_gradient_tile(
            channels, outputs, pixels, input.element_size(), tensor_cores, capability_of(input)
        )

    def launch(tile: dict[str, int]) -> Tensor:
        block = tile["BLOCK_M"] if depthwise else tile["BLOCK_K"]
        programs = config.ceil_div(channels, tile["BLOCK_M"]) * config.ceil_div(outputs, tile["BLOCK_N"]) * taps
        each = config.pixels_per_program(pixels, block, programs * groups, processors_of(input))
        shape = config.ceil_div(pixels, each), weight.shape[0], *kernel, weight.shape[1]
        parts = input.new_empty(shape, dtype=torch.float32)
        kernels.weight_gradient_kernel[programs, groups, len(parts)](
            input, grad, parts, pixels, each, channels, outputs, tuple(input.shape[2:]), tuple(grad.shape[2:]),
            input.stride(), grad.stride(), KERNEL=_threefold(kernel, 1), STRIDE=_threefold(stride, 1),
            PADDING=_threefold(padding, 0), DILATION=_threefold(dilation, 1), DEPTHWISE=depthwise,
            PRECISION=precision, **tile,
        )  # fmt: skip
        return parts[0] if len(parts) == 1 else parts.sum(0)

    sizes = pixels.bit_length(), outputs.bit_length(), channels.bit_length(), groups.bit_length()
    features = kernel, tuple(stride), tuple(dilation), depthwise, channels_last, precision, str(input.dtype)
    with torch.cuda.device_of(input):
        total = launch(tuning.fastest("weight_gradient", (*sizes, *features), tile, launch, input))
    return torch.empty_like(weight).copy_(total.movedim(-1, 1))


def is_depthwise(weight: Tensor, groups: int) -> bool:
    return weight.shape[0] == groups and weight.shape[1] == 1


def _threefold(values: Sequence[int], fill: int) -> tuple[int, ...]:
    return (*(fill,) * (3 - len(values)), *values)


def lift(tensor: Tensor) -> Tensor:
    """(N, C, *spatial) with leading spatial dimensions of size 1 up to three."""
    return tensor.view(*tensor.shape[:2], *_threefold(tensor.shape[2:], 1))


def channels_in_rows(tensor: Tensor) -> Tensor:
    """(N, C, D, H, W) with its channels side by side, as the kernels fetch them."""
    if tensor.stride(1) == 1 or tensor.shape[1] == 1:
        return tensor
    return tensor.contiguous(memory_format=torch.channels_last_3d)


def _precision(dtype: torch.dtype) -> tuple[str, bool]:
    """How products of float32 are rounded, as torch's convolutions do, and whether tensor cores compute them."""
    if dtype == torch.float32 and torch.backends.cudnn.conv.fp32_precision != "tf32":
        return "ieee", False
    return "tf32", True
