"""Convolutions with a stride: torch's values, and gradients as close to float64 as torch's."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import gpt4fast
from gpt4fast.backends.compiled import convolution
from gpt4fast.nn import functional

pytestmark = pytest.mark.usefixtures("needs_native")

TORCHS = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}
OURS = {1: functional.conv1d, 2: functional.conv2d, 3: functional.conv3d}
# batch, channels in and out, size, kernel, options
CASES = {
    "dcgan": (16, 64, 96, (16, 16), (4, 4), {"stride": 2, "padding": 1}),
    "dcgan, images": (40, 3, 64, (32, 32), (4, 4), {"stride": 2, "padding": 1}),
    "few images": (2, 130, 150, (9, 10), (4, 4), {"stride": 2, "padding": 1}),
    "sizes that leave a rest": (8, 40, 70, (23, 25), (5, 3), {"stride": (3, 2), "padding": (2, 1), "dilation": (1, 2)}),
    "more padding than kernel": (4, 64, 64, (17, 20), (3, 3), {"stride": 2, "padding": 4}),
    "line": (4, 50, 70, (900,), (25,), {"stride": 4, "padding": 11}),
    "volume": (4, 32, 48, (8, 9, 10), (4, 4, 4), {"stride": 2, "padding": 1}),
}


@pytest.fixture
def used(monkeypatch):
    """How often a convolution of ours was called."""
    calls = []

    def counted(*args, plain=convolution.convolution):
        calls.append(args)
        return plain(*args)

    monkeypatch.setattr(convolution, "convolution", counted)
    return calls


def leaves_of(case, dtype, channels_last=False):
    batch, inputs, outputs, size, kernel, options = CASES[case]
    x, weight = torch.randn(batch, inputs, *size), torch.randn(outputs, inputs, *kernel)
    tensors = [x.to(dtype), (weight / weight[0].numel() ** 0.5).to(dtype), torch.randn(outputs).to(dtype)]
    if channels_last:
        tensors[:2] = (t.contiguous(memory_format=torch.channels_last) for t in tensors[:2])
    return [t.requires_grad_() for t in tensors], options


def run(convolve, leaves, options, grad, dtype):
    inputs = [t.detach().to(dtype).requires_grad_() for t in leaves]
    out = convolve(*inputs, **options)
    return [out.detach(), *torch.autograd.grad(out, inputs, grad.to(dtype))]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("case", CASES)
def test_values_and_gradients(case, dtype, used):
    dims = len(CASES[case][3])
    for channels_last in {False, dims == 2}:
        leaves, options = leaves_of(case, dtype, channels_last)
        grad = torch.randn_like(TORCHS[dims](*leaves, **options))
        ours = run(OURS[dims], leaves, options, grad, dtype)
        theirs = run(TORCHS[dims], leaves, options, grad, dtype)
        exact = run(TORCHS[dims], leaves, options, grad, torch.float64)
        assert ours[0].stride() == theirs[0].stride()
        for name, got, other, true in zip(("out", "input", "weight", "bias"), ours, theirs, exact, strict=True):
            allowed = 2 * (other - true).norm() + torch.finfo(dtype).eps * true.norm()
            assert (got - true).norm() <= allowed, name
    assert len(used) == 1 + (dims == 2)


def test_at_every_level(level, used):
    leaves, options = leaves_of("dcgan", torch.float32)
    grad = torch.randn_like(F.conv2d(*leaves, **options))
    ours = run(functional.conv2d, leaves, options, grad, torch.float32)
    for got, true in zip(ours, run(F.conv2d, leaves, options, grad, torch.float64), strict=True):
        assert (got - true).norm() <= 2e-6 * true.norm()
    assert len(used) == (level != "scalar")  # where torch's has more lanes


def test_second_derivatives(used):
    results = []
    leaves, options = leaves_of("dcgan", torch.float32)
    for convolve in (functional.conv2d, F.conv2d):
        inputs = [t.detach().requires_grad_() for t in leaves]
        first = torch.autograd.grad(convolve(*inputs, **options).square().mean(), inputs, create_graph=True)
        results.append([*first, *torch.autograd.grad(sum(g.square().sum() for g in first), inputs)])
    for got, expected in zip(*results, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-6)
    assert len(used) == 1


def test_only_the_gradients_that_are_needed():
    leaves, options = leaves_of("dcgan", torch.float32)
    expected = torch.autograd.grad(F.conv2d(*leaves, **options).sum(), leaves)
    for wanted in range(3):
        inputs = [t.detach().requires_grad_(i == wanted) for i, t in enumerate(leaves)]
        functional.conv2d(*inputs, **options).sum().backward()
        for i, t in enumerate(inputs):
            assert (t.grad is None) == (i != wanted)
        torch.testing.assert_close(inputs[wanted].grad, expected[wanted], rtol=1e-4, atol=1e-3)


def test_what_stays_torchs(used):
    (x, weight, bias), _ = leaves_of("dcgan", torch.float32)
    with torch.no_grad():
        functional.conv2d(x, weight, bias, 2, 1)
    functional.conv2d(x, weight, bias)
    functional.conv2d(x, weight[:, :16], bias, 2, groups=4)
    functional.conv2d(x[0], weight, bias, 2)
    functional.conv2d(x[:1], weight, bias, 2)
    functional.conv2d(x, weight, bias, padding="valid")
    functional.conv2d(x.double(), weight.double(), None, 2)
    functional.conv2d(x.cfloat(), weight.cfloat(), None, 2).abs().sum().backward()
    torch.func.grad(lambda w: functional.conv2d(x, w, bias, 2).sum())(weight)
    assert not used
    for wrong in (
        {"stride": 0},
        {"stride": (2, 2, 2)},
        {"padding": "some"},
        {"groups": 5},
        {"stride": 2, "padding": -1},
    ):
        with pytest.raises((RuntimeError, ValueError, TypeError)) as ours:
            functional.conv2d(x, weight, bias, **wrong)
        with pytest.raises(type(ours.value)) as theirs:
            F.conv2d(x, weight, bias, **wrong)
        assert str(ours.value) == str(theirs.value)


def test_autocast(used):
    (x, weight, bias), options = leaves_of("dcgan", torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        out, plain = functional.conv2d(x, weight, bias, **options), F.conv2d(x, weight, bias, **options)
    assert out.dtype == plain.dtype == torch.bfloat16 and torch.equal(out, plain) and used
    for got, expected in zip(
        torch.autograd.grad(out.float().square().mean(), (x, weight, bias)),
        torch.autograd.grad(plain.float().square().mean(), (x, weight, bias)),
        strict=True,
    ):
        assert got.dtype == torch.float32
        assert (got - expected).norm() <= 0.02 * expected.norm()


def test_a_discriminator_under_fast_ops_and_optimized(used):
    model = nn.Sequential(nn.Conv2d(3, 64, 4, 2, 1), nn.LeakyReLU(0.2), nn.Conv2d(64, 96, 4, 2, 1), nn.Flatten(1))
    fast = gpt4fast.optimize(model, training=True)
    assert fast.state_dict().keys() == model.state_dict().keys()
    assert all(a is b for a, b in zip(fast.parameters(), model.parameters(), strict=True))
    assert isinstance(copy.deepcopy(fast)[0], nn.Conv2d)
    assert "gradients" in str(gpt4fast.explain(fast))
    x = torch.randn(24, 3, 32, 32, requires_grad=True)

    def gradients(network):
        return torch.autograd.grad(network(x).square().mean(), (x, *model.parameters()))

    expected = gradients(model)
    assert not used
    with gpt4fast.fast_ops():
        routed = gradients(model)
    assert len(used) == 2
    for results in (routed, gradients(fast)):
        for got, true in zip(results, expected, strict=True):
            torch.testing.assert_close(got, true, rtol=1e-4, atol=1e-6)
    assert len(used) == 4
    with torch.no_grad():
        assert torch.equal(fast(x), model(x))
    gpt4fast.optimize(model)(x)
    assert len(used) == 4
