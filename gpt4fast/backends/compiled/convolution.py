"""Convolution with a stride: torch's, or the adjoint of our transposed convolution where Winograd's algorithm makes
that faster, with gradients from the kernels of transposed convolution.

The gradient of its input is the transposed convolution of the output's gradient with the same weight, and that of its
weight is the weight gradient of this transposed convolution, with input and output exchanged (Dumoulin and Visin, "A
guide to convolution arithmetic for deep learning", 2016, chapter 4). Discriminators are made of such layers.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from ..reference.conv_transpose import memory_format, output_sizes
from .conv_transpose_gradients import gradients
from .winograd import winograd_wins, winograd_wins_backward

FUNCTIONS = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}


def convolution(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: tuple[int, ...],
    padding: tuple[int, ...],
    dilation: tuple[int, ...],
    groups: int,
) -> Tensor:
    """``torch.nn.functional.conv*d``: input (N, C, *spatial), weight (Cout, C / groups, *kernel)."""
    return _Convolution.apply(input, weight, bias, stride, padding, dilation, groups)


def native_wins(dtype: torch.dtype, input: Tensor, weight: Tensor, stride: tuple[int, ...]) -> list[bool]:
    """Whether the native gradient of the input, and that of the weight, computed in dtype, is faster than torch's
    (benchmarks/LOG.md)."""
    outputs, inputs = weight.shape[:2]
    if inputs <= 4:
        return [True, False]  # 3.1 to 5.4; 0.2 to 0.4
    if inputs < 16 or outputs < 16:
        return [False, False]
    if dtype == torch.float16:
        return [True, True]  # torch has no fast kernel
    # Of the input float32 1.4 to 1.7, bfloat16 1.1 to 1.45 channels first and 0.9 to 1.1 last, with few pixels 0.6; of
    # the weight 1.1 to 1.9, bfloat16 1.1 to 2.7.
    pixels = input.shape[0] * input.shape[2:].numel()
    for step in stride:
        pixels //= step
    first = memory_format(input, weight) == torch.contiguous_format
    return [pixels >= 1024 and (first or dtype == torch.float32), True]


class _Convolution(torch.autograd.Function):
    @staticmethod
    def forward(ctx, input, weight, bias, stride, padding, dilation, groups):
        ctx.save_for_backward(input, weight)
        ctx.geometry = stride, padding, dilation, groups
        reaches = [d * (k - 1) + 1 for k, d in zip(weight.shape[2:], dilation, strict=True)]
        sizes = zip(input.shape[2:], padding, reaches, stride, strict=True)
        shape = torch.Size((input.shape[0], weight.shape[0], *((n + 2 * p - r) // s + 1 for n, p, r, s in sizes)))
        if min(shape) < 1 or not winograd_wins_backward(shape, weight, stride, groups, dilation):
            return FUNCTIONS[len(stride)](input, weight, bias, stride, padding, dilation, groups)
        transposed = _transposed(input, weight, shape, stride, padding, dilation, groups)
        like, channels_last = input.new_empty(()).expand(shape), memory_format(input, weight) != torch.contiguous_format
        output, _ = torch.ops.gpt4fast.conv_transpose_backward(
            input, like, weight, *transposed, channels_last, True, False, True
        )
        return output if bias is None else output.add_(bias.view(-1, *(1,) * len(stride)))

    @staticmethod
    def backward(ctx, grad):
        input, weight = ctx.saved_tensors
        stride, padding, dilation, groups = ctx.geometry
        transposed = _transposed(input, weight, grad.shape, stride, padding, dilation, groups)
        channels_last = memory_format(input, weight) != torch.contiguous_format

        def ours(needs_input: bool, needs_weight: bool) -> list[Tensor | None]:
            grad_input = grad_weight = None
            if needs_input:
                grad_input = torch.ops.gpt4fast.conv_transpose_forward(
                    grad, weight, None, *transposed, None, None, "none", 0.0, channels_last, None,
                    winograd_wins(grad, weight, stride, groups, dilation, kept=False),
                )  # fmt: skip
            if needs_weight:
                _, grad_weight = torch.ops.gpt4fast.conv_transpose_backward(
                    input, grad, weight, *transposed, channels_last, False, True
                )
            return [grad_input, grad_weight]

        def theirs(needs_input: bool, needs_weight: bool) -> list[Tensor | None]:
            mask = [needs_input, needs_weight, False]
            return torch.ops.aten.convolution_backward(
                grad, input, weight, None, stride, padding, dilation, False, [0] * len(stride), groups, mask
            )[:2]

        grads = gradients(ours, theirs, native_wins(input.dtype, input, weight, stride), ctx.needs_input_grad[:2])
        grad_bias = grad.sum([0, *range(2, grad.dim())]) if ctx.needs_input_grad[2] else None
        return *grads, grad_bias, None, None, None, None


def _transposed(input: Tensor, weight: Tensor, shape: torch.Size, stride, padding, dilation, groups: int) -> tuple:
    """The settings of the transposed convolution from images of an output's shape to those of the input."""
    least = output_sizes(shape[2:], weight.shape[2:], stride, padding, (0,) * len(stride), dilation)
    output_padding = tuple(n - m for n, m in zip(input.shape[2:], least, strict=True))
    return stride, padding, output_padding, groups, dilation
