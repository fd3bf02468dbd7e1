"""Triton kernels of batch norm with the batch's statistics and the activation behind it, forward and backward.

Three passes over memory forward (the statistics read the input, the last pass reads it and writes), two where a
transposed convolution's epilogue has taken the statistics; five backward. Sums are partial, one for each program, and
added up in a fixed order: no atomics, the same bits each time.

Statistics are counts, means and sums of squared deviations from them ("spreads"), which unlike sums of squares do not
cancel out far from zero.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .arithmetic import activate, activation_gradient


@triton.jit
def merge(count, mean, spread):
    """The statistics of all numbers from those of groups of them, along the first axis (Chan, Golub and LeVeque,
    1983)."""
    total = tl.sum(count, 0)
    weight = 1 / tl.maximum(total, 1.0)
    center = tl.sum(count * mean, 0) * weight
    deviation = mean - center
    # Far from zero the first sum has lost digits that the sum of the deviations still has.
    rest = tl.sum(count * deviation, 0) * weight
    return total, center + rest, tl.sum(spread + count * deviation * deviation, 0) - total * rest * rest


@triton.jit
def places(pixel, channel, plane, strides):
    """Where these pixels, counted through all images, and channels of (N, C, plane) lie."""
    at_pixel = (pixel // plane).to(tl.int64) * strides[0] + (pixel % plane) * strides[2]
    return at_pixel[:, None] + channel[None, :] * strides[1]


@triton.jit
def statistics_kernel(
    input,  # (N, C, plane)
    parts,  # (3, C, number of parts), float32: counts, means and spreads
    plane,
    pixels,  # N * plane
    pixels_per_program,  # a multiple of BLOCK_M
    channels,
    strides,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Of one part of the pixels, for BLOCK_N channels: (channel tiles, parts) programs. Each of BLOCK_M lanes keeps a
    running mean and spread (Welford, 1962), and lanes are merged once."""
    part, number = tl.program_id(1), tl.num_programs(1)
    lane = tl.arange(0, BLOCK_M)
    channel = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    has_channel = channel < channels
    begin = part * pixels_per_program
    mean = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    spread = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for step in range(pixels_per_program // BLOCK_M):
        pixel = begin + step * BLOCK_M + lane
        inside = (pixel < pixels)[:, None] & has_channel[None, :]
        x = tl.load(input + places(pixel, channel, plane, strides), mask=inside, other=0.0).to(tl.float32)
        difference = tl.where(inside, x - mean, 0.0)
        mean += difference * (1 / (step + 1))
        spread += difference * (x - mean)
    end = tl.minimum(begin + pixels_per_program, pixels)
    count = tl.cdiv(tl.maximum(end - begin - lane, 0), BLOCK_M).to(tl.float32)
    total, mean, spread = merge(tl.broadcast_to(count[:, None], (BLOCK_M, BLOCK_N)), mean, spread)
    store_part(parts, part, number, channel, channels, has_channel, total, mean, spread)


@triton.jit
def store_part(parts, part, number, channel, channels, has_channel, count, mean, spread):
    at = parts + channel.to(tl.int64) * number + part
    each = channels.to(tl.int64) * number
    tl.store(at, count, mask=has_channel)
    tl.store(at + each, mean, mask=has_channel)
    tl.store(at + 2 * each, spread, mask=has_channel)


@triton.jit
def combine_kernel(
    parts,  # (3, C, number)
    mean,  # (C,) float32, as the next two
    rstd,
    variance,  # biased
    number,
    eps,
    BLOCK: tl.constexpr,
):
    """One channel: C programs."""
    channel, channels = tl.program_id(0), tl.num_programs(0)
    lane = tl.arange(0, BLOCK)
    each = channels.to(tl.int64) * number
    row = parts + channel.to(tl.int64) * number
    count = tl.zeros((BLOCK,), tl.float32)
    center = tl.zeros((BLOCK,), tl.float32)
    spread = tl.zeros((BLOCK,), tl.float32)
    for begin in range(0, number, BLOCK):
        at = row + begin + lane
        inside = begin + lane < number
        added = tl.load(at, mask=inside, other=0.0)
        deviation = tl.load(at + each, mask=inside, other=0.0) - center
        share = added / tl.maximum(count + added, 1.0)
        # Without pixels of its own a part has no say, and a lane without pixels takes the part's.
        spread += tl.load(at + 2 * each, mask=inside, other=0.0) + deviation * deviation * count * share
        center += deviation * share
        count += added
    total, center, spread = merge(count, center, spread)
    tl.store(mean + channel, center)
    tl.store(variance + channel, spread / total)
    tl.store(rstd + channel, 1 / tl.sqrt_rn(spread / total + eps))


@triton.jit
def tile_of(pixels, channels, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """This program's pixels and channels, and which of both exist, of (pixel tiles x channel tiles) programs."""
    tiles = tl.cdiv(channels, BLOCK_N)
    pixel = tl.program_id(0) // tiles * BLOCK_M + tl.arange(0, BLOCK_M)
    channel = tl.program_id(0) % tiles * BLOCK_N + tl.arange(0, BLOCK_N)
    return pixel, channel, (pixel < pixels)[:, None], channel < channels


@triton.jit
def normalized(x, channel, has_channel, mean, rstd):
    """(x - mean) * rstd, in float32."""
    center = tl.load(mean + channel, mask=has_channel, other=0.0)
    return (x.to(tl.float32) - center[None, :]) * tl.load(rstd + channel, mask=has_channel, other=0.0)[None, :]


@triton.jit
def affine(normal, channel, has_channel, weight, bias):
    factor = tl.load(weight + channel, mask=has_channel, other=0.0)
    return normal * factor[None, :] + tl.load(bias + channel, mask=has_channel, other=0.0)[None, :]


@triton.jit
def apply_kernel(
    input,  # (N, C, plane)
    output,  # as input
    mean,  # (C,) float32, as the next three
    rstd,
    weight,
    bias,
    plane,
    pixels,
    channels,
    strides,
    slope,
    ACTIVATION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """activation(weight * (input - mean) * rstd + bias): (pixel tiles x channel tiles) programs."""
    pixel, channel, is_pixel, has_channel = tile_of(pixels, channels, BLOCK_M, BLOCK_N)
    at, inside = places(pixel, channel, plane, strides), is_pixel & has_channel[None, :]
    normal = normalized(tl.load(input + at, mask=inside, other=0.0), channel, has_channel, mean, rstd)
    result = activate(affine(normal, channel, has_channel, weight, bias), slope, ACTIVATION)
    tl.store(output + at, result.to(output.dtype.element_ty), mask=inside)


@triton.jit
def gradient_sums_kernel(
    grad,  # (N, C, plane), as input
    input,
    parts,  # (2, C, number of parts), float32: those of the gradients of bias and weight
    mean,
    rstd,
    weight,
    bias,
    plane,
    pixels,
    pixels_per_program,
    channels,
    strides,
    slope,
    ACTIVATION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Of one part of the pixels, for BLOCK_N channels: as many programs as ``statistics_kernel`` has."""
    part, number = tl.program_id(1), tl.num_programs(1)
    channel = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    has_channel = channel < channels
    of_bias = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    of_weight = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for step in range(pixels_per_program // BLOCK_M):
        pixel = part * pixels_per_program + step * BLOCK_M + tl.arange(0, BLOCK_M)
        inside = (pixel < pixels)[:, None] & has_channel[None, :]
        at = places(pixel, channel, plane, strides)
        normal = normalized(tl.load(input + at, mask=inside, other=0.0), channel, has_channel, mean, rstd)
        before = affine(normal, channel, has_channel, weight, bias)
        after = tl.load(grad + at, mask=inside, other=0.0).to(tl.float32)
        change = tl.where(inside, activation_gradient(after, before, slope, ACTIVATION), 0.0)
        of_bias += change
        of_weight += change * normal
    at = parts + channel.to(tl.int64) * number + part
    tl.store(at, tl.sum(of_bias, 0), mask=has_channel)
    tl.store(at + channels.to(tl.int64) * number, tl.sum(of_weight, 0), mask=has_channel)


@triton.jit
def input_gradient_kernel(
    grad,  # (N, C, plane), as input and output
    input,
    output,
    sums,  # (2, C), float32: the gradients of bias and weight
    mean,
    rstd,
    weight,
    bias,
    plane,
    pixels,
    channels,
    strides,
    slope,
    ACTIVATION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """As many programs as ``apply_kernel`` has."""
    pixel, channel, is_pixel, has_channel = tile_of(pixels, channels, BLOCK_M, BLOCK_N)
    at, inside = places(pixel, channel, plane, strides), is_pixel & has_channel[None, :]
    normal = normalized(tl.load(input + at, mask=inside, other=0.0), channel, has_channel, mean, rstd)
    before = affine(normal, channel, has_channel, weight, bias)
    change = activation_gradient(
        tl.load(grad + at, mask=inside, other=0.0).to(tl.float32), before, slope, ACTIVATION
    )  # fmt: skip
    mean_change = tl.load(sums + channel, mask=has_channel, other=0.0) / pixels
    mean_product = tl.load(sums + channels + channel, mask=has_channel, other=0.0) / pixels
    factor = tl.load(weight + channel, mask=has_channel, other=0.0)
    factor *= tl.load(rstd + channel, mask=has_channel, other=0.0)
    result = (change - mean_change[None, :] - normal * mean_product[None, :]) * factor[None, :]
    tl.store(output + at, result.to(output.dtype.element_ty), mask=inside)
