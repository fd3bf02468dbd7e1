"""The CUDA kernels of batch norm, emulated: values, statistics and gradients against float64, and the statistics that a
transposed convolution's epilogue takes."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from gpt4fast.backends.compiled.batch_norm import cuda_batch_norm_activation
from gpt4fast.backends.reference.conv_transpose import ACTIVATIONS

from . import test_conv_transpose as convolution

LAYOUTS = {4: torch.channels_last, 5: torch.channels_last_3d}
# Planes of odd size and of whole 16 bytes; channels that are whole 16 bytes, more than a block takes, and neither.
SHAPES = [(3, 13, 37), (2, 32, 4, 8), (2, 11, 3, 4, 2), (3, 280, 2, 1), (70, 9)]


@pytest.fixture(autouse=True)
def _cuda_ops(cuda_ops, monkeypatch):
    monkeypatch.setattr(torch.ops, "gpt4fast", cuda_ops)


def plain(x, weight, bias, activation):
    out = F.batch_norm(x, None, None, weight, bias, True, 0.0, 1e-5)
    return out if activation is None else ACTIVATIONS[activation](out, 0.2)


def ours(x, weight, bias, activation):
    return cuda_batch_norm_activation(x, weight, bias, 1e-5, activation, 0.2)[0]


def run(function, x, weight, bias, activation, grad, dtype):
    leaves = [t.detach().to(dtype).requires_grad_() for t in (x, weight, bias)]
    out = function(*leaves, activation)
    return [out.detach(), *torch.autograd.grad(out, leaves, grad.to(dtype))]


def check(x, activation):
    """At most twice as far from float64 as torch in the same dtype, plus what a rounding of the mean does to the
    channel of the smallest deviation, which decides the error. A plain sum of squares would err by its square."""
    weight, bias = torch.randn(2, x.shape[1]).to(x.dtype)
    # A gradient at a kink is decided by rounding.
    is_kink = plain(*(t.double() for t in (x, weight, bias)), None).abs() < 1e-3
    grad = torch.randn_like(x).masked_fill(is_kink, 0.0)
    arguments = x, weight, bias, activation, grad
    results = [run(f, *arguments, t) for f, t in ((ours, x.dtype), (plain, x.dtype), (plain, torch.float64))]
    assert results[0][0].stride() == x.stride()
    deviation, mean = torch.std_mean(x.double(), [0, *range(2, x.dim())], correction=0)
    condition = (mean / (deviation + 1e-5)).abs().max()
    for name, got, torchs, exact in zip(("out", "input", "weight", "bias"), *results, strict=True):
        allowed = 2 * (torchs - exact).norm() + (2 + condition) * torch.finfo(x.dtype).eps * exact.norm()
        assert got.dtype == x.dtype and (got - exact).norm() <= allowed, name


def far_from_zero(shape, dtype):
    return (torch.randn(shape) * 3 + 50).to(dtype)  # where a plain sum of squares would cancel out


@pytest.mark.parametrize("dtype", convolution.DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_values_and_gradients(shape, dtype):
    x = far_from_zero(shape, dtype)
    check(x, "leaky_relu")
    if x.dim() in LAYOUTS:
        check(x.contiguous(memory_format=LAYOUTS[x.dim()]), "gelu")


@pytest.mark.parametrize("activation", [None, *ACTIVATIONS])
def test_activations(activation):
    check(far_from_zero((2, 5, 4, 8), torch.float32), activation)


def test_statistics_in_parts(cuda_ops):
    """Of more pixels than one block takes: bitwise the same each time, and unshaken by a mean far from 0."""
    x = torch.randn(2, 2, 20000) + 1000
    for same in (x, x.unsqueeze(-1).contiguous(memory_format=torch.channels_last)):
        one, two = (cuda_ops.batch_statistics(same, 0.1) for _ in range(2))
        assert all(torch.equal(a, b) for a, b in zip(one, two, strict=True))
        mean, rstd, variance = one
        exact = torch.var_mean(x.double(), (0, 2), correction=0)
        torch.testing.assert_close(mean.double(), exact[1], rtol=3e-7, atol=0.0)
        torch.testing.assert_close(variance.double(), exact[0], rtol=1e-5, atol=0.0)
        torch.testing.assert_close(rstd.double(), (exact[0] + 0.1).rsqrt(), rtol=1e-5, atol=0.0)


def test_first_number_far_from_the_others(cuda_ops):
    """From which the sums of a thread are taken."""
    x = torch.randn(1, 1, 4096)
    x[0, 0, ::512] += 1e4
    _, _, variance = cuda_ops.batch_statistics(x, 0.0)
    torch.testing.assert_close(variance.double(), x.double().var((0, 2), correction=0), rtol=1e-5, atol=0.0)


@pytest.mark.parametrize("dtype", convolution.DTYPES, ids=str)
@pytest.mark.parametrize("name", convolution.SHAPES)
def test_statistics_of_the_epilogue(cuda_ops, name, dtype):
    """They are those of the output as it was written, and the output is the convolution's without them."""
    input, weight, bias, geometry = convolution.operands(name, dtype)
    input, bias = input + 2, bias * 10
    for channels_last in (False, True)[: input.dim() - 2]:
        output, *statistics = convolution.with_statistics(cuda_ops, input, weight, bias, geometry, 1e-3, channels_last)
        assert torch.equal(output, convolution.convolve(cuda_ops, input, weight, bias, geometry))
        variance, mean = torch.var_mean(output.double(), [0, *range(2, output.dim())], correction=0)
        for ours, exact in zip(statistics, (mean, (variance + 1e-3).rsqrt(), variance), strict=True):
            torch.testing.assert_close(ours.double(), exact, rtol=1e-5, atol=1e-5)


def test_misaligned_starts_strides_and_nan(cuda_ops):
    """A NaN stays in its channel."""
    storage = torch.randn(1 + 3 * 5 * 4 * 8)
    storage[100] = float("nan")
    x = storage[1:].view(3, 5, 4, 8)
    for odd in (x, x.transpose(2, 3), x[:, ::2], x[:, :, 1:]):
        weight, bias = torch.randn(odd.shape[1], 2).unbind(1)
        torch.testing.assert_close(ours(odd, weight, bias, "relu"), plain(odd, weight, bias, "relu"), equal_nan=True)
    grad = torch.randn(1 + x.numel())[1:].view(x.shape)
    mean, rstd, _ = cuda_ops.batch_statistics(x.nan_to_num(), 1e-5)
    arguments = x.nan_to_num(), weight[:1].expand(5), bias[:1].expand(5), mean, rstd, "silu", 0.0
    misaligned = cuda_ops.batch_norm_activation_backward(grad, *arguments)
    for a, b in zip(misaligned, cuda_ops.batch_norm_activation_backward(grad.clone(), *arguments), strict=True):
        torch.testing.assert_close(a, b)


def test_bad_arguments(cuda_ops):
    x, vector = torch.randn(2, 3, 4), torch.randn(3)
    for call, name in (
        (lambda: cuda_ops.batch_statistics(x[:0], 0.0), "input"),
        (lambda: cuda_ops.batch_statistics(x.double(), 0.0), "input"),
        (lambda: cuda_ops.batch_norm_apply(x, vector[:2], vector, vector, vector, "none", 0.0), "mean"),
        (lambda: cuda_ops.batch_norm_apply(x, vector, vector, vector, vector, "relu6", 0.0), "activation"),
        (
            lambda: cuda_ops.batch_norm_activation_backward(x.half(), x, *[vector] * 4, "none", 0.0),
            "grad_out",
        ),
    ):
        with pytest.raises(RuntimeError, match=rf"\b{name}\b"):
            call()
