"""gpt4fast.nn.ConvTranspose1d/2d/3d against torch's modules one after the other."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import nn

import gpt4fast
from gpt4fast import nn as fast_nn

DIMS = (1, 2, 3)
OURS = {1: fast_nn.ConvTranspose1d, 2: fast_nn.ConvTranspose2d, 3: fast_nn.ConvTranspose3d}
TORCHS = {1: nn.ConvTranspose1d, 2: nn.ConvTranspose2d, 3: nn.ConvTranspose3d}
NORMS = {1: nn.BatchNorm1d, 2: nn.BatchNorm2d, 3: nn.BatchNorm3d}
ACTIVATIONS = {
    None: nn.Identity,
    "relu": nn.ReLU,
    "leaky_relu": lambda: nn.LeakyReLU(0.3),
    "tanh": nn.Tanh,
    "sigmoid": nn.Sigmoid,
    "gelu": nn.GELU,
    "silu": nn.SiLU,
}
GEOMETRIES = [
    {"kernel_size": 4, "stride": 2, "padding": 1},
    {"kernel_size": 3, "stride": 2, "padding": 1, "output_padding": 1, "groups": 2},
    {"kernel_size": 3, "dilation": 2, "bias": False},
]


def pair(dims: int, norm: str | None, activation: str | None, dtype=torch.float32, **geometry):
    """Torch's modules one after the other, and ours in one, with the same parameters and statistics."""
    ours = OURS[dims](4, 6, norm=norm, activation=activation, negative_slope=0.3, dtype=dtype, **geometry)
    layers = [TORCHS[dims](4, 6, dtype=dtype, **geometry)]
    if norm:
        layers.append(NORMS[dims](6, dtype=dtype))
        for layer in (layers[1], ours.norm):
            torch.manual_seed(7)
            layer.running_mean.normal_()
            layer.running_var.uniform_(0.5, 2)
            nn.init.normal_(layer.weight)
            nn.init.normal_(layer.bias)
    layers[0].load_state_dict({k: v for k, v in ours.state_dict().items() if not k.startswith("norm.")})
    return nn.Sequential(*layers, ACTIVATIONS[activation]()), ours


def assert_same(torchs: nn.Module, ours: nn.Module, x: torch.Tensor) -> None:
    """Output, its layout, and the gradients of the input and every parameter."""
    x = x.requires_grad_()
    expected, out = torchs(x), ours(x)
    torch.testing.assert_close(out, expected, rtol=1e-4, atol=5e-5)
    assert out.stride() == expected.stride()
    probe = torch.randn_like(expected)
    theirs = torch.autograd.grad(expected, [x, *torchs.parameters()], probe)
    mine = torch.autograd.grad(out, [x, *ours.parameters()], probe)
    torch.testing.assert_close(mine, theirs, rtol=1e-3, atol=5e-4)


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("norm", [None, "batch"])
@pytest.mark.parametrize("dims", DIMS)
def test_eval_and_training(dims, norm, activation) -> None:
    for geometry in GEOMETRIES:
        check_eval_and_training(dims, norm, activation, geometry)


@pytest.mark.parametrize("dims", DIMS)
def test_eval_and_training_on_the_reference(dims, monkeypatch) -> None:
    monkeypatch.setenv("GPT4FAST_IMPL", "reference")
    check_eval_and_training(dims, "batch", "silu", GEOMETRIES[1])


def check_eval_and_training(dims: int, norm: str | None, activation: str | None, geometry: dict) -> None:
    torchs, ours = pair(dims, norm, activation, **geometry)
    x = torch.randn(3, 4, *(5, 4, 3)[:dims])
    assert_same(torchs.eval(), ours.eval(), x)
    assert_same(torchs.train(), ours.train(), x)
    if norm:  # training moved the running statistics in the same way
        torch.testing.assert_close(dict(ours.norm.named_buffers()), dict(torchs[1].named_buffers()))
        assert_same(torchs.eval(), ours.eval(), x)


@pytest.mark.parametrize("dims", DIMS)
def test_state_dict_keys_and_loading_torchs(dims) -> None:
    ours = OURS[dims](4, 6, 3)
    torchs = TORCHS[dims](4, 6, 3)
    assert list(ours.state_dict()) == list(torchs.state_dict()) == ["weight", "bias"]
    ours.load_state_dict(torchs.state_dict())
    x = torch.randn(2, 4, *(5,) * dims)
    torch.testing.assert_close(ours(x), torchs(x))
    names = ["weight", "bias", "running_mean", "running_var", "num_batches_tracked"]
    normed = OURS[dims](4, 6, 3, bias=False, norm="batch")
    assert list(normed.state_dict()) == ["weight", *(f"norm.{name}" for name in names)]
    assert isinstance(normed, TORCHS[dims])


@pytest.mark.parametrize("dims", DIMS)
def test_output_size(dims) -> None:
    torchs, ours = pair(dims, "batch", "tanh", kernel_size=3, stride=3, padding=1)
    torchs.eval(), ours.eval()
    x = torch.randn(2, 4, *(4,) * dims)
    for extra in range(3):
        size = [10 + extra] * dims
        expected = torchs[2](torchs[1](torchs[0](x, output_size=size)))
        torch.testing.assert_close(ours(x, output_size=size), expected)
        torch.testing.assert_close(ours(x, output_size=torch.Size([2, 6, *size])), expected)
    with pytest.raises(ValueError, match="requested an output size of"):
        ours(x, output_size=[99] * dims)


@pytest.mark.parametrize("dims", DIMS)
def test_unbatched_input(dims) -> None:
    torchs, ours = pair(dims, None, "relu", kernel_size=3)
    x = torch.randn(4, *(5,) * dims)
    torch.testing.assert_close(ours(x), torchs(x))
    normed = OURS[dims](4, 6, 3, norm="batch").eval()
    if dims > 1:  # torch's batch norm refuses it, so ours does
        with pytest.raises(ValueError, match="expected .D input"):
            normed(x)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("norm", [None, "batch"])
@pytest.mark.parametrize("dims", DIMS)
def test_half_precision_is_as_good_as_torchs(dims, norm, dtype) -> None:
    torchs, ours = (m.eval() for m in pair(dims, norm, "silu", kernel_size=4, stride=2, padding=1))
    x = torch.randn(3, 4, *(5,) * dims).to(dtype)
    exact = copy.deepcopy(torchs).to(dtype).double()(x.double())
    out, theirs = ours.to(dtype)(x), torchs.to(dtype)(x)
    assert out.dtype == dtype
    errors = [(t.double() - exact).abs().max().item() for t in (out, theirs)]
    assert errors[0] <= 2 * errors[1] + torch.finfo(dtype).eps * exact.abs().max().item()


def test_channels_last() -> None:
    torchs, ours = (m.eval() for m in pair(2, "batch", "relu", kernel_size=4, stride=2, padding=1))
    assert_same(torchs, ours, torch.randn(2, 4, 5, 5).to(memory_format=torch.channels_last))


def test_the_norm_is_folded_without_a_cache_that_could_be_stale() -> None:
    torchs, ours = (m.eval() for m in pair(2, "batch", "relu", kernel_size=3))
    x = torch.randn(2, 4, 5, 5)
    ours(x)
    for norm in (torchs[1], ours.norm):
        norm.weight.data.mul_(-2)  # does not count as a change for autograd
        norm.running_mean.data.add_(1)
    torch.testing.assert_close(ours(x), torchs(x))
    with torch.no_grad():
        assert torch.equal(ours(x), ours(x))


def test_second_derivative_through_the_folded_norm() -> None:
    ours = fast_nn.ConvTranspose1d(1, 2, 2, norm="batch", activation="silu", dtype=torch.float64)
    x = torch.randn(1, 1, 2, dtype=torch.float64, requires_grad=True)
    parameters = list(ours.eval().parameters())

    def call(x, *values):
        return torch.func.functional_call(ours, dict(zip(dict(ours.named_parameters()), values, strict=True)), x)

    assert torch.autograd.gradcheck(call, (x, *parameters))
    assert torch.autograd.gradgradcheck(call, (x, *parameters))


def test_copies_pickles_and_compiles() -> None:
    torchs, ours = (m.eval() for m in pair(2, "batch", "leaky_relu", kernel_size=4, stride=2, padding=1))
    x = torch.randn(2, 4, 5, 5)
    for module in (copy.deepcopy(ours), pickle.loads(pickle.dumps(ours))):
        torch.testing.assert_close(module(x), torchs(x))
    torch._dynamo.reset()
    torch.testing.assert_close(torch.compile(ours, fullgraph=True, backend="aot_eager")(x), torchs(x))
    assert "activation=leaky_relu, negative_slope=0.3" in repr(ours)


def test_bad_options_are_named() -> None:
    with pytest.raises(ValueError, match="norm must be None or \"batch\", but is 'layer'"):
        gpt4fast.nn.ConvTranspose2d(3, 4, 3, norm="layer")
    with pytest.raises(ValueError, match="activation must be None or one of relu.*but is 'swish'"):
        gpt4fast.nn.ConvTranspose2d(3, 4, 3, activation="swish")
    with pytest.raises(ValueError, match="padding mode"):
        gpt4fast.nn.ConvTranspose2d(3, 4, 3, padding_mode="reflect")
