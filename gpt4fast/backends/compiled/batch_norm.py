"""Batch norm with the batch's statistics and the activation behind it. By the native kernel it is three passes over
memory where torch's operators make eight, and four backward where they make ten. By the CUDA kernels, not yet run on a
GPU, it is three, or two where a transposed convolution has taken the statistics, and five backward."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from .. import native
from ..reference.conv_transpose import ACTIVATIONS


def batch_norm_activation(
    input: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    activation: str | None,
    negative_slope: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """``activation(batch_norm(input))``, and the mean and the biased variance of the batch.

    Args:
        input: (N, C, *spatial), contiguous, float32, bfloat16 or float16.
        weight, bias: (C,) or None: 1 and 0.
        eps: added to the variance.
        activation, negative_slope: see ``gpt4fast.conv_transpose2d``.

    Returns:
        The output, as input; mean and variance (C,), float32, without gradients.

    Reference: Ioffe and Szegedy, "Batch Normalization", 2015.
    """
    ops = torch.ops.gpt4fast
    kernels = ops.batch_norm_activation.default, ops.batch_norm_activation_backward.default
    return BatchNormActivation.apply(input.contiguous(), weight, bias, eps, activation, negative_slope, *kernels)


class GpuKernels(NamedTuple):
    """Of a batch norm on a GPU; their tensors are contiguous or channels last."""

    statistics: Callable  # of (input, eps): mean, 1 / sqrt(variance + eps) and the biased variance
    normalize: Callable  # of (input, mean, rstd, weight, bias, activation, negative_slope): the output
    backward: Callable  # of (grad, input, weight, bias, mean, rstd, activation, negative_slope): three gradients


def gpu_batch_norm_activation(
    kernels: GpuKernels,
    input: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    activation: str | None,
    negative_slope: float,
    statistics: tuple[Tensor, Tensor, Tensor] | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """``batch_norm_activation`` on a GPU, for an input of any layout.

    ``statistics`` are the input's, where a transposed convolution took them with the same ``eps``; else a pass over the
    input takes them.
    """

    def forward(input, weight, bias, eps, *finish) -> tuple[Tensor, ...]:
        mean, rstd, variance = kernels.statistics(input, eps) if statistics is None else statistics
        return kernels.normalize(input, mean, rstd, weight, bias, *finish), mean, rstd, variance

    if not (input.is_contiguous() or input.movedim(1, -1).is_contiguous()):
        input = input.contiguous()
    return BatchNormActivation.apply(input, weight, bias, eps, activation, negative_slope, forward, kernels.backward)


cuda_batch_norm_activation = functools.partial(
    gpu_batch_norm_activation,
    GpuKernels(  # where they are called, torch.ops.gpt4fast has them
        lambda *inputs: torch.ops.gpt4fast.batch_statistics(*inputs),
        lambda *inputs: torch.ops.gpt4fast.batch_norm_apply(*inputs),
        lambda *inputs: torch.ops.gpt4fast.batch_norm_activation_backward(*inputs),
    ),
)


class BatchNormActivation(torch.autograd.Function):
    """Of any two kernels with the signatures of the native ones; grad comes in the layout of input."""

    @staticmethod
    def forward(ctx, input, weight, bias, eps, activation, negative_slope, forward, backward):
        channels, like = input.shape[1], {"dtype": torch.float32, "device": input.device}
        affine = [
            torch.ones(channels, **like) if weight is None else weight.float().contiguous(),
            torch.zeros(channels, **like) if bias is None else bias.float().contiguous(),
        ]
        ctx.finish = activation, negative_slope
        ctx.eps, ctx.kernel = eps, backward
        out, mean, rstd, variance = forward(input, *affine, eps, activation or "none", negative_slope)
        ctx.save_for_backward(input, weight, bias, *affine, mean, rstd)
        ctx.mark_non_differentiable(mean, variance)
        return out, mean, variance

    @staticmethod
    def backward(ctx, grad, *_):
        input, weight, bias, *saved = ctx.saved_tensors
        activation, negative_slope = ctx.finish
        if torch.is_grad_enabled():  # create_graph=True: a formula that has derivatives
            return *_differentiable_backward(ctx, grad, input, weight, bias), *(None,) * 5
        if grad.stride() != input.stride():
            grad = torch.empty_like(input).copy_(grad)
        grads = ctx.kernel(grad, input, *saved, activation or "none", negative_slope)
        like = input, weight, bias
        return *(None if t is None else g.to(t.dtype) for g, t in zip(grads, like, strict=True)), *(None,) * 5


def _differentiable_backward(ctx, grad, *tensors):
    # Views, since one tensor may be given in several places, each of which has a gradient of its own.
    input, weight, bias = views = [None if t is None else t.view_as(t) for t in tensors]
    activation, negative_slope = ctx.finish
    output = F.batch_norm(input, None, None, weight, bias, True, 0.0, ctx.eps)
    if activation is not None:
        output = ACTIVATIONS[activation](output, negative_slope)
    wanted = [t for t, needed in zip(views, ctx.needs_input_grad, strict=False) if needed]
    grads = iter(torch.autograd.grad(output, wanted, grad, create_graph=True))
    return [next(grads) if needed else None for needed in ctx.needs_input_grad[:3]]


native.load()
if native.cpu_library_error() is None:

    def _fake_forward(input, weight, *_):
        return torch.empty_like(input), *(torch.empty_like(weight) for _ in range(3))

    torch.library.register_fake("gpt4fast::batch_norm_activation", _fake_forward)
    torch.library.register_fake(
        "gpt4fast::batch_statistics",
        lambda input, eps: tuple(input.new_empty(input.shape[1], dtype=torch.float32) for _ in range(3)),
    )
    torch.library.register_fake("gpt4fast::batch_norm_apply", lambda input, *_: torch.empty_like(input))
    torch.library.register_fake(
        "gpt4fast::batch_norm_activation_backward",
        lambda grad, input, weight, *_: (torch.empty_like(input), torch.empty_like(weight), torch.empty_like(weight)),
    )
