"""Batch norm with the batch's statistics and the activation behind it by Triton kernels, with its gradients.

Run on an H200 (benchmarks/LOG.md); tested by Triton's interpreter too, and compiled for sm_80, sm_90 and sm_100.
"""

from __future__ import annotations

import functools
import math

import torch
from torch import Tensor

from ..compiled.batch_norm import GpuKernels, gpu_batch_norm_activation
from . import batch_norm_config as config
from .availability import triton_refusal
from .conv_transpose_config import ceil_div, pixels_per_program, power_of_two
from .device import processors_of


def refusal(input: Tensor) -> str | None:
    """Why the kernels can't serve an input (N, C, *spatial), or None."""
    reason = triton_refusal(input)
    if reason is not None:
        return reason
    if max(math.prod(input.shape[1:]), input.numel() // max(1, input.shape[1])) >= 2**30:
        return "the Triton kernels count an image's elements and all images' pixels in 32 bits"
    return None


def _is_channels_last(tensor: Tensor) -> bool:
    return tensor.movedim(1, -1).is_contiguous()


@torch.library.custom_op("gpt4fast::triton_batch_statistics", mutates_args=())
def _statistics(input: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    from . import batch_norm_kernels as kernels

    input, channels, pixels, tile = _shape(input)
    each, grid = _parts(pixels, channels, tile, input)
    parts = input.new_empty(3, channels, grid[1], dtype=torch.float32)
    with torch.cuda.device_of(input):
        kernels.statistics_kernel[grid](
            input, parts, input.shape[2], pixels, each, channels, input.stride(), **tile
        )  # fmt: skip
    return merged_statistics(parts, eps)


def merged_statistics(parts: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """Mean, 1 / sqrt(variance + eps) and biased variance, (C,) each, from (3, C, parts): counts, means and spreads."""
    from . import batch_norm_kernels as kernels

    _, channels, number = parts.shape
    mean, rstd, variance = (parts.new_empty(channels) for _ in range(3))
    with torch.cuda.device_of(parts):
        kernels.combine_kernel[channels,](
            parts, mean, rstd, variance, number, eps, BLOCK=power_of_two(number, 16, 1024)
        )
    return mean, rstd, variance


@torch.library.custom_op("gpt4fast::triton_batch_norm_activation", mutates_args=())
def _apply(
    input: Tensor,
    mean: Tensor,
    rstd: Tensor,
    weight: Tensor,
    bias: Tensor,
    activation: str,
    negative_slope: float,
) -> Tensor:
    from . import batch_norm_kernels as kernels

    output = torch.empty_like(input)
    input, channels, pixels, tile = _shape(input)
    with torch.cuda.device_of(input):
        kernels.apply_kernel[_programs(pixels, channels, tile)](
            input, output, mean, rstd, weight, bias, input.shape[2], pixels, channels, input.stride(),
            float(negative_slope), ACTIVATION=activation, **tile,
        )  # fmt: skip
    return output


@torch.library.custom_op("gpt4fast::triton_batch_norm_activation_backward", mutates_args=())
def _backward(
    grad: Tensor,
    input: Tensor,
    weight: Tensor,
    bias: Tensor,
    mean: Tensor,
    rstd: Tensor,
    activation: str,
    negative_slope: float,
) -> tuple[Tensor, Tensor, Tensor]:
    from . import batch_norm_kernels as kernels

    output = torch.empty_like(input)
    input, channels, pixels, tile = _shape(input)
    each, grid = _parts(pixels, channels, tile, input)
    parts = weight.new_empty(2, channels, grid[1])
    channel_numbers = mean, rstd, weight, bias, input.shape[2], pixels
    with torch.cuda.device_of(input):
        kernels.gradient_sums_kernel[grid](
            grad, input, parts, *channel_numbers, each, channels, input.stride(), float(negative_slope),
            ACTIVATION=activation, **tile,
        )  # fmt: skip
        sums = parts.sum(2)
        kernels.input_gradient_kernel[_programs(pixels, channels, tile)](
            grad, input, output, sums, *channel_numbers, channels, input.stride(), float(negative_slope),
            ACTIVATION=activation, **tile,
        )  # fmt: skip
    return output, sums[1].clone(), sums[0].clone()


@_statistics.register_fake
def _(input, eps):
    return tuple(input.new_empty(input.shape[1], dtype=torch.float32) for _ in range(3))


@_apply.register_fake
def _(input, *_):
    return torch.empty_like(input)


@_backward.register_fake
def _(grad, input, weight, *_):
    return torch.empty_like(input), torch.empty_like(weight), torch.empty_like(weight)


def _shape(input: Tensor) -> tuple[Tensor, int, int, dict[str, int]]:
    """The input as (N, C, plane), its channels, the pixels of all images, and the kernels' tile."""
    channels, pixels = input.shape[1], input.numel() // input.shape[1]
    return input.flatten(2), channels, pixels, config.tile(pixels, channels, _is_channels_last(input))


def _parts(pixels: int, channels: int, tile: dict[str, int], input: Tensor) -> tuple[int, tuple[int, int]]:
    """Pixels of one part, and the grid: (channel tiles, parts)."""
    tiles = ceil_div(channels, tile["BLOCK_N"])
    each = pixels_per_program(pixels, tile["BLOCK_M"], tiles, processors_of(input))
    return each, (tiles, ceil_div(pixels, each))


def _programs(pixels: int, channels: int, tile: dict[str, int]) -> tuple[int]:
    return (ceil_div(pixels, tile["BLOCK_M"]) * ceil_div(channels, tile["BLOCK_N"]),)


batch_norm_activation = functools.partial(gpu_batch_norm_activation, GpuKernels(_statistics, _apply, _backward))
