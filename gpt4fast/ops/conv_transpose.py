"""Transposed convolution (also called deconvolution) with torch's signature and a fused per-channel epilogue."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ..backends import dispatch
from ..backends.autograd import known
from ..backends.compiled import conv_transpose as compiled_conv_transpose
from ..backends.reference.conv_transpose import ACTIVATIONS
from ..backends.triton import conv_transpose as triton_conv_transpose
from .checks import (
    autocast_dtype,
    check_device,
    check_finite,
    check_like,
    check_tensor,
    describe,
    is_integer,
    to_tuple,
    without_autocast,
)
from .repeated import RepeatedCalls, key_of

Size = int | tuple[int, ...]


def _shared_doc(dims: int) -> str:
    spatial = ("L", "H, W", "D, H, W")[dims - 1]
    kernel = ", ".join(f"k{i}" for i in range(dims)) if dims > 1 else "k"
    return f"""``activation(scale * (conv_transpose{dims}d(input, weight) + bias) + shift)``, fused.

    Transposed convolution is also called deconvolution or fractionally strided convolution. The arguments before the
    star are torch's. First and second derivatives are supported; the output's memory layout follows torch's.

    Args:
        input: (N, C, {spatial}) or (C, {spatial}); float16, bfloat16, float32 or float64.
        weight: (C, Cout / groups, {kernel}), input's dtype.
        bias: (Cout,), input's dtype.
        stride, padding, output_padding, dilation: int, or one int per spatial dimension. output_padding must be
            smaller than stride or dilation.
        groups: number of blocked connections from input to output channels.
        scale, shift: (Cout,), applied after the bias: a batch norm at inference, for instance. In input's dtype or
            float32.
        activation: None, "relu", "leaky_relu", "tanh", "sigmoid", "gelu" (exact) or "silu".
        negative_slope: of leaky_relu.
        impl: "auto" (default), "native", "triton", "cuda", "reference" or "torch"; see ``gpt4fast.explain``.

    Returns:
        (N, Cout, *out), ``out = (size - 1) * stride - 2 * padding + dilation * (kernel - 1) + output_padding + 1``.

    Raises:
        TypeError, ValueError: an argument has the wrong type, dtype, shape or range; the message names it.
        RuntimeError: ``impl`` names an implementation that can't serve this call; the message says why.

    Reference: Dumoulin and Visin, "A guide to convolution arithmetic for deep learning", 2016.
    """


def _define(dims: int):
    def conv_transpose(
        input: Tensor,
        weight: Tensor,
        bias: Tensor | None = None,
        stride: Size = 1,
        padding: Size = 0,
        output_padding: Size = 0,
        groups: int = 1,
        dilation: Size = 1,
        *,
        scale: Tensor | None = None,
        shift: Tensor | None = None,
        activation: str | None = None,
        negative_slope: float = 0.01,
        impl: str | None = None,
    ) -> Tensor:
        tensors = input, weight, bias, scale, shift
        settings = dims, stride, padding, output_padding, groups, dilation, activation, negative_slope
        key = key_of(tensors, settings, impl)
        bound = _REPEATED.get(key)
        if bound is not None:
            return bound(*tensors)
        call = prepare(
            dims, input, weight, bias, stride, padding, output_padding, groups, dilation, scale, shift, activation,
            negative_slope,
        )  # fmt: skip
        if key is not None:
            implementation = dispatch.choose(dispatch.CONV_TRANSPOSE, impl, call)
            return _REPEATED.keep(key, _bind(implementation, call, input.dim() == dims + 2))(*tensors)
        return run(call, input, dims, impl)

    conv_transpose.__name__ = conv_transpose.__qualname__ = f"conv_transpose{dims}d"
    conv_transpose.__doc__ = _shared_doc(dims)
    return conv_transpose


conv_transpose1d = _define(1)
conv_transpose2d = _define(2)
conv_transpose3d = _define(3)


_REPEATED = RepeatedCalls()
_BINDERS = {"native": compiled_conv_transpose.bind, "triton": triton_conv_transpose.bind}


def _bind(implementation: str, call: dict, is_batched: bool) -> Callable[..., Tensor]:
    """A prepared call as a function of (input, weight, bias, scale, shift), as the caller gives them."""
    if implementation in _BINDERS:
        compute = _BINDERS[implementation](call)
    else:
        run = dispatch.CONV_TRANSPOSE.candidates[implementation].run
        geometry = [call[name] for name in ("stride", "padding", "output_padding", "groups", "dilation")]
        last = call["activation"], call["negative_slope"]

        def compute(input, weight, bias, scale, shift):
            return run(input, weight, bias, *geometry, scale, shift, *last)

    return compute if is_batched else lambda input, *others: compute(input.unsqueeze(0), *others).squeeze(0)


def run(call: dict, input: Tensor, dims: int, impl: str | None) -> Tensor:
    """Compute a prepared call and give the result the caller's number of dimensions."""
    output = without_autocast(lambda: dispatch.run(dispatch.CONV_TRANSPOSE, impl, call), input)
    return output if input.dim() == dims + 2 else output.squeeze(0)


def prepare(
    dims: int,
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: Size,
    padding: Size,
    output_padding: Size,
    groups: int,
    dilation: Size,
    scale: Tensor | None,
    shift: Tensor | None,
    activation: str | None,
    negative_slope: float,
) -> dict:
    """Check every argument and bring them to the form that implementations take: batched input, tuples of ints."""
    check_tensor("input", input)
    check_tensor("weight", weight)
    check_device("weight", weight, "input", input)
    if input.dim() not in (dims + 1, dims + 2):
        raise ValueError(f"input must have {dims + 1} (unbatched) or {dims + 2} dimensions, but is {describe(input)}")
    if weight.dim() != dims + 2:
        raise ValueError(
            f"weight must have {dims + 2} dimensions (C, Cout / groups, *kernel), but is {describe(weight)}"
        )
    cast = autocast_dtype(input)
    if cast is not None:
        input, weight, bias = (t.to(cast) if isinstance(t, Tensor) else t for t in (input, weight, bias))
    check_like("weight", weight, "input", input)
    if not is_integer(groups):
        raise TypeError(f"groups must be an int, but is {describe(groups)}")
    batched = input if input.dim() == dims + 2 else input.unsqueeze(0)
    channels = batched.shape[1]
    if groups < 1 or channels % groups:
        raise ValueError(f"groups must be at least 1 and divide input's {channels} channels, but is {groups}")
    if weight.shape[0] != channels:
        raise ValueError(f"weight must have input's {channels} channels first, but is {describe(weight)}")
    if 0 in weight.shape or 0 in batched.shape[1:]:
        name, empty = ("weight", weight) if 0 in weight.shape else ("input", input)
        raise ValueError(f"{name} must have no empty dimension but the batch, but is {describe(empty)}")
    for name, vector in (("bias", bias), ("scale", scale), ("shift", shift)):
        if vector is not None:
            check_tensor(name, vector)
            check_device(name, vector, "input", input)
            if name == "bias" or vector.dtype != torch.float32:
                check_like(name, vector, "input", input)
            if tuple(vector.shape) != (weight.shape[1] * groups,):
                expected = f"({weight.shape[1] * groups},), one entry per output channel"
                raise ValueError(f"{name} must have shape {expected}, but is {describe(vector)}")
    call = {
        "input": batched,
        "weight": weight,
        "bias": bias,
        "stride": to_tuple("stride", stride, dims, 1),
        "padding": to_tuple("padding", padding, dims, 0),
        "output_padding": to_tuple("output_padding", output_padding, dims, 0),
        "groups": groups,
        "dilation": to_tuple("dilation", dilation, dims, 1),
        "scale": scale,
        "shift": shift,
        "activation": activation,
        "negative_slope": negative_slope,
    }
    _check_output(call)
    if activation is not None and (not isinstance(activation, str) or activation not in ACTIVATIONS):
        raise ValueError(f"activation must be None or one of {', '.join(ACTIVATIONS)}, but is {describe(activation)}")
    check_finite("negative_slope", negative_slope)
    return call


def _check_output(call: dict) -> None:
    """Per dimension: ``output_padding`` in range, an output that is not empty, and no overflow."""
    input, weight = call["input"], call["weight"]
    stride, padding, output_padding, dilation = (call[n] for n in ("stride", "padding", "output_padding", "dilation"))
    elements = input.shape[0] * weight.shape[1] * call["groups"]
    for d in range(input.dim() - 2):
        if output_padding[d] >= stride[d] and output_padding[d] >= dilation[d]:
            raise ValueError(
                f"output_padding must be smaller than stride or dilation, but is {output_padding} with stride {stride} "
                f"and dilation {dilation}"
            )
        # The size before padding cuts a margin off on both sides.
        size = (input.shape[d + 2] - 1) * stride[d] + dilation[d] * (weight.shape[d + 2] - 1) + output_padding[d] + 1
        if known(size <= 2 * padding[d]):
            raise ValueError(
                f"padding {padding} leaves an output of size {size - 2 * padding[d]} for {describe(input)}"
            )
        elements = elements * size
    if known(elements >= 2**60):
        raise ValueError(
            f"stride {stride} and dilation {dilation} give an output of {elements} elements, which overflows"
        )
