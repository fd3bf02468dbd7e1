"""Pre-training on a toy text: it learns all three objectives, resumes exactly, and mixes generated text in."""

from __future__ import annotations

import pytest
import torch

from gpt4fast.data.tokenizer import Tokenizer
from gpt4fast.generation import generate
from gpt4fast.models import Encoder, EncoderConfig
from gpt4fast.training import pretrain
from gpt4fast.training.pretrain import next_token_loss, pretrain_encoder

TEXT = "".join(f"the {animal} {verb} on the {place}. " for animal in ("cat", "dog", "rat", "bat")
               for verb in ("sat", "ran", "slept") for place in ("mat", "road", "hill", "bed")) * 3  # fmt: skip
SETTINGS = dict(length=24, mix={"masked": 4, "next": 4, "infill": 4}, lr=5e-3, seed=3)


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def tokenizer():
    return Tokenizer.train(TEXT, 300)


@pytest.fixture(scope="module")
def ids(tokenizer):
    return tokenizer.encode(TEXT)


def make_encoder(tokenizer):
    torch.manual_seed(0)
    shape = dict(vocab_size=tokenizer.vocab_size, max_length=48, num_layers=2, num_heads=2, embed_dim=32)
    return Encoder(EncoderConfig(**shape, positions="rotary", norm="rms", mlp="swiglu", bias=False))


def test_learns_all_objectives(tokenizer, ids, tmp_path):
    encoder = make_encoder(tokenizer)
    before = next_token_loss(encoder, ids[:240], tokenizer, 24)
    seen = []
    history = pretrain_encoder(
        encoder, ids, tokenizer, tmp_path, steps=120, validation_ids=ids[:240], validate_every=50,
        progress=lambda done, steps, metrics: seen.append((done, steps)), **SETTINGS,
    )  # fmt: skip
    assert seen == [(i, 120) for i in range(1, 121)]
    for name in ("masked", "next", "infill", "loss"):
        first = sum(row[name] for row in history[:5]) / 5
        last = sum(row[name] for row in history[-5:]) / 5
        assert last < 0.6 * first, name
    assert [i for i, row in enumerate(history, 1) if "validation_loss" in row] == [50, 100, 120]
    after = history[-1]["validation_loss"]
    assert after == pytest.approx(next_token_loss(encoder, ids[:240], tokenizer, 24))
    assert after < 0.4 * before
    for row in history:
        weighted = (row["masked"] + row["next"] + row["infill"]) / 3
        assert row["loss"] == pytest.approx(weighted, rel=1e-5)
    assert encoder.training
    written = generate(encoder, tokenizer.encode("the cat", bos=True)[None], max_new_tokens=20, temperature=0)
    assert "on the" in tokenizer.decode(written[0])


class Stopped(Exception):
    pass


@pytest.mark.parametrize("stop_at", [7, 13])
def test_a_resumed_run_is_the_same_run(tokenizer, ids, tmp_path, stop_at):
    settings = dict(steps=16, generated_from=0.5, checkpoint_every=3, validation_ids=ids[:48], **SETTINGS)
    whole = make_encoder(tokenizer)
    history = pretrain_encoder(whole, ids, tokenizer, tmp_path / "whole", **settings)

    def stop(done, steps, metrics):
        if done == stop_at:
            raise Stopped

    with pytest.raises(Stopped):
        pretrain_encoder(make_encoder(tokenizer), ids, tokenizer, tmp_path / "cut", progress=stop, **settings)
    resumed = make_encoder(tokenizer)
    done = []
    again = pretrain_encoder(
        resumed, ids, tokenizer, tmp_path / "cut", progress=lambda i, n, m: done.append(i), **settings
    )
    assert done[0] > 3  # it did go on, not start anew
    assert again == history
    for name, tensor in whole.state_dict().items():
        assert torch.equal(tensor, resumed.state_dict()[name]), name


def test_generated_rows_are_tagged_and_come_from_the_pool(tokenizer, ids, tmp_path, monkeypatch):
    seen = []
    original = Encoder.forward

    def spy(self, input_ids, *args, **kwargs):
        seen.append(input_ids.clone())
        return original(self, input_ids, *args, **kwargs)

    monkeypatch.setattr(Encoder, "forward", spy)
    mark = int(tokenizer.encode("the")[0])
    generated = torch.full((5, 30), mark)
    settings = dict(SETTINGS, mix={"masked": 0, "next": 6, "infill": 0})
    pretrain_encoder(
        make_encoder(tokenizer), ids, tokenizer, tmp_path, steps=3, generated=generated, generated_rows=2, **settings
    )
    assert len(seen) == 3
    for rows in seen:
        tagged = rows[:, 0] == tokenizer.generated_id
        assert tagged.sum() == 2
        assert (rows[tagged, 1:] == mark).all()
        assert (rows[~tagged, 0] == tokenizer.bos_id).all() and not (rows[~tagged, 1:] == mark).all(1).any()


def test_the_encoder_writes_its_own_samples_half_way(tokenizer, ids, tmp_path, monkeypatch):
    calls = []
    original = pretrain.write_samples

    def spy(*args):
        samples = original(*args)
        calls.append(samples)
        return samples

    monkeypatch.setattr(pretrain, "write_samples", spy)
    settings = dict(steps=6, **SETTINGS)
    pretrain_encoder(make_encoder(tokenizer), ids, tokenizer, tmp_path / "on", **settings)
    assert len(calls) == 1 and calls[0].shape == (32, 24) and len(calls[0].unique()) > 20
    pretrain_encoder(make_encoder(tokenizer), ids, tokenizer, tmp_path / "off", generated_rows=0, **settings)
    assert len(calls) == 1


def test_validation_loss_against_one_row_at_a_time(tokenizer, ids):
    encoder = make_encoder(tokenizer)
    losses = []
    for start in range(0, 48, 24):
        row = torch.cat([torch.tensor([tokenizer.bos_id]), ids[start : start + 24]])[None]
        logits = encoder(row[:, :-1], is_causal=True).logits
        losses.append(torch.nn.functional.cross_entropy(logits[0], row[0, 1:]))
    # The last 12 ids fill no window and are left out.
    assert next_token_loss(encoder, ids[:60], tokenizer, 24) == pytest.approx(float(sum(losses).detach()) / 2, rel=1e-5)


@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("steps", {"steps": 0}),
        ("lr", {"lr": 0.0}),
        ("max_norm", {"max_norm": -1.0}),
        ("validate_every", {"validate_every": 0}),
        ("mask_rate", {"mask_rate": 0.0}),
        ("mix", {"mix": {"masked": 1}}),
        ("mix", {"mix": {"masked": 0, "next": 0, "infill": 0}}),
        ("generated_rows", {"generated_rows": 99}),
        ("generated", {"generated": torch.zeros(4, 10, dtype=torch.long)}),
        ("token_ids", {"length": 10**6}),
    ],
)
def test_errors_name_the_argument(tokenizer, ids, tmp_path, name, arguments):
    with pytest.raises(ValueError, match=name):
        pretrain_encoder(make_encoder(tokenizer), ids, tokenizer, tmp_path, **({"steps": 2} | SETTINGS | arguments))
