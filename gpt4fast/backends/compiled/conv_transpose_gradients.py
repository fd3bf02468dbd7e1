"""Gradients of the compiled transposed convolution and of ``gpt4fast::affine_activation``, which ``conv_transpose.py``
registers. Each is differentiable in turn."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..aten.conv_transpose import FUNCTIONS
from ..reference.conv_transpose import ACTIVATIONS, epilogue, memory_format
from .winograd import winograd_wins_backward

FEWEST_CHANNELS = 8  # of a group, for the CUDA kernels: 16 bytes of a half type


def convolutions_take_tf32() -> bool:
    """Whether torch's convolutions round float32 on a GPU to TF32."""
    return torch.backends.cudnn.conv.fp32_precision == "tf32"


# Dynamo of torch 2.11 can't trace torch's own setting. This is torch.compiler.assume_constant_result, which would
# import Dynamo, and Triton with it.
convolutions_take_tf32._dynamo_marked_constant = True


def _activation_gradient(x: Tensor, activation: str, negative_slope: float) -> Tensor:
    """Derivative of the activation at ``x``, in differentiable operations."""
    if activation == "relu":
        return (x > 0).to(x.dtype)
    if activation == "leaky_relu":
        return torch.where(x > 0, 1.0, negative_slope).to(x.dtype)
    y = ACTIVATIONS["sigmoid" if activation == "silu" else activation](x, negative_slope)
    if activation == "tanh":
        return 1 - y * y
    if activation == "sigmoid":
        return y * (1 - y)
    if activation == "silu":
        return y * (1 + x * (1 - y))
    normal_cdf = 0.5 * (1 + torch.erf(x * 0.5**0.5))
    return normal_cdf + x * torch.exp(-0.5 * x * x) * (0.5 / torch.pi) ** 0.5


def _affine_backward(grad, output, bias, scale, shift, activation, negative_slope):
    """Gradients of the epilogue for output, bias, scale and shift, the latter three None where absent."""
    shape = (-1, *(1,) * (output.dim() - 2))
    others = [0, *range(2, output.dim())]
    biased = output if bias is None else output + bias.view(shape)
    if activation != "none":
        affine = epilogue(biased, scale, shift, None, 0.0).to(output.dtype)
        grad = grad * _activation_gradient(affine, activation, negative_slope)
    grad_shift = None if shift is None else grad.sum(others).to(shift.dtype)
    grad_scale = None if scale is None else (grad * biased).sum(others).to(scale.dtype)
    grad_output = grad if scale is None else (grad * scale.view(shape)).to(output.dtype)
    grad_bias = None if bias is None else grad_output.sum(others)
    return grad_output, grad_bias, grad_scale, grad_shift


def setup_conv_transpose(ctx, inputs, output):
    input, weight, bias, *geometry, scale, shift, activation, slope, _, _, _, _ = inputs
    ctx.save_for_backward(input, weight, bias, scale, shift)
    ctx.settings = geometry, activation, slope


def setup_with_statistics(ctx, inputs, output):
    input, weight, bias, *geometry, _, _, _ = inputs
    ctx.save_for_backward(input, weight, bias, None, None)
    ctx.settings = geometry, "none", 0.0


def backward_with_statistics(ctx, grad, *_):
    return *backward_conv_transpose(ctx, grad)[:8], *(None,) * 3


def backward_conv_transpose(ctx, grad):
    input, weight, bias, scale, shift = ctx.saved_tensors
    (stride, padding, output_padding, groups, dilation), activation, slope = ctx.settings
    grad_bias = grad_scale = grad_shift = None
    if activation == "none" and scale is None:  # the gradient does not depend on the convolution's output
        grad_shift, grad_bias = (None if t is None else grad.sum([0, *range(2, grad.dim())]) for t in (shift, bias))
    else:
        convolve = FUNCTIONS[input.dim() - 2]
        output = convolve(input, weight, None, stride, padding, output_padding, groups, dilation)
        grad, grad_bias, grad_scale, grad_shift = _affine_backward(grad, output, bias, scale, shift, activation, slope)

    def ours(needs_input: bool, needs_weight: bool) -> tuple[Tensor, Tensor]:
        channels_last = memory_format(input, weight) != torch.contiguous_format
        tf32 = not input.is_cpu and convolutions_take_tf32()
        return torch.ops.gpt4fast.conv_transpose_backward(
            grad, input, weight, stride, padding, output_padding, groups, dilation, channels_last,
            needs_input, needs_weight, winograd, tf32,
        )  # fmt: skip

    def theirs(needs_input: bool, needs_weight: bool) -> list[Tensor | None]:
        mask = [needs_input, needs_weight, False]
        return torch.ops.aten.convolution_backward(
            grad, input, weight, None, stride, padding, dilation, True, output_padding, groups, mask
        )[:2]

    winograd = input.is_cpu and winograd_wins_backward(input.shape, weight, stride, groups, dilation)
    if input.is_cpu:
        wins = _native_wins(input, weight, padding, groups, dilation, winograd)
    else:
        wins = _cuda_serves(input, weight, stride, groups)
    grad_input, grad_weight = gradients(ours, theirs, wins, ctx.needs_input_grad[:2])
    return grad_input, grad_weight, grad_bias, *(None,) * 5, grad_scale, grad_shift, *(None,) * 6


def gradients(ours, theirs, wins: Sequence[bool], needed: Sequence[bool]) -> list[Tensor | None]:
    """Gradients of input and weight where they are ``needed``, each from whichever kernel ``wins`` says is faster.

    ``ours`` and ``theirs`` compute those of the two that they are asked for. Torch's alone have derivatives: they are
    taken with ``create_graph=True``.
    """
    native = [win and wanted and not torch.is_grad_enabled() for win, wanted in zip(wins, needed, strict=True)]
    others = [wanted and not mine for mine, wanted in zip(native, needed, strict=True)]
    grads: list[Tensor | None] = [None, None]
    for compute, mask in ((ours, native), (theirs, others)):
        if any(mask):
            grads = [new if mine else old for new, mine, old in zip(compute(*mask), mask, grads, strict=True)]
    return grads


def torch_crashes(input: Tensor, weight: Tensor, padding: tuple[int, ...], dilation: tuple[int, ...]) -> bool:
    """Whether torch's gradient of the input may end the process: bfloat16, channels last, dilated, with more padding
    than the kernel reaches (torch 2.13; a segmentation fault in oneDNN)."""
    if input.dtype != torch.bfloat16 or memory_format(input, weight) == torch.contiguous_format:
        return False
    sizes = zip(weight.shape[2:], padding, dilation, strict=True)
    return any(d > 1 for d in dilation) and any(p > d * (k - 1) for k, p, d in sizes)


def _native_wins(input: Tensor, weight: Tensor, padding, groups: int, dilation, winograd: bool) -> list[bool]:
    """Whether the native gradient of the input, and that of the weight, is faster than torch's (benchmarks/LOG.md)."""
    outputs = weight.shape[1]
    if torch_crashes(input, weight, padding, dilation):
        return [True, True]
    if input.dtype == torch.float16:
        return [outputs >= 16, outputs >= 16]  # torch has no fast kernel
    if outputs < 16 or weight.shape[0] // groups < 16:
        return [False, False]
    # Of the input, channels first 1.1 to 1.6 (bfloat16 of few pixels 0.85), channels last 0.9 to 1.0; of the weight 1.1
    # to 2.8.
    few_pixels = input.dtype == torch.bfloat16 and input.shape[2:].numel() <= 16
    return [winograd or (memory_format(input, weight) == torch.contiguous_format and not few_pixels), True]


def _cuda_serves(input: Tensor, weight: Tensor, stride, groups: int) -> list[bool]:
    """Whether the CUDA kernels compute the gradient of the input, and that of the weight. Not yet run on a GPU."""
    pixels = input.shape[0] * input.shape[2:].numel()
    fits = max(pixels, *(n * s for n, s in zip(input.shape[2:], stride, strict=True))) < 2**30  # 32-bit indices
    # Of the weight's, a block computes 64 x 64 channels: of few of them mostly padding.
    return [fits, fits and min(weight.shape[0] // groups, weight.shape[1]) >= FEWEST_CHANNELS]


def setup_affine(ctx, inputs, output):
    *tensors, activation, slope = inputs
    ctx.save_for_backward(*tensors)
    ctx.settings = activation, slope


def backward_affine(ctx, grad):
    return *_affine_backward(grad, *ctx.saved_tensors, *ctx.settings), None, None
