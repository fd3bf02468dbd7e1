"""The demo's state file, timing and speed rows."""

from __future__ import annotations

import copy
import json
import os
import time

import pytest

pytest.importorskip("rich")

import torch
from torch import nn

from gpt4fast.demo import speed
from gpt4fast.demo.state import State
from gpt4fast.demo.timing import check_close, paired
from gpt4fast.models import (
    DCGANConfig,
    DCGANDiscriminator,
    DCGANGenerator,
    Encoder,
    EncoderConfig,
    EncoderDecoder,
    EncoderDecoderConfig,
    WaveGANConfig,
    WaveGANGenerator,
)


def test_state_keeps_results_and_adds_up_interrupted_time(tmp_path):
    state = State(tmp_path, {"seed": 1})
    state.interrupt("data", 2.0)
    state.interrupt("data", 3.0)
    again = State(tmp_path, {"seed": 1})
    assert again.result("data") is None
    again.finish("data", {"pictures": "é"}, 1.5)
    third = State(tmp_path, {"seed": 1})
    assert third.result("data") == {"pictures": "é"}
    assert third.seconds("data") == 6.5
    assert sorted(p.name for p in tmp_path.iterdir()) == ["state.json"]


def test_state_of_other_settings_is_refused(tmp_path):
    State(tmp_path, {"seed": 1}).finish("data", {}, 0.0)
    with pytest.raises(ValueError, match="output: .* made with seed=1"):
        State(tmp_path, {"seed": 2})


def test_failed_write_leaves_the_old_state(tmp_path, monkeypatch):
    state = State(tmp_path, {})
    state.finish("data", {"a": 1}, 0.0)

    def fail(*args):
        raise OSError("disk full")

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(OSError, match="disk full"):
        state.finish("networks", {"b": 2}, 0.0)
    assert json.loads((tmp_path / "state.json").read_text())["steps"].keys() == {"data"}


def test_paired_takes_turns_and_finds_the_ratio():
    calls = []

    def wait(name, seconds):
        calls.append(name)
        time.sleep(seconds)

    times = paired(lambda: wait("plain", 0.02), lambda: wait("fast", 0.005), work=10, seconds=0.0)
    assert times["turns"] == 5
    assert calls[4:8] == ["plain", "fast", "fast", "plain"]
    assert 2.5 < times["ratio"] < 5
    assert times["low"] <= times["high"]
    assert (
        200 < times["plain"] < 500 < times["fast"] < 2000
    )  # work per second: 10 / 0.02 and 10 / 0.005, less the overhead


def test_wrong_results_are_never_timed():
    check_close("x", torch.ones(3), torch.ones(3) + 1e-4)
    for bad in (torch.ones(3) + 0.1, torch.tensor([1.0, float("nan"), 1.0])):
        with pytest.raises(RuntimeError, match="x: plain and gpt4fast differ"):
            check_close("x", torch.ones(3), bad)


def _dcgan():
    torch.manual_seed(0)
    config = DCGANConfig(image_size=16, channels=1, base_channels=4, stem="tutorial", latent_dim=10)
    return DCGANGenerator(config), DCGANDiscriminator(config)


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("kind", ["images", "audio"])
def test_plain_generator_is_torch_alone_and_computes_the_same(kind, training):
    generator = _dcgan()[0]
    if kind == "audio":
        generator = WaveGANGenerator(WaveGANConfig(samples=128, base_channels=2, latent_dim=10))
    generator.train(training)
    before = copy.deepcopy(generator.state_dict())
    plain = speed.plain_generator(generator).train(training)
    assert {type(m).__module__.partition(".")[0] for m in plain.layers} == {"torch"}
    assert sum(isinstance(m, nn.BatchNorm2d) for m in plain.modules()) == (2 if kind == "images" else 0)
    z = torch.randn(3, 10)
    torch.testing.assert_close(plain(z), generator(z), rtol=1e-4, atol=1e-5)
    plain.layers[0].weight.data.zero_()
    generator.load_state_dict(before)  # the copy shares nothing with the original
    assert generator.layers[0].weight.abs().sum() > 0


def test_what_runs_listens_to_the_real_choice(monkeypatch):
    generator, _ = _dcgan()
    generator.eval()
    z = torch.randn(2, 10)
    monkeypatch.setenv("GPT4FAST_IMPL", "reference")
    assert speed.what_runs(lambda: generator(z)) == "conv_transpose: reference (3×)"
    with speed.plain_torch():
        assert speed.what_runs(lambda: generator(z)) == "conv_transpose: torch (3×)"
    assert os.environ["GPT4FAST_IMPL"] == "reference"


def test_rows_of_the_speed_table():
    generator, discriminator = _dcgan()
    rows = [
        speed.inference("g", "d", "images/s", generator, 2, 0.0),
        speed.training_step("t", "d", "images/s", generator, discriminator, 2, 0.0),
    ]
    sizes = {"vocab_size": 40, "max_length": 32, "num_layers": 1, "num_heads": 2, "embed_dim": 16}
    model = EncoderDecoder(EncoderDecoderConfig(EncoderConfig(**sizes)))
    ids = torch.randint(6, 40, (2, 8))
    rows.append(speed.attention_model("e", "d", lambda: model.encoder(ids).logits.detach(), 16, 0.0))
    rows.append(speed.decoding("w", "d", model, ids, 1, 4, 0.0))
    for row in rows:
        assert row["ratio"] == pytest.approx(row["fast"] / row["plain"])
        assert row["implementation"]
    assert rows[3]["implementation"].startswith("key-value cache; attention: ")


@pytest.mark.parametrize(("impl", "same"), [("torch", True), ("reference", False)])
def test_same_kernels_are_noticed(monkeypatch, impl, same):
    monkeypatch.setenv("GPT4FAST_IMPL", impl)
    encoder = Encoder(EncoderConfig(vocab_size=40, max_length=32, num_layers=1, num_heads=2, embed_dim=16))
    ids = torch.randint(6, 40, (2, 8))
    assert speed.attention_model("e", "d", lambda: encoder(ids).logits.detach(), 16, 0.0)["same"] is same


def test_a_wrong_cache_is_never_timed(monkeypatch):
    sizes = {"vocab_size": 40, "max_length": 32, "num_layers": 1, "num_heads": 2, "embed_dim": 16}
    model = EncoderDecoder(EncoderDecoderConfig(EncoderConfig(**sizes)))
    monkeypatch.setattr(speed, "generate", lambda *args, **kwargs: torch.zeros(2, 4, dtype=torch.long) - 1)
    with pytest.raises(RuntimeError, match="the text differs"):
        speed.decoding("w", "d", model, torch.randint(6, 40, (2, 8)), 1, 4, 0.0)
