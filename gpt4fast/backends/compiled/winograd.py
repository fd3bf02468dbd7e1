"""Where Winograd's algorithm is faster than the products themselves, by measurements (benchmarks/LOG.md)."""

from __future__ import annotations

import torch
from torch import Tensor


def winograd_wins(input: Tensor, weight: Tensor, stride, groups: int, dilation, kept: bool) -> bool:
    """Whether Winograd's algorithm is faster than the products themselves: 1.1 to 1.2 times in one dimension, 1.1 to
    1.5 in two and three (benchmarks/LOG.md).

    Its weights take long to bring into order, and twice to thrice the memory to read: there must be enough pixels for
    them. In bfloat16 the sums and differences would be too coarse.
    """
    dims = len(stride)
    channels = input.shape[1]
    tiles = input.numel() // max(1, channels) >> dims
    if tiles < (32 if kept else 256) or input.dtype == torch.bfloat16:
        return False
    return channels >= 32 * groups and weight.shape[1] >= 16 and _has_winograd_kernel(weight, stride, dilation)


def winograd_wins_backward(coarse: torch.Size, weight: Tensor, stride, groups: int, dilation) -> bool:
    """Whether it is faster for the adjoint, a convolution that gives images (N, C, *spatial) of this shape: 1.07 to 1.4
    times in one and two dimensions, 1.0 in three."""
    tiles = coarse[0] * coarse[2:].numel() >> len(stride)
    if tiles < 256 or len(stride) > 2 or weight.dtype == torch.bfloat16:
        return False
    return coarse[1] >= 16 * groups and weight.shape[1] >= 32 and _has_winograd_kernel(weight, stride, dilation)


def _has_winograd_kernel(weight: Tensor, stride, dilation) -> bool:
    kernel = weight.shape[2:]
    twice = all(k == 2 * s and s > 1 and d == 1 for k, s, d in zip(kernel, stride, dilation, strict=True))
    return twice and kernel.numel() <= 64
