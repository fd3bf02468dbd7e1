"""Batch norm and activation in one pass are torch's two modules, in values, statistics and derivatives."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import gpt4fast
from gpt4fast.backends.compiled.batch_norm import batch_norm_activation
from gpt4fast.backends.reference.conv_transpose import ACTIVATIONS
from gpt4fast.nn import batch_norm

pytestmark = pytest.mark.usefixtures("needs_native")

# Of many channels: each has one rounding error of its mean, and of five the sum is at times twice that of torch.
SHAPES = {1: (3, 67, 37), 2: (2, 51, 9, 8), 3: (2, 34, 3, 4, 5)}
NORMS = {1: nn.BatchNorm1d, 2: nn.BatchNorm2d, 3: nn.BatchNorm3d}


def plain(x, weight, bias, activation):
    out = torch.nn.functional.batch_norm(x, None, None, weight, bias, True, 0.0, 1e-5)
    return out if activation is None else ACTIVATIONS[activation](out, 0.2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("activation", [None, *ACTIVATIONS])
def test_values_and_gradients(activation, dtype, level):
    """At most twice as far from float64 as torch in the same dtype."""
    for shape in SHAPES.values():
        x = (torch.randn(shape) * 3 + 50).to(dtype)  # far from 0: a plain sum of squares would cancel out
        leaves = [x, *(torch.randn(shape[1]).to(dtype) for _ in range(2))]
        # A gradient at a kink is decided by rounding.
        is_kink = plain(*(t.double() for t in leaves), None).abs() < 1e-3
        grad = torch.randn(shape).to(dtype).masked_fill(is_kink, 0.0)

        def run(function, dtype, leaves=leaves, grad=grad):
            inputs = [t.detach().to(dtype).requires_grad_() for t in leaves]
            out = function(*inputs)
            return [out.detach(), *torch.autograd.grad(out, inputs, grad.to(dtype))]

        ours = run(lambda *t: batch_norm_activation(*t, 1e-5, activation, 0.2)[0], dtype)
        theirs = run(lambda *t: plain(*t, activation), dtype)
        exact = run(lambda *t: plain(*t, activation), torch.float64)
        assert ours[0].stride() == theirs[0].stride()
        for name, got, other, true in zip(("out", "input", "weight", "bias"), ours, theirs, exact, strict=True):
            allowed = 2 * (other - true).norm() + 2 * torch.finfo(dtype).eps * true.norm()
            assert (got - true).norm() <= allowed, name


def test_second_derivatives():
    x = torch.randn(3, 4, 7, requires_grad=True)
    weight, bias = torch.randn(4, requires_grad=True), torch.randn(4, requires_grad=True)
    results = []
    for function in (lambda *t: batch_norm_activation(*t, 1e-5, "tanh", 0.0)[0], lambda *t: plain(*t, "tanh")):
        first = torch.autograd.grad(function(x, weight, bias).pow(3).sum(), (x, weight, bias), create_graph=True)
        results.append([*first, *torch.autograd.grad(sum(g.square().sum() for g in first), (x, weight, bias))])
    for got, expected in zip(*results, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("dims", [1, 2, 3])
@pytest.mark.parametrize("options", [{}, {"momentum": None}, {"affine": False}, {"track_running_stats": False}])
def test_module_in_training(dims, options, monkeypatch):
    monkeypatch.setattr(batch_norm, "FEWEST_ELEMENTS", 0)
    conv = gpt4fast.nn.__dict__[f"ConvTranspose{dims}d"](6, 5, 4, stride=2)
    theirs = NORMS[dims](5, **options)
    ours = copy.deepcopy(theirs)
    for _ in range(3):
        x = torch.randn(2, 6, *[5] * dims)
        out = conv.fused(x, None, ours, "relu")
        expected = torch.relu(theirs(nn.Module.__call__(conv, x)))
        torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-5)
    for name, value in theirs.state_dict().items():
        torch.testing.assert_close(ours.state_dict()[name], value, rtol=1e-5, atol=1e-6)


def test_hooks_subclasses_and_single_values_are_torchs(monkeypatch):
    monkeypatch.setattr(batch_norm, "FEWEST_ELEMENTS", 0)
    norm = nn.BatchNorm2d(3)
    assert batch_norm._implementation(norm, torch.randn(2, 3, 4, 4)) == "native"
    assert batch_norm._implementation(nn.SyncBatchNorm(3), torch.randn(2, 3, 4, 4)) == "torch"
    assert batch_norm._implementation(norm, torch.randn(2, 3, 4, 4).double()) == "torch"
    with pytest.raises(ValueError, match="more than 1 value"):
        batch_norm.normalize(norm, torch.randn(1, 3, 1, 1), None, 0.0)
    calls = []
    norm.register_forward_hook(lambda *_: calls.append(1))
    batch_norm.normalize(norm, torch.randn(2, 3, 4, 4), None, 0.0)
    assert calls == [1]
    assert batch_norm._implementation(norm.eval(), torch.randn(2, 3, 4, 4)) == "torch"
