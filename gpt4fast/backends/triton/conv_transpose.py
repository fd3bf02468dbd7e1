"""Transposed convolution by Triton kernels, with its gradients. Shapes as in the reference.

Never run on a GPU so far: the kernels are tested by Triton's interpreter, and compiled for sm_80, sm_90 and sm_100.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from ..autograd import needs_grad
from ..reference.conv_transpose import epilogue, memory_format, output_sizes
from . import conv_transpose_config as config
from . import tuning
from .availability import triton_refusal
from .device import capability_of, processors_of


def refusal(call: dict) -> str | None:
    """Why the kernels can't serve a call that ``ops.conv_transpose.prepare`` made, or None."""
    input, weight, groups = call["input"], call["weight"], call["groups"]
    reason = triton_refusal(input)
    if reason is not None:
        return reason
    sizes = output_sizes(
        input.shape[2:], weight.shape[2:], call["stride"], call["padding"], call["output_padding"], call["dilation"]
    )
    image = math.prod(sizes) * weight.shape[1] * groups
    pixels = input.shape[0] * max(input.shape[2:].numel(), math.prod(sizes))
    if max(image, pixels, _reach(input[0]) if len(input) else 0, _reach(weight)) >= 2**30:
        return "the Triton kernels count an image's elements, all images' pixels and the weight's elements in 32 bits"
    if groups >= 2**16:  # a grid's second dimension
        return "the Triton kernels take fewer than 65536 groups"
    return None


def _reach(tensor: Tensor) -> int:
    """How many elements of memory a tensor spans."""
    return sum((n - 1) * s for n, s in zip(tensor.shape, tensor.stride(), strict=True)) + 1


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
    """(N, Cout, *out), computed and finished in one pass.

    Where a gradient is wanted, the epilogue is torch's: its derivatives need what stands between.
    """
    geometry = stride, padding, output_padding, groups, dilation
    if not needs_grad(input, weight, bias, scale, shift):
        return _forward(input, weight, bias, *geometry, scale, shift, activation, negative_slope)
    output = _ConvTranspose.apply(input, weight, bias, *geometry)
    return epilogue(output, scale, shift, activation, negative_slope).to(output.dtype)


class _ConvTranspose(torch.autograd.Function):
    @staticmethod
    def forward(ctx, input, weight, bias, stride, padding, output_padding, groups, dilation):
        ctx.save_for_backward(input, weight)
        ctx.geometry = stride, padding, output_padding, groups, dilation
        return _forward(input, weight, bias, *ctx.geometry, None, None, None, 0.0)

    @staticmethod
    def backward(ctx, grad):
        input, weight = ctx.saved_tensors
        stride, padding, output_padding, groups, dilation = ctx.geometry
        needs_input, needs_weight, needs_bias = ctx.needs_input_grad[:3]
        grad_bias = grad.sum([0, *range(2, grad.dim())]) if needs_bias else None
        if torch.is_grad_enabled():  # create_graph=True: torch's kernels have derivatives
            mask = [needs_input, needs_weight, False]
            grad_input, grad_weight, _ = torch.ops.aten.convolution_backward(
                grad, input, weight, None, stride, padding, dilation, True, output_padding, groups, mask
            )
        else:
            adjoint = input, weight, stride, padding, groups, dilation
            grad_input = _input_gradient(grad, *adjoint) if needs_input else None
            grad_weight = _weight_gradient(grad, *adjoint) if needs_weight else None
        return grad_input, grad_weight, grad_bias, *(None,) * 5


# The launches are opaque to torch.compile, which does not look into the interpreter, nor fuse anything with them.


@torch.library.custom_op("gpt4fast::triton_conv_transpose", mutates_args=())
def _forward(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    output_padding: Sequence[int],
    groups: int,
    dilation: Sequence[int],
    scale: Tensor | None,
    shift: Tensor | None,
    activation: str | None,
    negative_slope: float,
) -> Tensor:
    output = _empty_output(input, weight, stride, padding, output_padding, groups, dilation)
    # The only source along a dimension, whatever the stride, meets each output by one tap: a phase for each.
    up = [
        s if n > 1 else d * (k - 1) + 1
        for n, k, s, d in zip(input.shape[2:], weight.shape[2:], stride, dilation, strict=True)
    ]
    axes = up, [1] * len(up), padding, dilation
    _convolve(input, weight, output, groups, False, *axes, bias, scale, shift, activation, negative_slope)
    return output


@torch.library.custom_op("gpt4fast::triton_conv_transpose_input_gradient", mutates_args=())
def _input_gradient(
    grad: Tensor,
    input: Tensor,
    weight: Tensor,
    stride: Sequence[int],
    padding: Sequence[int],
    groups: int,
    dilation: Sequence[int],
) -> Tensor:
    output = torch.empty_like(input, memory_format=memory_format(input, weight))
    axes = [1] * len(stride), stride, [-p for p in padding], [-d for d in dilation]
    _convolve(grad, weight, output, groups, True, *axes)
    return output


@torch.library.custom_op("gpt4fast::triton_conv_transpose_weight_gradient", mutates_args=())
def _weight_gradient(
    grad: Tensor,
    input: Tensor,
    weight: Tensor,
    stride: Sequence[int],
    padding: Sequence[int],
    groups: int,
    dilation: Sequence[int],
) -> Tensor:
    from . import conv_transpose_kernels as kernels

    depthwise = _is_depthwise(weight, groups)
    channels, outputs, groups = (1, groups, 1) if depthwise else (weight.shape[0] // groups, weight.shape[1], groups)
    input, grad = (_lift(t) if depthwise else _channels_last(_lift(t)) for t in (input, grad))
    kernel, taps = weight.shape[2:], weight.shape[2:].numel()
    pixels = input.shape[0] * input.shape[2:].numel()
    precision, tensor_cores = _precision(input.dtype)
    if depthwise:
        tile = config.depthwise_tile(pixels, outputs, input.stride(1) == 1)
    else:
        tile = config.weight_gradient_tile(
            channels, outputs, pixels, input.element_size(), tensor_cores, capability_of(input)
        )
    block = tile["BLOCK_M"] if depthwise else tile["BLOCK_K"]
    programs = config.ceil_div(channels, tile["BLOCK_M"]) * config.ceil_div(outputs, tile["BLOCK_N"]) * taps
    each = config.pixels_per_program(pixels, block, programs * groups, processors_of(input))
    parts = input.new_empty(
        config.ceil_div(pixels, each), *weight.shape[:1], *kernel, weight.shape[1], dtype=torch.float32
    )
    if parts.numel():
        with torch.cuda.device_of(input):
            kernels.weight_gradient_kernel[programs, groups, len(parts)](
                input, grad, parts, pixels, each, channels, outputs, tuple(input.shape[2:]), tuple(grad.shape[2:]),
                input.stride(), grad.stride(), KERNEL=_threefold(kernel, 1), STRIDE=_threefold(stride, 1),
                PADDING=_threefold(padding, 0), DILATION=_threefold(dilation, 1), DEPTHWISE=depthwise,
                PRECISION=precision, **tile,
            )  # fmt: skip
    return torch.empty_like(weight).copy_((parts[0] if len(parts) == 1 else parts.sum(0)).movedim(-1, 1))


@_forward.register_fake
def _(input, weight, bias, stride, padding, output_padding, groups, dilation, *epilogue):
    return _empty_output(input, weight, stride, padding, output_padding, groups, dilation)


@_input_gradient.register_fake
def _(grad, input, weight, stride, padding, groups, dilation):
    return torch.empty_like(input, memory_format=memory_format(input, weight))


@_weight_gradient.register_fake
def _(grad, input, weight, stride, padding, groups, dilation):
    return torch.empty_like(weight)


def _empty_output(input, weight, stride, padding, output_padding, groups, dilation) -> Tensor:
    sizes = output_sizes(input.shape[2:], weight.shape[2:], stride, padding, output_padding, dilation)
    shape = input.shape[0], weight.shape[1] * groups, *sizes
    return torch.empty(shape, dtype=input.dtype, device=input.device, memory_format=memory_format(input, weight))


def _convolve(
    source: Tensor,
    weight: Tensor,
    output: Tensor,
    groups: int,
    adjoint: bool,
    up: Sequence[int],
    down: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    bias: Tensor | None = None,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    activation: str | None = None,
    negative_slope: float = 0.0,
) -> None:
    """Write (N, channels, *out) to ``output``: the transposed convolution of ``source``, or the adjoint."""
    from . import conv_transpose_kernels as kernels

    if output.numel() == 0:
        return
    depthwise = _is_depthwise(weight, groups)
    source, weight, output = _lift(source), _lift(weight), _lift(output)
    channels = source.shape[1] // groups
    outputs = output.shape[1] // groups
    if depthwise:
        channels, outputs, groups = 1, output.shape[1], 1
        weight_strides = 0, 0, weight.stride(0)
    else:
        # A tile is fetched along channels: only there can Triton see that elements are neighbours.
        source, weight = _channels_last(source), _channels_last(weight)
        along = weight.stride()[:2]
        weight_strides = (weight.shape[0] // groups * along[0], *(reversed(along) if adjoint else along))
    kernel = weight.shape[2:]
    up, down, dilation = (_threefold(t, 1) for t in (up, down, dilation))
    padding = _threefold(padding, 0)
    steps = tuple(u // math.gcd(u, d) for u, d in zip(up, dilation, strict=True))
    inverses = tuple(
        pow(d // math.gcd(u, d), -1, step) for u, d, step in zip(up, dilation, steps, strict=True)
    )  # of 1 step 0
    places = tuple(config.ceil_div(n, u) for n, u in zip(output.shape[2:], up, strict=True))
    pixels, phases = output.shape[0] * math.prod(places), math.prod(up)
    channels_last = output.stride(1) == 1
    precision, tensor_cores = _precision(source.dtype)
    if depthwise:
        tile = config.depthwise_tile(pixels, outputs, channels_last)
    else:
        tile = config.convolution_tile(
            pixels, outputs, channels, phases * groups, source.element_size(), tensor_cores, capability_of(source),
            processors_of(source),
        )  # fmt: skip

    def launch(tile: dict[str, int]) -> None:
        grid = config.ceil_div(pixels, tile["BLOCK_M"]) * phases, config.ceil_div(outputs, tile["BLOCK_N"]), groups
        kernels.convolution_kernel[grid](
            source, weight, output, bias, scale, shift, source.shape[0], channels, outputs, tuple(source.shape[2:]),
            tuple(output.shape[2:]), places, source.stride(), (*weight_strides, *weight.stride()[2:]),
            output.stride(), float(negative_slope), KERNEL=tuple(kernel), UP=up, DOWN=down, PADDING=padding,
            DILATION=dilation, STEP=steps, INVERSE=inverses, ACTIVATION=activation, DEPTHWISE=depthwise,
            CHANNELS_LAST=channels_last, PRECISION=precision, **tile,
        )  # fmt: skip

    sizes = pixels.bit_length(), outputs.bit_length(), channels.bit_length(), groups.bit_length()
    features = tuple(kernel), up, down, dilation, depthwise, channels_last, precision, str(source.dtype)
    with torch.cuda.device_of(source):
        launch(tuning.fastest("convolution", (*sizes, *features), tile, launch, source))


def _is_depthwise(weight: Tensor, groups: int) -> bool:
    return weight.shape[0] == groups and weight.shape[1] == 1


def _threefold(values: Sequence[int], fill: int) -> tuple[int, ...]:
    return (*(fill,) * (3 - len(values)), *values)


def _lift(tensor: Tensor) -> Tensor:
    """(N, C, *spatial) with leading spatial dimensions of size 1 up to three."""
    return tensor.view(*tensor.shape[:2], *_threefold(tensor.shape[2:], 1))


def _channels_last(tensor: Tensor) -> Tensor:
    if tensor.stride(1) == 1 or tensor.shape[1] == 1:
        return tensor
    return tensor.contiguous(memory_format=torch.channels_last_3d)


def _precision(dtype: torch.dtype) -> tuple[str, bool]:
    """How products of float32 are rounded, as torch's convolutions do, and whether tensor cores compute them."""
    if dtype == torch.float32 and torch.backends.cudnn.conv.fp32_precision != "tf32":
        return "ieee", False
    return "tf32", True
