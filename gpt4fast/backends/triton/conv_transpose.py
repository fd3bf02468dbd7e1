"""Transposed convolution by Triton kernels, with its gradients. Shapes as in the reference.

Run on an H200 (benchmarks/LOG.md); tested by Triton's interpreter too, and compiled for sm_80, sm_90 and sm_100.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ..autograd import needs_grad
from ..reference.conv_transpose import epilogue, memory_format, output_sizes
from .availability import triton_refusal
from .batch_norm import merged_statistics
from .conv_transpose_launch import channels_in_rows, convolve, is_depthwise, lift, weight_gradient


def refusal(call: dict) -> str | None:
    """Why the kernels can't serve a call that ``ops.conv_transpose.prepare`` made, or None."""
    input, weight, groups = call["input"], call["weight"], call["groups"]
    reason = triton_refusal(input)
    if reason is not None:
        return reason
    sizes = output_sizes(
        input.shape[2:], weight.shape[2:], call["stride"], call["padding"], call["output_padding"], call["dilation"]
    )
    image = math.prod(sizes) * weight.shape[1] * groups
    pixels = input.shape[0] * max(input.shape[2:].numel(), math.prod(sizes))
    if max(image, pixels, _reach(input[0]) if len(input) else 0, _reach(weight)) >= 2**30:
        return "the Triton kernels count an image's elements, all images' pixels and the weight's elements in 32 bits"
    if groups >= 2**16:  # a grid's second dimension
        return "the Triton kernels take fewer than 65536 groups"
    return None


def _reach(tensor: Tensor) -> int:
    """How many elements of memory a tensor spans."""
    return sum((n - 1) * s for n, s in zip(tensor.shape, tensor.stride(), strict=True)) + 1


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
    """(N, Cout, *out), computed and finished in one pass.

    Where a gradient is wanted, the epilogue is torch's: its derivatives need what stands between.
    """
    geometry = stride, padding, output_padding, groups, dilation
    if not needs_grad(input, weight, bias, scale, shift):
        return _forward(input, weight, bias, *geometry, scale, shift, activation, negative_slope)
    output = ConvTranspose.apply(input, weight, bias, *geometry, None)
    return epilogue(output, scale, shift, activation, negative_slope).to(output.dtype)


def bind(call: dict) -> Callable[..., Tensor]:
    """``conv_transpose`` for other tensors like a call's that wants no gradient and is not empty: a function of (input,
    weight, bias, scale, shift)."""
    input, weight, groups = call["input"], call["weight"], call["groups"]
    geometry = [call[name] for name in ("stride", "padding", "output_padding", "groups", "dilation")]
    stride, padding, _, _, dilation = geometry
    output = _empty_output(input, weight, *geometry)
    again = convolve(
        input, weight, output, groups, False, *_axes(input, weight, stride, padding, dilation),
        *(call[name] for name in ("bias", "scale", "shift", "activation", "negative_slope")),
    ).again  # fmt: skip
    shape, layout = output.shape, memory_format(input, weight)
    settings = {"dtype": input.dtype, "device": input.device, "memory_format": layout}
    in_rows = (lambda tensor: tensor) if is_depthwise(weight, groups) else lambda tensor: channels_in_rows(lift(tensor))

    def run(input: Tensor, weight: Tensor, bias: Tensor | None, scale: Tensor | None, shift: Tensor | None) -> Tensor:
        output = torch.empty(shape, **settings)
        with torch.cuda.device_of(input):
            again(in_rows(input), in_rows(weight), output, bias, scale, shift, None)
        return output

    return run


class ConvTranspose(torch.autograd.Function):
    """With ``eps``, as ``dispatch.conv_transpose_with_statistics``; without it the output alone."""

    @staticmethod
    def forward(ctx, input, weight, bias, stride, padding, output_padding, groups, dilation, eps):
        ctx.save_for_backward(input, weight)
        ctx.geometry = stride, padding, output_padding, groups, dilation
        if eps is None:
            return _forward(input, weight, bias, *ctx.geometry, None, None, None, 0.0)
        output, *statistics = _forward_with_statistics(input, weight, bias, *ctx.geometry, eps)
        ctx.mark_non_differentiable(*statistics)
        return output, *statistics

    @staticmethod
    def backward(ctx, grad, *_):
        input, weight = ctx.saved_tensors
        stride, padding, output_padding, groups, dilation = ctx.geometry
        needs_input, needs_weight, needs_bias = ctx.needs_input_grad[:3]
        grad_bias = grad.sum([0, *range(2, grad.dim())]) if needs_bias else None
        if torch.is_grad_enabled():  # create_graph=True: torch's kernels have derivatives
            mask = [needs_input, needs_weight, False]
            grad_input, grad_weight, _ = torch.ops.aten.convolution_backward(
                grad, input, weight, None, stride, padding, dilation, True, output_padding, groups, mask
            )
        else:
            adjoint = input, weight, stride, padding, groups, dilation
            grad_input = _input_gradient(grad, *adjoint) if needs_input else None
            grad_weight = _weight_gradient(grad, *adjoint) if needs_weight else None
        return grad_input, grad_weight, grad_bias, *(None,) * 6


# The launches are opaque to torch.compile, which does not look into the interpreter, nor fuse anything with them.


@torch.library.custom_op("gpt4fast::triton_conv_transpose", mutates_args=())
def _forward(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    output_padding: Sequence[int],
    groups: int,
    dilation: Sequence[int],
    scale: Tensor | None,
    shift: Tensor | None,
    activation: str | None,
    negative_slope: float,
) -> Tensor:
    output = _empty_output(input, weight, stride, padding, output_padding, groups, dilation)
    if output.numel():
        axes = _axes(input, weight, stride, padding, dilation)
        convolve(input, weight, output, groups, False, *axes, bias, scale, shift, activation, negative_slope)
    return output


@torch.library.custom_op("gpt4fast::triton_conv_transpose_with_statistics", mutates_args=())
def _forward_with_statistics(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    output_padding: Sequence[int],
    groups: int,
    dilation: Sequence[int],
    eps: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    output = _empty_output(input, weight, stride, padding, output_padding, groups, dilation)
    axes = _axes(input, weight, stride, padding, dilation)
    parts = convolve(input, weight, output, groups, False, *axes, bias, statistics=True).parts
    return output, *merged_statistics(parts, eps)


@torch.library.custom_op("gpt4fast::triton_conv_transpose_input_gradient", mutates_args=())
def _input_gradient(
    grad: Tensor,
    input: Tensor,
    weight: Tensor,
    stride: Sequence[int],
    padding: Sequence[int],
    groups: int,
    dilation: Sequence[int],
) -> Tensor:
    output = torch.empty_like(input, memory_format=memory_format(input, weight))
    if output.numel():
        axes = [1] * len(stride), stride, [-p for p in padding], [-d for d in dilation]
        convolve(grad, weight, output, groups, True, *axes)
    return output


_weight_gradient = torch.library.custom_op(
    "gpt4fast::triton_conv_transpose_weight_gradient", weight_gradient, mutates_args=()
)


@_forward.register_fake
def _(input, weight, bias, stride, padding, output_padding, groups, dilation, *epilogue):
    return _empty_output(input, weight, stride, padding, output_padding, groups, dilation)


@_forward_with_statistics.register_fake
def _(input, weight, bias, stride, padding, output_padding, groups, dilation, eps):
    output = _empty_output(input, weight, stride, padding, output_padding, groups, dilation)
    return output, *(output.new_empty(output.shape[1], dtype=torch.float32) for _ in range(3))


@_input_gradient.register_fake
def _(grad, input, weight, stride, padding, groups, dilation):
    return torch.empty_like(input, memory_format=memory_format(input, weight))


@_weight_gradient.register_fake
def _(grad, input, weight, stride, padding, groups, dilation):
    return torch.empty_like(weight)


def _empty_output(input, weight, stride, padding, output_padding, groups, dilation) -> Tensor:
    sizes = output_sizes(input.shape[2:], weight.shape[2:], stride, padding, output_padding, dilation)
    shape = input.shape[0], weight.shape[1] * groups, *sizes
    return torch.empty(shape, dtype=input.dtype, device=input.device, memory_format=memory_format(input, weight))


def _axes(input, weight, stride, padding, dilation) -> tuple[Sequence[int], ...]:
    """Of ``convolve``, for a transposed convolution."""
    # The only source along a dimension, whatever the stride, meets each output by one tap: a phase for each.
    up = [
        s if n > 1 else d * (k - 1) + 1
        for n, k, s, d in zip(input.shape[2:], weight.shape[2:], stride, dilation, strict=True)
    ]
    return up, [1] * len(up), padding, dilation
