"""The Triton kernels of batch norm, by Triton's interpreter (or on a GPU, where it is off): values, statistics and
gradients against float64, and the statistics that a transposed convolution's epilogue takes."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import gpt4fast
from gpt4fast.backends import dispatch
from gpt4fast.backends.reference.conv_transpose import ACTIVATIONS
from gpt4fast.backends.triton import availability, batch_norm
from gpt4fast.backends.triton import batch_norm_config as config
from gpt4fast.backends.triton import conv_transpose as triton_conv_transpose
from gpt4fast.ops.conv_transpose import prepare

pytest.importorskip("triton")
if not availability.INTERPRETED and not torch.cuda.is_available():
    pytest.skip("neither a GPU nor TRITON_INTERPRET=1", allow_module_level=True)
DEVICE = "cpu" if availability.INTERPRETED else "cuda"
# Of many channels: each has one rounding error of its mean, and of five the sum is at times twice that of torch.
SHAPES = [(3, 67, 37), (2, 51, 9, 8), (2, 34, 3, 4, 5)]
LAST = {4: torch.channels_last, 5: torch.channels_last_3d}


def plain(x, weight, bias, activation):
    out = F.batch_norm(x, None, None, weight, bias, True, 0.0, 1e-5)
    return out if activation is None else ACTIVATIONS[activation](out, 0.2)


def ours(x, weight, bias, activation):
    return batch_norm.batch_norm_activation(x, weight, bias, 1e-5, activation, 0.2)[0]


@pytest.mark.parametrize(
    ("shape", "channels_last", "dtype", "activation"),
    [
        *((SHAPES[1], True, torch.float32, activation) for activation in (None, *ACTIVATIONS)),
        *((SHAPES[0], False, torch.float32, activation) for activation in ("leaky_relu", "silu")),
        *((SHAPES[2], True, dtype, "gelu") for dtype in (torch.bfloat16, torch.float16)),
        *((SHAPES[1], False, dtype, "relu") for dtype in (torch.bfloat16, torch.float16)),
    ],
)
def test_values_and_gradients(shape, channels_last, dtype, activation):
    """At most twice as far from float64 as torch in the same dtype."""
    x = (torch.randn(shape) * 3 + 50).to(DEVICE, dtype)  # far from 0: a plain sum of squares would cancel out
    if channels_last:
        x = x.contiguous(memory_format=LAST[x.dim()])
    leaves = [x, *(torch.randn(shape[1]).to(DEVICE, dtype) for _ in range(2))]
    # A gradient at a kink is decided by rounding.
    is_kink = plain(*(t.double() for t in leaves), None).abs() < 1e-3
    grad = torch.randn(shape).to(DEVICE, dtype).masked_fill(is_kink, 0.0)

    def run(function, dtype):
        inputs = [t.detach().to(dtype).requires_grad_() for t in leaves]
        out = function(*inputs, activation)
        return [out.detach(), *torch.autograd.grad(out, inputs, grad.to(dtype))]

    results = [run(ours, dtype), run(plain, dtype), run(plain, torch.float64)]
    assert results[0][0].stride() == x.stride()
    for name, got, torchs, exact in zip(("out", "input", "weight", "bias"), *results, strict=True):
        allowed = 2 * (torchs - exact).norm() + 2 * torch.finfo(dtype).eps * exact.norm()
        assert got.dtype == dtype and (got - exact).norm() <= allowed, name


def test_statistics_in_parts():
    """Of more pixels than one program takes: bitwise the same each time, and unshaken by a mean far from 0."""
    x = (torch.randn(2, 2, 20000) + 1000).to(DEVICE).requires_grad_()
    tile = config.tile(40000, 2, False)
    assert batch_norm._parts(40000, 2, tile, x)[1][1] > 1
    results = []
    for _ in range(2):
        out, mean, variance = batch_norm.batch_norm_activation(x, None, None, 0.0, None, 0.0)
        results.append([out, mean, variance, *torch.autograd.grad(out.pow(3).sum(), x)])
    assert all(torch.equal(one, two) for one, two in zip(*results, strict=True))
    exact = torch.var_mean(x.double(), (0, 2), correction=0)
    torch.testing.assert_close(results[0][2].double(), exact[0], rtol=1e-5, atol=0.0)
    torch.testing.assert_close(results[0][1].double(), exact[1], rtol=1e-7, atol=0.0)


def test_merged_statistics():
    """Parts of unequal size, more than a program takes at once, some empty."""
    groups = [torch.randn(3, int(n)).to(DEVICE) + 100 for n in torch.randint(0, 6, (2500,))]
    parts = torch.zeros(3, 3, len(groups), device=DEVICE)
    for i, group in enumerate(groups):
        if group.numel():
            variance, mean = torch.var_mean(group, 1, correction=0)
            parts[:, :, i] = torch.stack([torch.full_like(mean, group.shape[1]), mean, variance * group.shape[1]])
    mean, rstd, variance = batch_norm.merged_statistics(parts, 0.1)
    exact = torch.var_mean(torch.cat(groups, 1).double(), 1, correction=0)
    torch.testing.assert_close(mean.double(), exact[1], rtol=3e-7, atol=0.0)
    torch.testing.assert_close(variance.double(), exact[0], rtol=1e-5, atol=0.0)
    torch.testing.assert_close(rstd.double(), (exact[0] + 0.1).rsqrt(), rtol=1e-5, atol=0.0)


# (batch, C, Cout / groups, sizes, kernel, stride, padding, output_padding, groups, channels last)
CONVOLUTIONS = {
    "doubling": (2, 5, 18, (5, 4), 4, 2, 1, 0, 1, False),
    "unequal phases": (1, 3, 5, (4, 3), 3, 2, 0, 0, 1, True),
    "groups": (2, 4, 3, (4, 4), 3, 2, 1, 1, 2, False),
    "depthwise": (1, 3, 1, (5, 5), 4, 2, 1, 0, 3, False),
    "depthwise channels last": (2, 3, 1, (5, 5), 2, 3, 0, 1, 3, True),
    "1-D": (3, 6, 5, (11,), 8, 4, 2, 0, 1, False),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("case", CONVOLUTIONS)
def test_statistics_of_the_epilogue(case, dtype):
    """They are those of the output as it was written, and the output is the convolution's without them."""
    batch, channels, outputs, sizes, kernel, *geometry, groups, channels_last = CONVOLUTIONS[case]
    input = (torch.randn(batch, channels, *sizes) + 2).to(DEVICE, dtype)
    if channels_last:
        input = input.contiguous(memory_format=torch.channels_last)
    weight = torch.randn(channels, outputs, *[kernel] * len(sizes)).to(DEVICE, dtype)
    bias = torch.randn(outputs * groups).to(DEVICE, dtype) * 10
    call = prepare(len(sizes), input, weight, bias, *geometry, groups, 1, None, None, None, 0.0)
    output, mean, rstd, variance = dispatch.conv_transpose_with_statistics("triton", call, 1e-3)()
    assert torch.equal(output, triton_conv_transpose.conv_transpose(**call))
    exact = torch.var_mean(output.double(), [0, *range(2, output.dim())], correction=0)
    torch.testing.assert_close(mean.double(), exact[1], rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(variance.double(), exact[0], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(rstd.double(), (exact[0] + 1e-3).rsqrt(), rtol=1e-5, atol=1e-6)


@pytest.mark.usefixtures("exact_float32")
@pytest.mark.parametrize("dims", [1, 2])
@pytest.mark.parametrize("options", [{}, {"momentum": None}, {"affine": False, "track_running_stats": False}])
def test_module_in_training(dims, options, monkeypatch):
    """Three steps of a module are torch's: outputs, gradients, running statistics; the epilogue takes the batch's."""
    monkeypatch.setattr(batch_norm, "_statistics", None)
    conv = gpt4fast.nn.__dict__[f"ConvTranspose{dims}d"](6, 5, 4, stride=2).to(DEVICE)
    theirs = (nn.BatchNorm1d, nn.BatchNorm2d)[dims - 1](5, **options).to(DEVICE)
    ours = copy.deepcopy(theirs)
    for _ in range(3):
        x = torch.randn(2, 6, *[5] * dims, device=DEVICE, requires_grad=True)
        results = []
        for norm, impl in ((ours, "triton"), (theirs, "torch")):
            monkeypatch.setenv("GPT4FAST_IMPL", impl)
            out = conv.fused(x, None, norm, "silu")
            leaves = x, *conv.parameters(), *norm.parameters()
            results.append([out, *torch.autograd.grad(out.square().sum(), leaves)])
        torch.testing.assert_close(results[0], results[1], rtol=1e-3, atol=1e-3)
    for name, value in theirs.state_dict().items():
        torch.testing.assert_close(ours.state_dict()[name], value, rtol=1e-5, atol=1e-6)


def test_alone_and_by_torch(monkeypatch):
    """Without a convolution the kernels take the statistics; what they do not serve is torch's."""
    monkeypatch.setenv("GPT4FAST_IMPL", "triton")
    from gpt4fast.nn.batch_norm import normalize

    norm, x = nn.BatchNorm1d(4).to(DEVICE), torch.randn(3, 4, 7, device=DEVICE)
    expected = torch.relu(copy.deepcopy(norm)(x))
    assert dispatch.choose_batch_norm(x) == "triton" and dispatch.choose_batch_norm(x.double()) == "torch"
    torch.testing.assert_close(normalize(norm, x, "relu", 0.0), expected)
    conv = gpt4fast.nn.ConvTranspose1d(2, 4, 1).to(DEVICE)
    with pytest.raises(ValueError, match="more than 1 value"):
        conv.fused(x[:1, :2, :1], None, norm)
    assert conv.fused(x[:0, :2], None, norm).shape == (0, 4, 7)
    monkeypatch.setenv("GPT4FAST_IMPL", "auto")
    assert dispatch.choose_batch_norm(x) != "triton"


def test_second_derivatives():
    leaves = [torch.randn(shape, device=DEVICE, requires_grad=True) for shape in ((3, 4, 7), 4, 4)]
    results = []
    for function in (ours, plain):
        first = torch.autograd.grad(function(*leaves, "tanh").pow(3).sum(), leaves, create_graph=True)
        results.append([*first, *torch.autograd.grad(sum(g.square().sum() for g in first), leaves)])
    torch.testing.assert_close(results[0], results[1], rtol=1e-3, atol=1e-4)


def test_strides_and_nan():
    """A layout that is neither, and a NaN that stays in its channel."""
    x = torch.randn(3, 5, 4, 6, device=DEVICE)
    x[1, 2, 0, 0] = float("nan")
    for odd in (x.transpose(2, 3), x[:, ::2], x[:, :, 1:]):
        weight, bias = torch.randn(2, odd.shape[1], 2, device=DEVICE)[..., 0]
        torch.testing.assert_close(ours(odd, weight, bias, "relu"), plain(odd, weight, bias, "relu"), equal_nan=True)


def test_opcheck():
    x = torch.randn(2, 3, 5, device=DEVICE)
    mean, rstd, weight, bias = torch.rand(4, 3, device=DEVICE)
    utils = "test_schema", "test_faketensor"
    torch.library.opcheck(batch_norm._statistics, (x, 1e-5), test_utils=utils)
    torch.library.opcheck(batch_norm._apply, (x, mean, rstd, weight, bias, "gelu", 0.0), test_utils=utils)
    torch.library.opcheck(batch_norm._backward, (x, x, weight, bias, mean, rstd, "relu", 0.0), test_utils=utils)
    convolution = x, torch.randn(3, 4, 4, device=DEVICE), None, [2], [1], [0], 1, [1], 1e-5
    torch.library.opcheck(triton_conv_transpose._forward_with_statistics, convolution, test_utils=utils)


def test_refusals():
    x = torch.ones(1, 2, 3, device=DEVICE)
    assert batch_norm.refusal(x) is None
    assert "float64" in batch_norm.refusal(x.double())
    assert "32 bits" in batch_norm.refusal(x.expand(2**29, 2, 3))
