"""A batch norm module and the activation behind it, in as few passes as there can be."""

from __future__ import annotations

import functools

import torch
from torch import Tensor, nn

from ..backends import dispatch
from ..backends.reference.conv_transpose import ACTIVATIONS
from ..ops.checks import without_autocast
from ..ops.conv_transpose import prepare

FUSED = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
FEWEST_ELEMENTS = 1 << 16  # below, torch's calls take less time than the native kernel's


def normalize(norm: nn.Module, input: Tensor, activation: str | None, negative_slope: float) -> Tensor:
    """``activation(norm(input))``, input (N, C, *spatial): in training by one kernel where that is faster."""
    name = _implementation(norm, input)
    if name == "torch":
        output = norm(input)
        return output if activation is None else ACTIVATIONS[activation](output, negative_slope)
    return _normalize(norm, input, activation, negative_slope, dispatch.BATCH_NORM[name])


def convolve_and_normalize(
    conv: nn.Module,
    norm: nn.Module,
    input: Tensor,
    geometry: tuple,
    activation: str | None,
    negative_slope: float,
) -> Tensor:
    """``normalize`` of one of our transposed convolutions of a batch; the kernels for GPUs take the statistics where
    they write their output, and so save a pass."""
    fits = _is_plain(norm) and norm.num_features == conv.out_channels and input.shape[0] > 0
    name = dispatch.requested(None)
    if fits and name in dispatch.CONV_TRANSPOSE_WITH_STATISTICS:
        call = prepare(len(conv.kernel_size), input, conv.weight, conv.bias, *geometry, None, None, None, 0.0)
        compute = dispatch.conv_transpose_with_statistics(name, call, norm.eps)
        output, *statistics = without_autocast(compute, input)
        if output.numel() > output.shape[1]:
            kernel = functools.partial(dispatch.BATCH_NORM[name], statistics=statistics)
            return _normalize(norm, output, activation, negative_slope, kernel)
    else:
        output = conv.op(input, conv.weight, conv.bias, *geometry)
    return normalize(norm, output, activation, negative_slope)


def _normalize(norm: nn.Module, input: Tensor, activation: str | None, negative_slope: float, kernel) -> Tensor:
    output, mean, variance = kernel(input, norm.weight, norm.bias, norm.eps, activation, negative_slope)
    _track(norm, mean, variance, input.numel() // input.shape[1])
    return output


def _implementation(norm: nn.Module, input: Tensor) -> str:
    if not _is_plain(norm) or not (input.dim() > 2 and input.numel() > input.shape[1] == norm.num_features):
        return "torch"
    name = dispatch.choose_batch_norm(input)
    return "torch" if name == "native" and input.numel() < FEWEST_ELEMENTS else name


def _is_plain(norm: nn.Module) -> bool:
    """A batch norm of torch's by the batch's statistics, to which nothing is tied."""
    return (
        norm.training
        and type(norm) in FUSED
        and not (norm._forward_hooks or norm._forward_pre_hooks or norm._backward_hooks or norm._backward_pre_hooks)
        and not torch.compiler.is_compiling()
    )


@torch.no_grad()
def _track(norm: nn.Module, mean: Tensor, variance: Tensor, count: int) -> None:
    """The running statistics, as torch's module keeps them: of the unbiased variance."""
    if not norm.track_running_stats or norm.running_mean is None:
        return
    norm.num_batches_tracked.add_(1)
    momentum = 1.0 / norm.num_batches_tracked.item() if norm.momentum is None else norm.momentum
    norm.running_mean.lerp_(mean.to(norm.running_mean.dtype), momentum)
    norm.running_var.lerp_((variance * (count / (count - 1))).to(norm.running_var.dtype), momentum)
