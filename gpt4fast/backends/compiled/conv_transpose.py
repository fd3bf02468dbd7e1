"""Adapters to the compiled ``gpt4fast::conv_transpose_forward`` and ``gpt4fast::affine_activation``, with their shape
rules and gradients."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from .. import native
from ..aten.conv_transpose import FUNCTIONS
from ..autograd import needs_grad
from ..reference.conv_transpose import ACTIVATIONS, epilogue, memory_format, output_sizes
from .packed_weights import is_kept, packed_weight

FEWEST_CHANNELS = 8  # of a group, for the CUDA kernel: 16 bytes of a half type


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


def convolutions_take_tf32() -> bool:
    """Whether torch's convolutions round float32 on a GPU to TF32."""
    return torch.backends.cudnn.conv.fp32_precision == "tf32"


# Dynamo of torch 2.11 can't trace torch's own setting. This is torch.compiler.assume_constant_result, which would
# import Dynamo, and Triton with it.
convolutions_take_tf32._dynamo_marked_constant = True


def winograd_wins(input: Tensor, weight: Tensor, stride, groups: int, dilation, kept: bool) -> bool:
    """Whether Winograd's algorithm is faster than the products themselves: 1.1 to 1.2 times in one dimension, 1.1 to
    1.5 in two and three (benchmarks/LOG.md).

    Its weights take long to bring into order, and twice to thrice the memory to read: there must be enough pixels for
    them. In bfloat16 the sums and differences would be too coarse.
    """
    dims = len(stride)
    channels = input.shape[1]
    tiles = input.numel() // max(1, channels) >> dims
    if tiles < (32 if kept else 256) or input.dtype == torch.bfloat16:
        return False
    return channels >= 32 * groups and weight.shape[1] >= 16 and _has_winograd_kernel(weight, stride, dilation)


def winograd_wins_backward(coarse: torch.Size, weight: Tensor, stride, groups: int, dilation) -> bool:
    """Whether it is faster for the adjoint, a convolution that gives images (N, C, *spatial) of this shape: 1.07 to 1.4
    times in one and two dimensions, 1.0 in three."""
    tiles = coarse[0] * coarse[2:].numel() >> len(stride)
    if tiles < 256 or len(stride) > 2 or weight.dtype == torch.bfloat16:
        return False
    return coarse[1] >= 16 * groups and weight.shape[1] >= 32 and _has_winograd_kernel(weight, stride, dilation)


def _has_winograd_kernel(weight: Tensor, stride, dilation) -> bool:
    kernel = weight.shape[2:]
    twice = all(k == 2 * s and s > 1 and d == 1 for k, s, d in zip(kernel, stride, dilation, strict=True))
    return twice and kernel.numel() <= 64


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
    if min(weight.shape[0] // groups, weight.shape[1]) >= FEWEST_CHANNELS or groups == 1:
        return conv_transpose(input, weight, bias, *settings, scale, shift, activation, negative_slope)
    output = FUNCTIONS[input.dim() - 2](input, weight, None, *settings)
    return torch.ops.gpt4fast.affine_activation(output, bias, scale, shift, activation or "none", negative_slope)


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


def _fake_backward(
    grad,
    input,
    weight,
    stride,
    padding,
    output_padding,
    groups,
    dilation,
    channels_last,
    needs_input_grad,
    needs_weight_grad,
    winograd=False,
):
    layout = torch.contiguous_format
    if channels_last:
        layout = torch.channels_last if input.dim() == 4 else torch.channels_last_3d
    return (
        torch.empty_like(input, memory_format=layout) if needs_input_grad else input.new_empty(0),
        torch.empty_like(weight, memory_format=torch.contiguous_format) if needs_weight_grad else weight.new_empty(0),
    )


def _affine_activation(output, bias, scale, shift, activation, negative_slope):
    """The epilogue in differentiable torch operations."""
    if bias is not None:
        output = output + bias.view(-1, *(1,) * (output.dim() - 2))
    return epilogue(output, scale, shift, None if activation == "none" else activation, negative_slope)


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
    """Gradients of ``_affine_activation`` for output, bias, scale and shift, the latter three None where absent."""
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


def _setup_conv_transpose(ctx, inputs, output):
    input, weight, bias, *geometry, scale, shift, activation, slope, _, _, _, _ = inputs
    ctx.save_for_backward(input, weight, bias, scale, shift)
    ctx.settings = geometry, activation, slope


def _backward_conv_transpose(ctx, grad):
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
        return torch.ops.gpt4fast.conv_transpose_backward(
            grad, input, weight, stride, padding, output_padding, groups, dilation, channels_last,
            needs_input, needs_weight, winograd,
        )  # fmt: skip

    def theirs(needs_input: bool, needs_weight: bool) -> list[Tensor | None]:
        mask = [needs_input, needs_weight, False]
        return torch.ops.aten.convolution_backward(
            grad, input, weight, None, stride, padding, dilation, True, output_padding, groups, mask
        )[:2]

    winograd = input.is_cpu and winograd_wins_backward(input.shape, weight, stride, groups, dilation)
    wins = _native_wins(input, weight, padding, groups, dilation, winograd)
    grad_input, grad_weight = gradients(ours, theirs, wins, ctx.needs_input_grad[:2])
    return grad_input, grad_weight, grad_bias, *(None,) * 5, grad_scale, grad_shift, *(None,) * 6


class _ConvTranspose(torch.autograd.Function):
    """The derivative of the registered op without the Python that ``torch.library`` puts around each call, which
    torch.compile needs and which costs 60 us."""

    @staticmethod
    def forward(ctx, *inputs):
        with torch._C._AutoDispatchBelowAutograd():
            output = torch.ops.gpt4fast.conv_transpose_forward.default(*inputs)
        _setup_conv_transpose(ctx, inputs, output)
        return output

    backward = staticmethod(_backward_conv_transpose)


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
    if not input.is_cpu:
        return [False, False]  # there are no such kernels yet
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


def _setup_affine(ctx, inputs, output):
    *tensors, activation, slope = inputs
    ctx.save_for_backward(*tensors)
    ctx.settings = activation, slope


def _backward_affine(ctx, grad):
    return *_affine_backward(grad, *ctx.saved_tensors, *ctx.settings), None, None


native.load()
if native.cpu_library_error() is None:
    torch.library.register_fake("gpt4fast::conv_transpose_forward", _fake_conv_transpose)
    torch.library.register_autograd(
        "gpt4fast::conv_transpose_forward", _backward_conv_transpose, setup_context=_setup_conv_transpose
    )
    torch.library.register_fake("gpt4fast::conv_transpose_backward", _fake_backward)
    torch.library.register_fake("gpt4fast::affine_activation", lambda input, *_: torch.empty_like(input))
    torch.library.register_autograd("gpt4fast::affine_activation", _backward_affine, setup_context=_setup_affine)
