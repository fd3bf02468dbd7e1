"""A batch norm module and the activation behind it, in as few passes as there can be."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..backends import dispatch
from ..backends.compiled.batch_norm import batch_norm_activation
from ..backends.reference.conv_transpose import ACTIVATIONS

FUSED = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
FEWEST_ELEMENTS = 1 << 16  # below, torch's calls take less time than ours


def normalize(norm: nn.Module, input: Tensor, activation: str | None, negative_slope: float) -> Tensor:
    """``activation(norm(input))``, input (N, C, *spatial): in training in one native pass where that is faster."""
    if _is_fused(norm, input):
        output, mean, variance = batch_norm_activation(
            input, norm.weight, norm.bias, norm.eps, activation, negative_slope
        )
        _track(norm, mean, variance, input.numel() // input.shape[1])
        return output
    output = norm(input)
    return output if activation is None else ACTIVATIONS[activation](output, negative_slope)


def _is_fused(norm: nn.Module, input: Tensor) -> bool:
    return (
        norm.training
        and type(norm) in FUSED
        and not (norm._forward_hooks or norm._forward_pre_hooks or norm._backward_hooks or norm._backward_pre_hooks)
        and input.numel() >= FEWEST_ELEMENTS
        and input.numel() > input.shape[1] == norm.num_features
        and input.dim() > 2
        and input.is_contiguous()  # channels last: torch's is as fast
        and not torch.compiler.is_compiling()
        and dispatch.requested(None) in ("auto", "native")
        and dispatch.native_refusal(input) is None
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
