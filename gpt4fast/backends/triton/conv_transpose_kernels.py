"""Triton kernels of transposed convolution and its gradients, in up to three dimensions.

Along each dimension, a tap connects a source and an output where

    source * UP = output * DOWN + PADDING - tap * DILATION.

A transposed convolution has UP = stride and DOWN = 1; its adjoint, the convolution that gives the gradient of the
input, has UP = 1 and DOWN = stride, and PADDING and DILATION negated. UP or DOWN is 1.

Outputs of one phase, output % UP, meet the same taps: every STEP-th one from the first. Each phase is a product of
matrices whose rows are gathered, (pixels, taps x channels) x (taps x channels, outputs), without any inserted zero.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .arithmetic import WIDEN, activate
from .batch_norm_kernels import store_part


@triton.jit
def dot(a, b, sums, PRECISION: tl.constexpr):
    if WIDEN:
        a, b = a.to(tl.float32), b.to(tl.float32)
    return tl.dot(a, b, sums, input_precision=PRECISION)


@triton.jit
def split(index, sizes):
    """The four coordinates of a row-major index into (any, *sizes)."""
    line = index // sizes[2]
    plane = line // sizes[1]
    return plane // sizes[0], plane % sizes[0], line % sizes[1], index % sizes[2]


@triton.jit
def meet(
    phase, KERNEL: tl.constexpr, UP: tl.constexpr, PADDING: tl.constexpr, DILATION: tl.constexpr, STEP: tl.constexpr,
    INVERSE: tl.constexpr,
):  # fmt: skip
    """Along one dimension: the first tap that the phase meets, the number of its taps, and the source that the first
    tap connects to output ``phase``.

    With COMMON the greatest common divisor of UP and DILATION and STEP = UP / COMMON, a tap solves
    tap * DILATION = phase + PADDING modulo UP; INVERSE is that of DILATION / COMMON modulo STEP.
    """
    COMMON: tl.constexpr = UP // STEP
    place = phase + PADDING
    first = place // COMMON * INVERSE % STEP
    count = tl.where(place % COMMON == 0, (KERNEL - first + STEP - 1) // STEP, 0)
    return first, count, (place - first * DILATION) // UP


@triton.jit
def within(place, size):
    return (place >= 0) & (place < size)


@triton.jit
def convolution_kernel(
    source,  # (N, groups * channels, *source_sizes)
    weight,  # (groups, channels, outputs, *KERNEL) by weight_strides
    output,  # (N, groups * outputs, *output_sizes)
    bias,  # (groups * outputs,) or None, as scale and shift
    scale,
    shift,
    parts,  # (3, groups * outputs, pixel tiles x phases), float32: what batch_norm_kernels merges; or None
    batch,  # N
    channels,
    outputs,
    source_sizes,
    output_sizes,
    places,  # outputs of one phase along each dimension: ceil(output_sizes / UP)
    source_strides,  # five, as those of output
    weight_strides,  # six
    output_strides,
    slope,
    KERNEL: tl.constexpr,
    UP: tl.constexpr,
    DOWN: tl.constexpr,
    PADDING: tl.constexpr,
    DILATION: tl.constexpr,
    STEP: tl.constexpr,
    INVERSE: tl.constexpr,
    ACTIVATION: tl.constexpr,
    DEPTHWISE: tl.constexpr,  # channels of source and output are one by one; ``outputs`` counts them, groups is 1
    CHANNELS_LAST: tl.constexpr,  # of output
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """activation(scale * (source (*) weight + bias) + shift), for BLOCK_M pixels of one phase and BLOCK_N channels.

    Grid: (pixel tiles x phases, channel tiles, groups). The phases of a tile run side by side: they read the same
    sources, and what they write interleaves. An image has fewer than 2**31 elements, the batch may have more.
    """
    PHASES: tl.constexpr = UP[0] * UP[1] * UP[2]
    phase, group = tl.program_id(0) % PHASES, tl.program_id(2)
    _, p0, p1, p2 = split(phase, UP)
    first0, count0, base0 = meet(p0, KERNEL[0], UP[0], PADDING[0], DILATION[0], STEP[0], INVERSE[0])
    first1, count1, base1 = meet(p1, KERNEL[1], UP[1], PADDING[1], DILATION[1], STEP[1], INVERSE[1])
    first2, count2, base2 = meet(p2, KERNEL[2], UP[2], PADDING[2], DILATION[2], STEP[2], INVERSE[2])

    pixel = tl.program_id(0) // PHASES * BLOCK_M + tl.arange(0, BLOCK_M)
    image, q0, q1, q2 = split(pixel, places)
    column = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    has_column = column < outputs
    rows = source + image.to(tl.int64) * source_strides[0]
    weight += group * weight_strides[0]

    sums = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    # One loop over taps and channels, not two: Triton prefetches across the iterations of the innermost.
    blocks = tl.cdiv(channels, BLOCK_K)
    for iteration in range(count0 * count1 * count2 * blocks):
        tap = iteration // blocks
        j0, j1, j2 = tap // (count1 * count2), tap // count2 % count1, tap % count2
        s0 = q0 * DOWN[0] + base0 - j0 * (STEP[0] * DILATION[0] // UP[0])
        s1 = q1 * DOWN[1] + base1 - j1 * (STEP[1] * DILATION[1] // UP[1])
        s2 = q2 * DOWN[2] + base2 - j2 * (STEP[2] * DILATION[2] // UP[2])
        reached = within(s0, source_sizes[0]) & within(s1, source_sizes[1]) & within(s2, source_sizes[2])
        reached = reached & (image < batch)
        at_pixel = rows + (s0 * source_strides[2] + s1 * source_strides[3] + s2 * source_strides[4])
        at_tap = weight + (
            (first0 + j0 * STEP[0]) * weight_strides[3]
            + (first1 + j1 * STEP[1]) * weight_strides[4]
            + (first2 + j2 * STEP[2]) * weight_strides[5]
        )
        if DEPTHWISE:
            a = tl.load(
                at_pixel[:, None] + column[None, :] * source_strides[1],
                mask=reached[:, None] & has_column[None, :],
                other=0.0,
            )
            b = tl.load(at_tap + column * weight_strides[2], mask=has_column, other=0.0)
            sums += a.to(tl.float32) * b.to(tl.float32)[None, :]
        else:
            channel = iteration % blocks * BLOCK_K + tl.arange(0, BLOCK_K)
            has_channel = channel < channels
            a = tl.load(
                at_pixel[:, None] + (group * channels + channel)[None, :] * source_strides[1],
                mask=reached[:, None] & has_channel[None, :],
                other=0.0,
            )
            b = tl.load(
                at_tap + channel[:, None] * weight_strides[1] + column[None, :] * weight_strides[2],
                mask=has_channel[:, None] & has_column[None, :],
                other=0.0,
            )
            sums = dot(a, b, sums, PRECISION)

    column += group * outputs
    offset = tl.zeros((BLOCK_N,), tl.float32)
    if bias is not None:
        offset += tl.load(bias + column, mask=has_column, other=0.0)
    if scale is not None:
        factor = tl.load(scale + column, mask=has_column, other=0.0).to(tl.float32)
        offset *= factor
        sums *= factor[None, :]
    if shift is not None:
        offset += tl.load(shift + column, mask=has_column, other=0.0)
    sums += offset[None, :]
    result = activate(sums, slope, ACTIVATION).to(output.dtype.element_ty)

    o0, o1, o2 = q0 * UP[0] + p0, q1 * UP[1] + p1, q2 * UP[2] + p2
    exists = (image < batch) & (o0 < output_sizes[0]) & (o1 < output_sizes[1]) & (o2 < output_sizes[2])
    at_pixel = output + image.to(tl.int64) * output_strides[0]
    at_pixel += o0 * output_strides[2] + o1 * output_strides[3] + o2 * output_strides[4]
    if CHANNELS_LAST:
        at = at_pixel[:, None] + column[None, :] * output_strides[1]
        tl.store(at, result, mask=exists[:, None] & has_column[None, :])
    else:
        # Threads side by side write pixels side by side. In one dimension: of two, Triton can't tell which has the
        # neighbours, and 3.6 takes the first, 3.9 the last.
        at = tl.reshape(at_pixel[None, :] + column[:, None] * output_strides[1], (BLOCK_M * BLOCK_N,))
        mask = tl.reshape(exists[None, :] & has_column[:, None], (BLOCK_M * BLOCK_N,))
        tl.store(at, tl.reshape(tl.trans(result), (BLOCK_M * BLOCK_N,)), mask=mask)

    if parts is not None:  # of what was written; not by ``merge``, for which the registers do not suffice
        written = tl.where(exists[:, None], result.to(tl.float32), 0.0)
        count = tl.sum(exists.to(tl.float32), 0)
        mean = tl.sum(written, 0) / tl.maximum(count, 1.0)
        deviation = tl.where(exists[:, None], written - mean[None, :], 0.0)
        rest = tl.sum(deviation, 0) / tl.maximum(count, 1.0)
        spread = tl.sum(deviation * deviation, 0) - count * rest * rest
        here, number = tl.program_id(0), tl.num_programs(0)
        store_part(
            parts, here, number, column, outputs * tl.num_programs(2), has_column, count + mean * 0, mean + rest, spread
        )


@triton.jit
def weight_gradient_kernel(
    coarse,  # (N, groups * channels, *coarse_sizes): the input of the transposed convolution
    fine,  # (N, groups * outputs, *fine_sizes): its output's gradient
    parts,  # (number of parts, groups, channels, *KERNEL, outputs), float32
    pixels,  # of coarse, in all images
    pixels_per_program,  # a multiple of BLOCK_K
    channels,
    outputs,
    coarse_sizes,
    fine_sizes,
    coarse_strides,
    fine_strides,
    KERNEL: tl.constexpr,
    STRIDE: tl.constexpr,
    PADDING: tl.constexpr,
    DILATION: tl.constexpr,
    DEPTHWISE: tl.constexpr,  # channels are one by one; ``outputs`` counts them, ``channels`` and groups are 1
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """For one tap, the sum over a part of the pixels of coarse^T x fine, for BLOCK_M channels and BLOCK_N outputs.

    Grid: (tiles x taps, groups, parts). The parts are added up afterwards, always in one order. Depthwise it is a sum
    of BLOCK_M pixels at a time, for BLOCK_N channels.
    """
    TAPS: tl.constexpr = KERNEL[0] * KERNEL[1] * KERNEL[2]
    PIXELS: tl.constexpr = BLOCK_M if DEPTHWISE else BLOCK_K
    group, part = tl.program_id(1), tl.program_id(2)
    tap, tile = tl.program_id(0) % TAPS, tl.program_id(0) // TAPS
    _, t0, t1, t2 = split(tap, KERNEL)
    tiles = tl.cdiv(outputs, BLOCK_N)
    column = tile % tiles * BLOCK_N + tl.arange(0, BLOCK_N)
    has_column = column < outputs
    channel = tile // tiles * BLOCK_M + tl.arange(0, BLOCK_M)
    has_channel = channel < channels

    sums = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for begin in range(0, pixels_per_program, PIXELS):
        pixel = part * pixels_per_program + begin + tl.arange(0, PIXELS)
        image, c0, c1, c2 = split(pixel, coarse_sizes)
        f0 = c0 * STRIDE[0] + t0 * DILATION[0] - PADDING[0]
        f1 = c1 * STRIDE[1] + t1 * DILATION[1] - PADDING[1]
        f2 = c2 * STRIDE[2] + t2 * DILATION[2] - PADDING[2]
        # Of both: a NaN whose patch does not lie in the output has no part in the gradient.
        reached = within(f0, fine_sizes[0]) & within(f1, fine_sizes[1]) & within(f2, fine_sizes[2])
        reached = (reached & (pixel < pixels))[:, None]
        image = image.to(tl.int64)
        at_coarse = coarse + image * coarse_strides[0]
        at_coarse += c0 * coarse_strides[2] + c1 * coarse_strides[3] + c2 * coarse_strides[4]
        at_fine = fine + image * fine_strides[0]
        at_fine += f0 * fine_strides[2] + f1 * fine_strides[3] + f2 * fine_strides[4]
        b = tl.load(
            at_fine[:, None] + (group * outputs + column)[None, :] * fine_strides[1],
            mask=reached & has_column[None, :],
            other=0.0,
        )
        if DEPTHWISE:
            a = tl.load(
                at_coarse[:, None] + column[None, :] * coarse_strides[1],
                mask=reached & has_column[None, :],
                other=0.0,
            )
            sums += a.to(tl.float32) * b.to(tl.float32)
        else:
            a = tl.load(
                at_coarse[:, None] + (group * channels + channel)[None, :] * coarse_strides[1],
                mask=reached & has_channel[None, :],
                other=0.0,
            )
            sums = dot(tl.trans(a), b, sums, PRECISION)

    if DEPTHWISE:
        at = parts + (part.to(tl.int64) * outputs + column) * TAPS + tap
        tl.store(at, tl.sum(sums, 0), mask=has_column)
    else:
        row = (part.to(tl.int64) * tl.num_programs(1) + group) * channels + channel
        at = parts + ((row * TAPS + tap) * outputs)[:, None] + column[None, :]
        tl.store(at, sums, mask=has_channel[:, None] & has_column[None, :])
