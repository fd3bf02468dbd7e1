"""Transposed convolution modules: torch's, with the batch norm and activation that follow computed in the same pass."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .. import ops
from ..backends.autograd import in_transform
from ..backends.reference.conv_transpose import ACTIVATIONS
from .batch_norm import convolve_and_normalize, normalize


class _FusedConvTranspose:
    """What the three classes share; it precedes torch's class among their bases."""

    def __init__(
        self,
        in_channels,
        out_channels,
        kernel_size,
        stride=1,
        padding=0,
        output_padding=0,
        groups=1,
        bias=True,
        dilation=1,
        padding_mode="zeros",
        device=None,
        dtype=None,
        *,
        norm: str | None = None,
        activation: str | None = None,
        negative_slope: float = 0.01,
    ) -> None:
        if norm not in (None, "batch"):
            raise ValueError(f'norm must be None or "batch", but is {norm!r}')
        if activation is not None and activation not in ACTIVATIONS:
            raise ValueError(f"activation must be None or one of {', '.join(ACTIVATIONS)}, but is {activation!r}")
        super().__init__(
            in_channels, out_channels, kernel_size, stride, padding, output_padding, groups, bias, dilation,
            padding_mode, device, dtype,
        )  # fmt: skip
        self.norm = self.norm_class(out_channels, device=device, dtype=dtype) if norm else None
        self.activation = activation
        self.negative_slope = negative_slope

    def forward(self, input: Tensor, output_size: list[int] | None = None) -> Tensor:
        """(N, C, *spatial), or without N if there is no norm; ``output_size`` settles ambiguous sizes, as in torch."""
        return self.fused(input, output_size, self.norm, self.activation, self.negative_slope)

    def fused(
        self,
        input: Tensor,
        output_size: list[int] | None = None,
        norm: nn.Module | None = None,
        activation: str | None = None,
        negative_slope: float = 0.01,
    ) -> Tensor:
        """The convolution, then ``norm`` and ``activation``: in one pass unless the norm needs batch statistics.

        ``norm`` is any torch batch norm of ``out_channels``, this module's own or one that follows it.
        """
        dims = len(self.kernel_size)
        padding = self._output_padding(
            input, output_size, self.stride, self.padding, self.kernel_size, dims, self.dilation
        )
        geometry = (self.stride, self.padding, tuple(padding), self.groups, self.dilation)
        if norm is None:
            return self.op(
                input, self.weight, self.bias, *geometry, activation=activation, negative_slope=negative_slope
            )
        if input.dim() != dims + 2 or in_transform():  # runtimes fold a norm that they recognize as one
            return normalize(norm, self.op(input, self.weight, self.bias, *geometry), activation, negative_slope)
        if norm.training or norm.running_mean is None:
            return convolve_and_normalize(self, norm, input, geometry, activation, negative_slope)
        scale, shift = inference_affine(norm)
        return self.op(
            input, self.weight, self.bias, *geometry, scale=scale, shift=shift,
            activation=activation, negative_slope=negative_slope,
        )  # fmt: skip

    def extra_repr(self) -> str:
        text = super().extra_repr()
        if self.activation == "leaky_relu":
            return f"{text}, activation=leaky_relu, negative_slope={self.negative_slope}"
        return text if self.activation is None else f"{text}, activation={self.activation}"


def inference_affine(norm: nn.Module) -> tuple[Tensor, Tensor]:
    """``(scale, shift)``, (channels,) each, with ``norm(x) = scale * x + shift`` per channel, from running statistics.

    Computed at every call (a few microseconds): nothing can be stale, whatever wrote to the statistics. Half types are
    computed in, and returned as, float32.
    """
    mean, var, weight, bias = norm.running_mean, norm.running_var, norm.weight, norm.bias
    if mean.dtype in (torch.float16, torch.bfloat16):
        mean, var, weight, bias = (None if t is None else t.float() for t in (mean, var, weight, bias))
    scale = torch.rsqrt(var + norm.eps)
    if weight is not None:
        scale = scale * weight
    shift = -mean * scale if bias is None else torch.addcmul(bias, mean, scale, value=-1)
    return scale, shift


class ConvTranspose1d(_FusedConvTranspose, nn.ConvTranspose1d):
    """``torch.nn.ConvTranspose1d`` with an optional batch norm and activation behind it.

    ``norm="batch"`` adds a ``BatchNorm1d`` (state-dict keys ``norm.*``; torch's own keys stay as they are), folded into
    the convolution's pass at inference and exactly torch's in training. ``activation`` is None, "relu", "leaky_relu"
    (``negative_slope``), "tanh", "sigmoid", "gelu" (exact) or "silu". Raises ValueError for other names.
    """

    op = staticmethod(ops.conv_transpose1d)
    norm_class = nn.BatchNorm1d


class ConvTranspose2d(_FusedConvTranspose, nn.ConvTranspose2d):
    """``torch.nn.ConvTranspose2d`` with an optional batch norm and activation behind it; see ``ConvTranspose1d``."""

    op = staticmethod(ops.conv_transpose2d)
    norm_class = nn.BatchNorm2d


class ConvTranspose3d(_FusedConvTranspose, nn.ConvTranspose3d):
    """``torch.nn.ConvTranspose3d`` with an optional batch norm and activation behind it; see ``ConvTranspose1d``."""

    op = staticmethod(ops.conv_transpose3d)
    norm_class = nn.BatchNorm3d
