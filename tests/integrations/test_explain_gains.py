"""explain(model, example_inputs=...): each accelerated part beside itself on torch."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import gpt4fast
from gpt4fast.benchmarks import harness
from gpt4fast.benchmarks.generators import DCGAN, HiFiGAN, WaveGAN
from gpt4fast.integrations import gains
from gpt4fast.integrations.swap import Swapped


class Attention(nn.Module):
    def forward(self, x, *, scale):
        assert not self.training
        return nn.functional.scaled_dot_product_attention(x, x, x, scale=scale)


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.generator, self.attention = DCGAN(8, 4), Attention()
        self.unused = nn.ConvTranspose2d(3, 3, 2)

    def forward(self, x, twice: bool = False):
        return self.attention(self.generator(x * (2 if twice else 1)), scale=0.5)


@pytest.fixture
def slots(monkeypatch) -> list[tuple[type, bool]]:
    """What was timed: classes, and whether they are ours; ours takes a second, torch's three."""
    found = []

    def slot(self, run, repeats):
        module = run.__defaults__[0]
        run()
        ours = any(
            isinstance(m, (Swapped, gpt4fast.nn.ConvTranspose1d, gpt4fast.nn.ConvTranspose2d)) for m in module.modules()
        )
        found.append((type(module), ours))
        return 1.0 if ours else 3.0

    monkeypatch.setattr(harness.CpuTimer, "slot", slot)
    return found


@pytest.mark.parametrize("training", [False, True])
def test_parts_are_timed_in_turns(training, slots) -> None:
    model = Model()
    fast = gpt4fast.optimize(model, training=training)
    state, z = copy.deepcopy(fast.state_dict()), torch.randn(2, 8, 1, 1)
    generator = torch.get_rng_state()
    table = gpt4fast.explain(fast, example_inputs=(z, True))
    assert torch.equal(torch.get_rng_state(), generator)
    torch.testing.assert_close(fast.state_dict(), state, rtol=0, atol=0)
    assert all(module.training == training for module in fast.modules())
    assert not any(module._forward_pre_hooks for module in fast.modules())
    assert {row.part: row.gain for row in table if row.gain is not None} == {"generator.main": 3.0, "attention": 3.0}
    assert next(row for row in table if row.part == "generator.main").why == "its parts, together"
    assert [ours for _, ours in slots] == [False, True] * (2 * (1 + gains._TURNS))
    lines = str(table).splitlines()
    assert lines[0].split() == ["part", "runs", "on", "gain", "why"]
    assert next(line for line in lines if line.startswith("attention ")).split()[2] == "3.00"
    assert "gain" not in str(gpt4fast.explain(fast))


@pytest.mark.parametrize("make, shape, parts", [
    (lambda: WaveGAN(4, 2), (1, 4), ["(the model)"]),
    (lambda: HiFiGAN(4, 16), (1, 4, 3), [f"ups.{i}" for i in range(4)]),
])  # fmt: skip
def test_real_timings(make, shape, parts) -> None:
    table = gpt4fast.explain(gpt4fast.optimize(make()), example_inputs=torch.randn(shape))
    assert [row.part for row in table if row.gain is not None] == parts
    assert all(0.01 < row.gain < 100 for row in table if row.gain is not None)


def test_wrong_arguments() -> None:
    with pytest.raises(TypeError):
        gpt4fast.explain(DCGAN(4, 2), torch.randn(1, 4, 1, 1))
    with pytest.raises(RuntimeError):
        gpt4fast.explain(DCGAN(4, 2), example_inputs=torch.randn(1, 3, 1, 1))
