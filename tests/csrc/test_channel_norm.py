"""Layer norm over channels, called directly, against float64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from gpt4fast.backends.compiled.channel_norm import channel_norm, torch_channel_norm
from gpt4fast.backends.reference.conv_transpose import ACTIVATIONS

pytestmark = pytest.mark.usefixtures("needs_native")

SHAPES = [(2, 64, 7, 9), (1, 7, 5, 3), (3, 130, 20), (2, 2, 14, 14), (1, 300, 2, 3, 2), (5, 24)]


def norm(input: Tensor, weight: Tensor, bias: Tensor, eps: float = 1e-6, activation: str = "none") -> Tensor:
    return torch.ops.gpt4fast.channel_norm_activation(input, weight, bias, eps, activation, 0.2)


def layouts(x: Tensor) -> list[Tensor]:
    return [x, x.movedim(1, -1).contiguous().movedim(-1, 1)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("activation", [None, *ACTIVATIONS])
def test_matches_float64(activation, dtype, level):
    """At most twice as far as torch in the same dtype, and one rounding."""
    for shape in SHAPES:
        weight, bias = torch.randn(2, shape[1]).to(dtype)
        for x in layouts((torch.randn(shape) * 2 + 3).to(dtype)):
            ours = channel_norm(x, weight, bias, 1e-6, activation, 0.2)
            torchs = torch_channel_norm(x, weight, bias, 1e-6, activation, 0.2)
            exact = torch_channel_norm(x.double(), weight.double(), bias.double(), 1e-6, activation, 0.2)
            assert ours.dtype == dtype and ours.stride() == x.stride()
            allowed = 2 * (torchs - exact).norm() + 2 * torch.finfo(dtype).eps * exact.norm()
            assert (ours - exact).norm() <= allowed, shape


def test_without_weights_and_of_any_strides():
    x = torch.randn(2, 40, 10, 9)
    for part in (x[:, ::2], x[:, :, 1:], x.transpose(2, 3)):
        ours = channel_norm(part, None, None, 1e-5, "relu", 0.0)
        torch.testing.assert_close(ours, torch_channel_norm(part, None, None, 1e-5, "relu", 0.0))


def test_a_small_variance_counts_eps():
    x = torch.full((1, 8, 2, 2), 3.0)
    x[0, 0] += 1e-3
    ours = channel_norm(x, None, None, 1e-6, None, 0.0)
    torch.testing.assert_close(ours, torch_channel_norm(x, None, None, 1e-6, None, 0.0), rtol=1e-3, atol=1e-3)


def test_nan_and_infinity_stay_in_their_pixel():
    for x in layouts(torch.randn(2, 20, 5, 5)):
        clean = channel_norm(x, None, None, 1e-6, None, 0.0)
        x[0, 3, 1, 2], x[1, 7, 4, 4] = float("nan"), float("inf")
        dirty = channel_norm(x, None, None, 1e-6, None, 0.0)
        differs = (clean != dirty).any(1)
        assert differs.nonzero().tolist() == [[0, 1, 2], [1, 4, 4]]
        assert dirty[0, :, 1, 2].isnan().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_same_bits_for_any_number_of_threads(dtype):
    for x in layouts(torch.randn(2, 48, 70, 50).to(dtype)):
        weight, bias = torch.randn(2, 48)
        results = []
        before = torch.get_num_threads()
        for threads in (1, 2, 3, 1):
            torch.set_num_threads(threads)
            results.append(norm(x, weight, bias, activation="gelu"))
        torch.set_num_threads(before)
        assert all(torch.equal(result, results[0]) for result in results)


X, V = torch.randn(2, 4, 3, 3), torch.ones(4)
BAD_CALLS = {
    "weight": [(X, V[:3], V), (X, V.double(), V), (X, torch.ones(8)[::2], V)],
    "bias": [(X, V, V[None])],
    "input": [
        (X[:, :, :0], V, V),
        (X.double(), V, V),
        (torch.ones(4), V, V),
        (X.transpose(1, 2), torch.ones(3), torch.ones(3)),
    ],
    "activation": [(X, V, V, 1e-6, "softmax")],
}


@pytest.mark.parametrize(("name", "index"), [(n, i) for n, calls in BAD_CALLS.items() for i in range(len(calls))])
def test_bad_direct_calls_raise(name, index):
    with pytest.raises(RuntimeError, match=name):
        norm(*BAD_CALLS[name][index])
