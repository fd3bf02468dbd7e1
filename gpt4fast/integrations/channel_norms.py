"""Layer norms over the channels of images, which every library writes for itself (``LayerNorm2d``), and the activation
behind them, in one pass."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn

from ..backends import dispatch, refusals
from ..backends.autograd import needs_grad
from ..backends.compiled.channel_norm import channel_norm, torch_channel_norm
from ..backends.reference.conv_transpose import ACTIVATIONS
from .swap import Swapped, own_code, swap_refusal

FEWEST_ELEMENTS = 1 << 13  # below, torch's calls take less time than ours


def channel_norm_eps(module: nn.Module) -> float | None:
    """What is added to the variance if a module, of any library, computes layer norm over dimension 1 of (N, C, H, W).

    None if it does anything else.

    A module with nothing but a weight and a bias is tried on numbers: names tell little of what is normalized.
    """
    parameters = dict(module.named_parameters())
    if not own_code(module) or swap_refusal(module) is not None or list(parameters) != ["weight", "bias"]:
        return None
    weight, bias = parameters.values()
    if list(module.children()) or list(module.buffers()) or weight.dim() != 1 or weight.shape != bias.shape:
        return None
    if not weight.is_cpu:
        return None
    trial, channels = copy.deepcopy(module).eval().double(), weight.numel()
    known = getattr(module, "eps", None)
    with torch.no_grad():
        trial.weight.copy_(torch.arange(channels).cos() + 1.5)
        trial.bias.copy_(torch.arange(channels).sin())
        # The last pixels of a row have a variance near eps.
        sizes = torch.tensor([1.0, 3.0, 0.1, 1e-3])
        numbers = torch.arange(2 * channels * 12, dtype=torch.float64).square() * 0.37
        images = numbers.sin().view(2, channels, 3, 4) * sizes + 0.5
        try:
            output = trial(images)
        except Exception:  # whatever its author raises for images
            return None
        for eps in (known,) if isinstance(known, float) else (1e-6, 1e-5):
            expected = torch_channel_norm(images, trial.weight, trial.bias, eps, None, 0.0)
            if isinstance(output, Tensor) and output.shape == expected.shape and torch.allclose(output, expected):
                return eps
    return None


class ChannelNorm(Swapped):
    """Precedes such a module's class among the bases; ``merged`` names the activation behind it, with its slope."""

    found_eps: float
    merged: tuple[str | None, float] = (None, 0.0)

    def forward(self, input: Tensor) -> Tensor:
        activation, negative_slope = self.merged
        if _is_native(input, self.weight, self.bias):
            return channel_norm(input, self.weight, self.bias, self.found_eps, activation, negative_slope)
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
        and refusals.native_refusal(input) is None
    )
