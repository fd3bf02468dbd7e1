"""Layer norms over the channels of images, which every library writes for itself (``LayerNorm2d``), and the activation
behind them, in one pass."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn

from ..backends import dispatch
from ..backends.autograd import needs_grad
from ..backends.compiled.channel_norm import channel_norm, torch_channel_norm
from ..backends.reference.conv_transpose import ACTIVATIONS
from .swap import Swapped, own_code, swap_refusal

FEWEST_ELEMENTS = 1 << 13  # below, torch's calls take less time than ours


def is_channel_norm(module: nn.Module) -> bool:
    """Whether a module by that name, of any library's, computes layer norm over dimension 1 of (N, C, H, W).

    It is tried on numbers: names tell little of what is normalized, and how eps is added.
    """
    weight, bias = getattr(module, "weight", None), getattr(module, "bias", None)
    if not own_code(module) or "LayerNorm" not in type(module).__name__ or swap_refusal(module) is not None:
        return False
    if not isinstance(weight, nn.Parameter) or not isinstance(bias, nn.Parameter) or weight.dim() != 1:
        return False
    if not weight.is_cpu or weight.shape != bias.shape or not isinstance(getattr(module, "eps", None), float):
        return False
    trial = copy.deepcopy(module).eval().double()
    channels = weight.numel()
    with torch.no_grad():
        trial.weight.copy_(torch.arange(channels).cos() + 1.5)
        trial.bias.copy_(torch.arange(channels).sin())
        # Some pixels with a variance near eps.
        size = torch.tensor([1.0, 3.0, 0.1, module.eps**0.5])
        numbers = torch.arange(2 * channels * 12, dtype=torch.float64).square() * 0.37
        images = numbers.sin().view(2, channels, 3, 4) * size + 0.5
        try:
            output = trial(images)
        except Exception:  # whatever its author raises for images
            return False
        expected = torch_channel_norm(images, trial.weight, trial.bias, module.eps, None, 0.0)
    return isinstance(output, Tensor) and output.shape == expected.shape and torch.allclose(output, expected)


class ChannelNorm(Swapped):
    """Precedes such a module's class among the bases; ``merged`` names the activation behind it, with its slope."""

    merged: tuple[str | None, float] = (None, 0.0)

    def forward(self, input: Tensor) -> Tensor:
        activation, negative_slope = self.merged
        if _is_native(input, self.weight, self.bias):
            return channel_norm(input, self.weight, self.bias, self.eps, activation, negative_slope)
        output = super().forward(input)
        return output if activation is None else ACTIVATIONS[activation](output, negative_slope)


def _is_native(input: Tensor, weight: Tensor, bias: Tensor) -> bool:
    return (
        type(input) is Tensor
        and input.dim() == 4
        and input.numel() >= FEWEST_ELEMENTS
        and input.shape[1] == weight.numel()
        and input.dtype == weight.dtype
        and not needs_grad(input, weight, bias)
        and not torch.compiler.is_compiling()
        and dispatch.requested(None) in ("auto", "native")
        and dispatch.native_refusal(input) is None
    )
