"""A packed weight is invisible: whatever happens to the weight, a call computes with what it is now."""

from __future__ import annotations

import copy
import gc
import pickle
import weakref

import pytest
import torch
from torch import nn

import gpt4fast
from gpt4fast.backends import native
from gpt4fast.backends.compiled import packed_weights

pytestmark = pytest.mark.usefixtures("needs_native")

# For each kernel: many outputs, few, depthwise, Winograd's.
LAYERS = {
    "many": lambda: gpt4fast.nn.ConvTranspose2d(8, 24, 4, stride=2, padding=1),
    "few": lambda: gpt4fast.nn.ConvTranspose2d(8, 3, 4, stride=2, padding=1),
    "depthwise": lambda: gpt4fast.nn.ConvTranspose2d(8, 8, 4, stride=2, padding=1, groups=8),
    "winograd": lambda: gpt4fast.nn.ConvTranspose2d(32, 24, 4, stride=2, padding=1),
}


@pytest.fixture(params=LAYERS)
def layer(request):
    return LAYERS[request.param]()


def make_input(layer: nn.Module) -> torch.Tensor:
    return torch.randn(2, layer.in_channels, 12, 9)


def check(layer: nn.Module) -> None:
    """The module's output is that of its present weight, also a second time."""
    dtype = layer.weight.dtype
    x = make_input(layer).to(dtype)
    with torch.no_grad():
        expected = nn.functional.conv_transpose2d(
            x.double(), layer.weight.detach().clone().double(), layer.bias.double(), 2, 1, 0, layer.groups
        )
        for _ in range(2):
            rtol, atol = (0.02, 0.05) if dtype == torch.bfloat16 else (1e-4, 1e-3)
            torch.testing.assert_close(layer(x).double(), expected, rtol=rtol, atol=atol)


def packed(layer: nn.Module) -> list[torch.Tensor]:
    return [kept for _, kept in packed_weights._PACKED.get(layer.weight, {}).values()]


def test_kept_between_calls(layer):
    check(layer)
    (kept,) = packed(layer)
    check(layer)
    (again,) = packed(layer)
    assert again is kept


def test_winograds_form_and_the_plain_one_side_by_side():
    layer = LAYERS["winograd"]()
    with torch.no_grad():
        layer(torch.randn(1, 32, 3, 3))
        check(layer)
    plain, winograd = packed(layer)
    assert winograd.numel() > 2 * plain.numel()
    check(layer)
    assert packed(layer)[1] is winograd


def test_in_place_updates(layer):
    check(layer)
    with torch.no_grad():
        layer.weight.mul_(2)
    check(layer)
    with torch.no_grad():
        layer.weight[1, 0] = 5.0
    check(layer)
    with torch.inference_mode():
        layer.weight.add_(1.0)
    check(layer)
    layer.weight.data.neg_()
    check(layer)
    layer.weight.data = torch.randn_like(layer.weight)
    check(layer)
    layer.weight.data.copy_(torch.randn_like(layer.weight))
    check(layer)


def test_initialisation_and_state_dicts(layer):
    check(layer)
    layer.reset_parameters()
    check(layer)
    keys = layer.state_dict().keys()
    layer.load_state_dict({name: torch.randn_like(x) for name, x in layer.state_dict().items()})
    check(layer)
    layer.load_state_dict({name: torch.randn_like(x) for name, x in layer.state_dict().items()}, assign=True)
    check(layer)
    assert layer.state_dict().keys() == keys == {"weight", "bias"}


def test_dtypes_and_layouts(layer):
    check(layer)
    check(layer.to(torch.bfloat16))
    check(layer.to(torch.float32))
    check(layer.to(memory_format=torch.channels_last))
    check(layer.half().float())


def test_copies(layer):
    check(layer)
    copied = copy.deepcopy(layer)
    loaded = pickle.loads(pickle.dumps(layer))  # noqa: S301, of this test's own making
    with torch.no_grad():
        layer.weight.zero_()
    for module in (copied, loaded, layer):
        check(module)


def test_training_steps(layer):
    for fused in (False, True):
        optimizer = torch.optim.Adam(layer.parameters(), lr=0.1, fused=fused)
        for _ in range(3):
            check(layer)
            before = layer.weight.detach().clone()
            layer(make_input(layer)).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
            assert not torch.equal(before, layer.weight)
        check(layer)


def test_a_call_that_wants_the_weights_gradient_keeps_nothing(layer):
    layer(make_input(layer)).sum().backward()
    assert packed(layer) == []


def test_compiled(layer):
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    for _ in range(2):
        x = make_input(layer)
        with torch.no_grad():
            torch.testing.assert_close(compiled(x), layer(x))
            layer.weight.mul_(2)


def test_cpu_levels(layer):
    check(layer)
    before = native.cpu_level()
    for level in ("scalar", before):
        native.force_cpu_level(level)
        try:
            check(layer)
        finally:
            native.force_cpu_level(before)


@pytest.mark.parametrize("name", LAYERS)
def test_it_goes_with_its_parameter(name):
    layer = LAYERS[name]()
    check(layer)
    kept = weakref.ref(packed(layer)[0])
    del layer
    gc.collect()
    assert kept() is None


def test_a_tensor_that_is_no_parameter_is_not_kept():
    count = len(packed_weights._PACKED)
    x, weight = torch.randn(1, 4, 3, 3), torch.randn(4, 8, 4, 4)
    gpt4fast.conv_transpose2d(x, weight, impl="native")
    assert len(packed_weights._PACKED) == count


def test_a_pack_of_something_else_is_not_used():
    x, weight = torch.randn(1, 8, 3, 3), torch.randn(8, 24, 4, 4)
    other = torch.ops.gpt4fast.conv_transpose_pack(torch.randn(8, 24, 4, 4), 1)
    smaller = torch.ops.gpt4fast.conv_transpose_pack(torch.randn(8, 20, 4, 4), 1)
    arguments = (None, [1, 1], [0, 0], [0, 0], 1, [1, 1], None, None, "none", 0.0, False)
    expected = torch.ops.gpt4fast.conv_transpose_forward(x, weight, *arguments)
    for pack in (other, smaller):
        assert torch.equal(torch.ops.gpt4fast.conv_transpose_forward(x, weight, *arguments, pack), expected)
    with pytest.raises(RuntimeError, match="packed"):
        torch.ops.gpt4fast.conv_transpose_forward(x, weight, *arguments, other.float())


def test_a_pack_for_other_groups_is_not_used():
    """Which may have as many bytes."""
    x, weight = torch.randn(1, 6, 5, 5), torch.randn(6, 2, 3, 3)
    arguments = (None, [1, 1], [0, 0], [0, 0], 3, [1, 1], None, None, "none", 0.0, False)
    expected = torch.ops.gpt4fast.conv_transpose_forward(x, weight, *arguments)
    other = torch.ops.gpt4fast.conv_transpose_pack(weight, 1)
    assert torch.equal(torch.ops.gpt4fast.conv_transpose_forward(x, weight, *arguments, other), expected)
