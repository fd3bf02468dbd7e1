"""Adapters to the compiled ``gpt4fast::conv_transpose_forward`` and ``gpt4fast::affine_activation``, with their shape
rules; the gradients stand in ``conv_transpose_gradients.py``."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from .. import native
from ..aten.conv_transpose import FUNCTIONS
from ..autograd import needs_grad
from ..reference.conv_transpose import epilogue, memory_format, output_sizes
from . import conv_transpose_gradients as gradients
from .conv_transpose_gradients import FEWEST_CHANNELS, convolutions_take_tf32
from .packed_weights import is_kept, packed_weight
from .winograd import winograd_wins


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
    """(N, Cout, *out), computed and finished in one pass by the native kernel.

    Where a gradient is wanted, the epilogue is torch's: its derivatives need what stands between.
    """
    settings = stride, padding, output_padding, groups, dilation
    has_epilogue = scale is not None or shift is not None or activation is not None
    if has_epilogue and needs_grad(input, weight, bias, scale, shift):
        output = _bind(input, weight, settings, None, 0.0)(input, weight, bias, None, None)
        return epilogue(output, scale, shift, activation, negative_slope).to(output.dtype)
    return _bind(input, weight, settings, activation, negative_slope)(input, weight, bias, scale, shift)


def bind(call: dict) -> Callable[..., Tensor]:
    """``conv_transpose`` for other tensors like a call's that wants no gradient: a function of (input, weight, bias,
    scale, shift)."""
    settings = [call[name] for name in ("stride", "padding", "output_padding", "groups", "dilation")]
    return _bind(call["input"], call["weight"], settings, call["activation"], call["negative_slope"])


def _bind(input: Tensor, weight: Tensor, settings: Sequence, activation: str | None, negative_slope: float):
    stride, *_, groups, dilation = settings
    channels_last = memory_format(input, weight) != torch.contiguous_format
    kept = input.is_cpu and is_kept(weight)
    winograd = input.is_cpu and winograd_wins(input, weight, stride, groups, dilation, kept)
    tf32 = not input.is_cpu and convolutions_take_tf32()
    last = activation or "none", negative_slope, channels_last

    def run(input: Tensor, weight: Tensor, bias: Tensor | None, scale: Tensor | None, shift: Tensor | None) -> Tensor:
        packed = packed_weight(weight, groups, winograd) if kept else None
        inputs = input, weight, bias, *settings, scale, shift, *last, packed, winograd, tf32
        if needs_grad(input, weight, bias, scale, shift) and not torch.compiler.is_compiling():
            return _ConvTranspose.apply(*inputs)
        return torch.ops.gpt4fast.conv_transpose_forward(*inputs)

    return run


def cuda_conv_transpose(
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
    """``conv_transpose`` on a GPU. Of groups with few channels tensor cores would compute mostly padding: cuDNN
    convolves them, and bias, scale, shift and activation are one pass over its output."""
    settings = stride, padding, output_padding, groups, dilation
    if not _has_few_channels(weight, groups):
        return conv_transpose(input, weight, bias, *settings, scale, shift, activation, negative_slope)
    output = FUNCTIONS[input.dim() - 2](input, weight, None, *settings)
    return torch.ops.gpt4fast.affine_activation(output, bias, scale, shift, activation or "none", negative_slope)


def _has_few_channels(weight: Tensor, groups: int) -> bool:
    return groups > 1 and min(weight.shape[0] // groups, weight.shape[1]) < FEWEST_CHANNELS


def cuda_conv_transpose_with_statistics(
    input, weight, bias, stride, padding, output_padding, groups, dilation, eps
) -> tuple[Tensor, ...]:
    """See ``dispatch.conv_transpose_with_statistics``."""
    geometry = stride, padding, output_padding, groups, dilation
    if _has_few_channels(weight, groups):
        output = cuda_conv_transpose(input, weight, bias, *geometry, None, None, None, 0.0)
        return output, *torch.ops.gpt4fast.batch_statistics(output.detach(), eps)
    channels_last = memory_format(input, weight) != torch.contiguous_format
    return torch.ops.gpt4fast.conv_transpose_with_statistics(
        input, weight, bias, *geometry, channels_last, eps, convolutions_take_tf32()
    )


def _fake_conv_transpose(
    input,
    weight,
    bias,
    stride,
    padding,
    output_padding,
    groups,
    dilation,
    scale,
    shift,
    activation,
    slope,
    channels_last,
    packed=None,
    winograd=False,
    tf32=False,
):
    sizes = output_sizes(input.shape[2:], weight.shape[2:], stride, padding, output_padding, dilation)
    output = input.new_empty(input.shape[0], weight.shape[1] * groups, *sizes)
    if not channels_last:
        return output
    return output.to(memory_format=torch.channels_last if output.dim() == 4 else torch.channels_last_3d)


def _fake_with_statistics(input, weight, bias, *settings):
    *geometry, channels_last, _, _ = settings
    output = _fake_conv_transpose(input, weight, bias, *geometry, None, None, "none", 0.0, channels_last)
    return output, *(output.new_empty(output.shape[1], dtype=torch.float32) for _ in range(3))


def _fake_backward(grad, input, weight, *settings):
    channels_last, needs_input_grad, needs_weight_grad = settings[5:8]
    layout = torch.contiguous_format
    if channels_last:
        layout = torch.channels_last if input.dim() == 4 else torch.channels_last_3d
    return (
        torch.empty_like(input, memory_format=layout) if needs_input_grad else input.new_empty(0),
        torch.empty_like(weight, memory_format=torch.contiguous_format) if needs_weight_grad else weight.new_empty(0),
    )


class _ConvTranspose(torch.autograd.Function):
    """The derivative of the registered op without the Python that ``torch.library`` puts around each call, which
    torch.compile needs and which costs 60 us."""

    @staticmethod
    def forward(ctx, *inputs):
        with torch._C._AutoDispatchBelowAutograd():
            output = torch.ops.gpt4fast.conv_transpose_forward.default(*inputs)
        gradients.setup_conv_transpose(ctx, inputs, output)
        return output

    backward = staticmethod(gradients.backward_conv_transpose)


native.load()
if native.cpu_library_error() is None:
    torch.library.register_fake("gpt4fast::conv_transpose_forward", _fake_conv_transpose)
    torch.library.register_autograd(
        "gpt4fast::conv_transpose_forward",
        gradients.backward_conv_transpose,
        setup_context=gradients.setup_conv_transpose,
    )
    torch.library.register_fake("gpt4fast::conv_transpose_with_statistics", _fake_with_statistics)
    torch.library.register_autograd(
        "gpt4fast::conv_transpose_with_statistics",
        gradients.backward_with_statistics,
        setup_context=gradients.setup_with_statistics,
    )
    torch.library.register_fake("gpt4fast::conv_transpose_backward", _fake_backward)
    torch.library.register_fake("gpt4fast::affine_activation", lambda input, *_: torch.empty_like(input))
    torch.library.register_autograd(
        "gpt4fast::affine_activation", gradients.backward_affine, setup_context=gradients.setup_affine
    )
