"""Layer norm of each pixel over its channels, with the activation behind it, by the native kernel: one pass over memory
where torch's operators and the transposes around them make six."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from .. import native
from ..reference.conv_transpose import ACTIVATIONS


def channel_norm(
    input: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, activation: str | None, negative_slope: float
) -> Tensor:
    """``activation(layer_norm(input over dimension 1))``, without gradients.

    Args:
        input: (N, C, *spatial), not empty, float32, bfloat16 or float16, on the CPU.
        weight, bias: (C,) or None: 1 and 0.
        eps: added to the variance.
        activation, negative_slope: see ``gpt4fast.conv_transpose2d``.

    Returns:
        As input, in its layout if that is contiguous or channels last, else contiguous.

    Reference: Ba, Kiros and Hinton, "Layer Normalization", 2016.
    """
    if not input.movedim(1, -1).is_contiguous():
        input = input.contiguous()
    ones = input.new_ones(input.shape[1], dtype=torch.float32)
    weight, bias = ones if weight is None else weight.float(), ones - 1 if bias is None else bias.float()
    return torch.ops.gpt4fast.channel_norm_activation(
        input, weight.contiguous(), bias.contiguous(), eps, activation or "none", negative_slope
    )


def torch_channel_norm(
    input: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, activation: str | None, negative_slope: float
) -> Tensor:
    """The same in differentiable torch operations, for any input."""
    output = F.layer_norm(input.movedim(1, -1), input.shape[1:2], weight, bias, eps).movedim(-1, 1)
    return output if activation is None else ACTIVATIONS[activation](output, negative_slope)


native.load()
if native.cpu_library_error() is None:
    torch.library.register_fake("gpt4fast::channel_norm_activation", lambda input, *_: torch.empty_like(input))
