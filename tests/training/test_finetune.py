"""Fine-tuning a decoder on a toy text: every loss moves the right way, resuming is exact."""

from __future__ import annotations

import math

import pytest
import torch
from torch.nn import functional as F

from gpt4fast.data.tokenizer import Tokenizer
from gpt4fast.models import EncoderConfig, EncoderDecoder, EncoderDecoderConfig
from gpt4fast.training import finetune
from gpt4fast.training.finetune import (
    HiddenDiscriminator,
    HiddenStates,
    continuation_loss,
    critic_loss,
    finetune_decoder,
    fooling_loss,
    warm_start_decoder,
)

TEXT = "".join(f"the {animal} {verb} on the {place}. " for animal in ("cat", "dog", "rat", "bat")
               for verb in ("sat", "ran", "slept") for place in ("mat", "road", "hill", "bed")) * 3  # fmt: skip
SETTINGS = dict(context=16, length=20, overlap=4, continue_rows=6, gap_rows=4, lr=5e-3, sample_rows=6, seed=3)


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


def make_model(tokenizer):
    torch.manual_seed(0)
    shape = dict(vocab_size=tokenizer.vocab_size, max_length=48, num_layers=2, num_heads=2, embed_dim=32)
    return EncoderDecoder(
        EncoderDecoderConfig(EncoderConfig(**shape, positions="rotary", norm="rms", mlp="swiglu", bias=False))
    )


def test_warm_start_begins_as_the_encoders_language_model(tokenizer, ids):
    model = make_model(tokenizer)
    source, target = ids[None, :16], ids[None, 16:36]
    expected = model.encoder(target, is_causal=True).logits
    assert not torch.allclose(model(source, target).logits, expected, atol=1e-3)
    warm_start_decoder(model)
    torch.testing.assert_close(model(source, target).logits, expected)
    # Not the same tensors: the decoder is trained apart from the encoder.
    ours = {id(p) for p in model.decoder.blocks.parameters()}
    assert ours.isdisjoint({id(p) for p in model.encoder.stack.blocks.parameters()})


def test_warm_start_needs_equal_sizes(tokenizer):
    encoder = EncoderConfig(vocab_size=30, max_length=8, num_layers=2, num_heads=2, embed_dim=8)
    smaller = EncoderDecoderConfig(EncoderConfig(**vars(encoder) | {"num_layers": 1})).decoder
    with pytest.raises(ValueError, match="model"):
        warm_start_decoder(EncoderDecoder(EncoderDecoderConfig(encoder, smaller)))


def test_learns_and_reports_every_loss(tokenizer, ids, tmp_path):
    model = make_model(tokenizer)
    before = continuation_loss(model, ids[:200], tokenizer, 16, 20, 4)
    history = finetune_decoder(
        model, ids, tokenizer, tmp_path, steps=100, adversarial_from=0.3, adversarial_every=2, sample_every=20,
        validation_ids=ids[:200], validate_every=40, **SETTINGS,
    )  # fmt: skip
    for name in ("continuation", "gaps", "loss"):
        first, last = (sum(row[name] for row in rows) / 5 for rows in (history[:5], history[-5:]))
        assert last < 0.7 * first, name
    assert [i for i, row in enumerate(history, 1) if "validation_loss" in row] == [40, 80, 100]
    after = history[-1]["validation_loss"]
    assert after == pytest.approx(continuation_loss(model, ids[:200], tokenizer, 16, 20, 4))
    assert after < 0.5 * before
    adversarial = [i for i, row in enumerate(history) if "critic" in row]
    assert adversarial == list(range(30, 100, 2))
    for row in history:
        total = row["continuation"] + 4 / 6 * row["gaps"]
        if "critic" in row:
            total += 0.02 * row["features"] + (0.02 * row["adversarial"] if row["critic_accuracy"] > 0.5 else 0)
        assert row["loss"] == pytest.approx(total, rel=1e-4)


class Stopped(Exception):
    pass


@pytest.mark.parametrize("stop_at", [5, 11])
def test_a_resumed_run_is_the_same_run(tokenizer, ids, tmp_path, stop_at):
    settings = dict(steps=14, adversarial_from=0.2, adversarial_every=2, sample_every=4, checkpoint_every=3, **SETTINGS)
    whole = make_model(tokenizer)
    history = finetune_decoder(whole, ids, tokenizer, tmp_path / "whole", **settings)

    def stop(done, steps, metrics):
        if done == stop_at:
            raise Stopped

    with pytest.raises(Stopped):
        finetune_decoder(make_model(tokenizer), ids, tokenizer, tmp_path / "cut", progress=stop, **settings)
    resumed = make_model(tokenizer)
    done = []
    again = finetune_decoder(
        resumed, ids, tokenizer, tmp_path / "cut", progress=lambda i, n, m: done.append(i), **settings
    )
    assert done[0] > 3
    assert again == history
    for name, tensor in whole.state_dict().items():
        assert torch.equal(tensor, resumed.state_dict()[name]), name


def test_without_adversary_nothing_is_generated(tokenizer, ids, tmp_path, monkeypatch):
    def fail(*args, **kwargs):
        raise AssertionError("generated")

    monkeypatch.setattr("gpt4fast.training.finetune.generate", fail)
    settings = dict(steps=3, adversarial_from=0.0, adversarial_weight=0.0, feature_weight=0.0, **SETTINGS)
    history = finetune_decoder(make_model(tokenizer), ids, tokenizer, tmp_path, **settings)
    assert all("critic" not in row for row in history)


def test_gaps_are_also_filled_in_generated_text(tokenizer, ids, tmp_path, monkeypatch):
    mark = int(tokenizer.encode("z")[0])  # not in the text: only the stand-in generator writes it
    assert mark not in ids
    seen = []
    original = finetune.gap_filling

    def write(model, source, *, max_new_tokens, **kwargs):
        return torch.full((len(source), max_new_tokens), mark)

    def spy(rows, *args):
        seen.append(rows.clone())
        return original(rows, *args)

    monkeypatch.setattr(finetune, "generate", write)
    monkeypatch.setattr(finetune, "gap_filling", spy)
    settings = dict(steps=12, adversarial_from=0.5, adversarial_every=3, sample_every=3, **SETTINGS)
    finetune_decoder(make_model(tokenizer), ids, tokenizer, tmp_path, **settings)
    early, late = torch.cat(seen[:6]), torch.cat(seen[6:])
    assert (early[:, 0] == tokenizer.bos_id).all() and not (early == mark).any()
    tagged = late[:, 0] == tokenizer.generated_id
    assert tagged.sum() == 6  # one row in four
    assert (late[tagged] == mark).any() and not (late[~tagged] == mark).any()


def test_losses_of_critic_and_decoder():
    assert float(critic_loss(torch.tensor([9.0, 9.0]), torch.tensor([-9.0]))) < 1e-3
    assert float(critic_loss(torch.tensor([0.0]), torch.tensor([0.0]))) == pytest.approx(2 * math.log(2))
    assert float(critic_loss(torch.tensor([-9.0]), torch.tensor([9.0]))) > 17
    assert float(fooling_loss(torch.tensor([9.0]))) < 1e-3 < 8 < float(fooling_loss(torch.tensor([-9.0])))


def test_adversarial_gradient_reaches_the_decoder_and_not_the_critic(tokenizer, ids, tmp_path):
    """With the self-supervised gradient out of the way, the decoder moves; the critic does not."""
    model = make_model(tokenizer)
    source, target = ids[None, :16], ids[None, 16:36]
    with HiddenStates(model) as hidden:
        logits = model(source, target).logits
    torch.testing.assert_close(model.head(hidden.value), logits)
    critic = HiddenDiscriminator(32)
    critic.requires_grad_(False)
    score, _ = critic(hidden.value)
    fooling_loss(score).backward()
    assert all(p.grad is None for p in critic.parameters())
    moved = [name for name, p in model.named_parameters() if p.grad is not None and bool(p.grad.any())]
    assert any("decoder.blocks.0.attention" in name for name in moved)
    assert any("encoder" in name for name in moved)


def test_the_critic_learns_to_tell_two_kinds_of_hidden_states_apart():
    torch.manual_seed(0)
    critic = HiddenDiscriminator(8)
    optimizer = torch.optim.AdamW(critic.parameters(), lr=1e-2)
    for _ in range(60):
        # Equal mean and variance at each position: only the movement from token to token differs.
        rough = torch.randn(16, 24, 8)
        smooth = torch.randn(16, 6, 8).repeat_interleave(4, 1)
        loss = critic_loss(critic(rough)[0], critic(smooth)[0])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    rough, smooth = torch.randn(200, 24, 8), torch.randn(200, 6, 8).repeat_interleave(4, 1)
    accuracy = torch.cat([critic(rough)[0] > 0, critic(smooth)[0] < 0]).float().mean()
    assert accuracy > 0.9
    assert critic(rough)[1].shape == (200, 128)


def test_validation_loss_against_one_row_at_a_time(tokenizer, ids):
    model = make_model(tokenizer)
    losses = []
    bos = torch.tensor([tokenizer.bos_id])
    for start in (0, 20):
        source = torch.cat([bos, ids[start : start + 16]])[None]
        target = torch.cat([bos, ids[start + 12 : start + 36]])[None]
        losses.append(F.cross_entropy(model(source, target[:, :-1]).logits[0, 4:], target[0, 5:]))
    mine = continuation_loss(model, ids[:60], tokenizer, 16, 20, 4)
    assert mine == pytest.approx(float(sum(losses).detach()) / 2, rel=1e-5)


@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("steps", {"steps": 0}),
        ("context", {"context": 0}),
        ("length", {"length": 15}),
        ("overlap", {"overlap": 17}),
        ("continue_rows", {"continue_rows": 0}),
        ("gap_rows", {"gap_rows": -1}),
        ("sample_rows", {"sample_rows": 0}),
        ("sample_every", {"sample_every": 0}),
        ("lr", {"lr": -1e-3}),
        ("token_ids", {"context": 10**6}),
    ],
)
def test_errors_name_the_argument(tokenizer, ids, tmp_path, name, arguments):
    with pytest.raises(ValueError, match=name):
        finetune_decoder(make_model(tokenizer), ids, tokenizer, tmp_path, **({"steps": 2} | SETTINGS | arguments))
