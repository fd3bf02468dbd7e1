"""Modules in training with GPT4FAST_IMPL=cuda, on the emulated kernels: the adapters and gradients around them."""

from __future__ import annotations

import copy
import functools

import pytest
import torch
from torch import nn

import gpt4fast
from gpt4fast.backends import dispatch, refusals
from gpt4fast.backends.compiled import conv_transpose_gradients as gradients

NORMS = {1: nn.BatchNorm1d, 2: nn.BatchNorm2d, 3: nn.BatchNorm3d}


@pytest.fixture
def cuda(cuda_ops, monkeypatch, exact_float32):
    """impl="cuda" runs on the emulation, for tensors on the CPU. The names of the operators that were called."""
    if cuda_ops is not getattr(torch.ops, "gpt4fast_emulation", None):
        pytest.skip("tests/gpu has the modules on a GPU")
    calls = []

    class Recorded:
        def __getattr__(self, name):
            calls.append(name)
            return getattr(cuda_ops, name)

    monkeypatch.setattr(torch.ops, "gpt4fast", Recorded())
    monkeypatch.setattr(refusals, "cuda_refusal", lambda tensor: None)
    monkeypatch.setattr(gradients, "_native_wins", lambda *_: [True, True])
    monkeypatch.setenv("GPT4FAST_IMPL", "cuda")
    _register_gradients()
    return calls


@functools.cache  # once in a process
def _register_gradients() -> None:
    names = {"conv_transpose_forward": "conv_transpose", "conv_transpose_with_statistics": "with_statistics"}
    for op, name in {**names, "affine_activation": "affine"}.items():
        backward, setup = (getattr(gradients, f"{part}_{name}") for part in ("backward", "setup"))
        torch.library.register_autograd(f"gpt4fast_emulation::{op}", backward, setup_context=setup)


def results(conv, norm, x, activation, impl, monkeypatch):
    monkeypatch.setenv("GPT4FAST_IMPL", impl)
    out = conv.fused(x, None, norm, activation)
    leaves = x, *conv.parameters(), *norm.parameters()
    return [out, *torch.autograd.grad(out.square().sum(), leaves)]


@pytest.mark.parametrize("dims", [1, 2, 3])
@pytest.mark.parametrize("options", [{}, {"momentum": None}, {"affine": False, "track_running_stats": False}])
def test_steps_are_torchs(cuda, dims, options, monkeypatch):
    """Outputs, gradients and running statistics; the epilogue takes the batch's."""
    conv = gpt4fast.nn.__dict__[f"ConvTranspose{dims}d"](8, 9, 4, stride=2)
    theirs = NORMS[dims](9, **options)
    ours = copy.deepcopy(theirs)
    for _ in range(2):
        x = torch.randn(2, 8, *[4] * dims, requires_grad=True)
        pair = [results(conv, norm, x, "silu", impl, monkeypatch) for norm, impl in ((ours, "cuda"), (theirs, "torch"))]
        torch.testing.assert_close(*pair, rtol=1e-3, atol=1e-2)  # sums of thousands: that of the bias is exactly 0
    for name, value in theirs.state_dict().items():
        torch.testing.assert_close(ours.state_dict()[name], value, rtol=1e-5, atol=1e-6)
    assert {"conv_transpose_with_statistics", "batch_norm_apply", "conv_transpose_backward"} <= set(cuda)
    assert "batch_norm_activation_backward" in cuda and "batch_statistics" not in cuda


def test_few_channels_of_a_group_and_norm_alone(cuda, monkeypatch):
    """cuDNN convolves the former; then a pass of its own takes the statistics."""
    conv = gpt4fast.nn.ConvTranspose1d(4, 4, 3, groups=4)
    norms = [nn.BatchNorm1d(4) for _ in range(2)]
    x = torch.randn(3, 4, 7, requires_grad=True)
    pair = [
        results(conv, norm, x, "relu", impl, monkeypatch) for norm, impl in zip(norms, ("cuda", "torch"), strict=True)
    ]
    torch.testing.assert_close(*pair, rtol=1e-4, atol=1e-4)
    assert "batch_statistics" in cuda and "conv_transpose_with_statistics" not in cuda
    monkeypatch.setenv("GPT4FAST_IMPL", "cuda")
    assert dispatch.choose_batch_norm(x) == "cuda"
    monkeypatch.setenv("GPT4FAST_IMPL", "auto")
    assert dispatch.choose_batch_norm(x) != "cuda"


def test_second_derivatives(cuda):
    """Of convolution and norm; their backward is torch's then."""
    leaves = [torch.randn(shape, requires_grad=True) for shape in ((2, 8, 5), (8, 8, 4), 8, 8)]

    def ours(x, w, weight, bias):
        out = gpt4fast.conv_transpose1d(x, w, stride=2, impl="cuda")
        return dispatch.BATCH_NORM["cuda"](out, weight, bias, 1e-5, "tanh", 0.0)[0]

    def theirs(x, w, weight, bias):
        out = nn.functional.conv_transpose1d(x, w, stride=2)
        return torch.tanh(nn.functional.batch_norm(out, None, None, weight, bias, True))

    pair = []
    for function in (ours, theirs):
        first = torch.autograd.grad(function(*leaves).pow(3).sum(), leaves, create_graph=True)
        pair.append([*first, *torch.autograd.grad(sum(g.square().sum() for g in first), leaves)])
    torch.testing.assert_close(*pair, rtol=1e-3, atol=1e-3)


def test_which_gradients_the_kernels_compute():
    """Torch computes that of a weight with few channels, and what indices of 32 bits do not reach."""
    x, stride = torch.ones(1, 64, 1), (2,)
    assert gradients._cuda_serves(x, torch.ones(64, 32, 4), stride, 1) == [True, True]
    assert gradients._cuda_serves(x, torch.ones(64, 3, 4), stride, 1) == [True, False]
    assert gradients._cuda_serves(x, torch.ones(64, 8, 4), stride, 16) == [True, False]
    assert gradients._cuda_serves(x.expand(-1, -1, 2**29), torch.ones(64, 32, 4), stride, 1) == [False, False]
