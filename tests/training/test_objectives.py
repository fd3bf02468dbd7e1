"""Objectives against expectations made by hand."""

from __future__ import annotations

import math

import pytest
import torch

from gpt4fast.data.tokenizer import Tokenizer
from gpt4fast.training.objectives import (
    choose_spans,
    gap_filling,
    masked_lm,
    next_token,
    span_infilling,
    token_cross_entropy,
    windows,
)
from gpt4fast.training.optimization import Muon, clipped_step, make_optimizers, orthogonalize, warmup_cosine


@pytest.fixture(scope="module")
def tokenizer():
    return Tokenizer.train("the cat sat on the mat. " * 20, 280)


@pytest.fixture
def ids(tokenizer):
    """(64, 100) ordinary ids after a `<bos>`."""
    ids = torch.randint(tokenizer.special_count, tokenizer.vocab_size, (64, 101))
    ids[:, 0] = tokenizer.bos_id
    return ids


def test_masked_lm_rates_and_labels(tokenizer, ids):
    ids = ids.repeat(8, 1)
    inputs, labels = masked_lm(ids, tokenizer)
    chosen = labels != -100
    share = chosen[:, 1:].float().mean()
    assert share == pytest.approx(0.15, abs=0.01)
    assert torch.equal(labels[chosen], ids[chosen])
    assert torch.equal(inputs[~chosen], ids[~chosen])
    masked, kept = inputs == tokenizer.mask_id, inputs == ids
    assert masked[chosen].float().mean() == pytest.approx(0.8, abs=0.03)
    # A random id is by chance the old one about once in 270.
    assert kept[chosen].float().mean() == pytest.approx(0.1, abs=0.02)
    swapped = inputs[chosen & ~masked & ~kept]
    assert swapped.min() >= tokenizer.special_count and len(swapped.unique()) > 150


def test_masked_lm_leaves_special_tokens_alone(tokenizer):
    ids = torch.arange(tokenizer.special_count).repeat(50, 10)
    inputs, labels = masked_lm(ids, tokenizer, rate=1.0)
    assert torch.equal(inputs, ids) and (labels == -100).all()


def test_next_token(tokenizer):
    ids = torch.tensor([[tokenizer.bos_id, 7, 8, 9], [tokenizer.bos_id, 7, tokenizer.pad_id, tokenizer.pad_id]])
    inputs, labels = next_token(ids, tokenizer)
    assert torch.equal(inputs, ids)
    assert labels.tolist() == [[7, 8, 9, -100], [7, -100, -100, -100]]


def runs(row):
    """Lengths of the runs of True."""
    return [len(run) for run in "".join("x" if hit else " " for hit in row.tolist()).split()]


def test_choose_spans_covers_exactly_the_rate_in_runs():
    candidates = torch.ones(200, 100, dtype=torch.bool)
    candidates[:, 40:45] = False
    spans = choose_spans(candidates, 0.2)
    assert (spans.sum(1) == 19).all()
    assert not spans[:, 40:45].any()
    lengths = [length for row in spans for length in runs(row)]
    # Independent masking at this rate would give runs of 1.25 on average.
    assert 2.5 < sum(lengths) / len(lengths) < 5.5
    assert spans[:, :40].float().mean() == pytest.approx(0.2, abs=0.03)


def test_choose_spans_of_one_candidate_and_of_none():
    candidates = torch.zeros(2, 9, dtype=torch.bool)
    candidates[0, 3] = True
    assert choose_spans(candidates, 0.2).nonzero().tolist() == [[0, 3]]


def test_span_infilling(tokenizer, ids):
    inputs, labels = span_infilling(ids, tokenizer)
    hidden = labels != -100
    assert (hidden.sum(1) == 20).all() and not hidden[:, 0].any()
    assert torch.equal(labels[hidden], ids[hidden])
    assert torch.equal(inputs[~hidden], ids[~hidden])
    starts = hidden & ~torch.nn.functional.pad(hidden[:, :-1], (1, 0))
    assert (inputs[starts] == tokenizer.gap_id).all()
    assert (inputs[hidden & ~starts] == tokenizer.mask_id).all()


def test_gap_filling_can_be_put_together_again(tokenizer, ids):
    source, mask, decoder_input, labels = gap_filling(ids, tokenizer)
    assert (source[~mask] == tokenizer.pad_id).all()
    assert (decoder_input[:, 0] == tokenizer.bos_id).all()
    for row, original in enumerate(ids.tolist()):
        target = [i for i in labels[row].tolist() if i != -100]
        # What the decoder reads is what it should have written before.
        assert decoder_input[row, 1 : len(target)].tolist() == target[:-1]
        assert target[0] == tokenizer.gap_id and target[-1] == tokenizer.eos_id
        pieces, piece = [], []
        for token in [*target[1:-1], tokenizer.gap_id]:
            if token == tokenizer.gap_id:
                pieces.append(piece)
                piece = []
            else:
                piece.append(token)
        whole = []
        for token in source[row][mask[row]].tolist():
            whole += pieces.pop(0) if token == tokenizer.gap_id else [token]
        assert whole == original and not pieces
        assert len(target) - target.count(tokenizer.gap_id) - 1 == 30


def test_windows_stay_within_their_row():
    token_ids = torch.arange(60).reshape(3, 20)
    seen = windows(token_ids, 400, 18)
    assert (seen.diff(dim=1) == 1).all()
    assert (seen[:, 0] // 20 == seen[:, -1] // 20).all()
    assert sorted({int(i) for i in seen[:, 0]}) == [0, 1, 2, 20, 21, 22, 40, 41, 42]
    assert sorted({int(i) for i in windows(torch.arange(20), 200, 18)[:, 0]}) == [0, 1, 2]
    with pytest.raises(ValueError, match="token_ids"):
        windows(token_ids, 1, 21)


def test_token_cross_entropy():
    logits = torch.tensor([[[0.0, 0.0], [0.0, math.log(3)]]], requires_grad=True)
    assert float(token_cross_entropy(logits, torch.tensor([[0, 1]])).detach()) == pytest.approx(
        (math.log(2) + math.log(4 / 3)) / 2
    )
    nothing = token_cross_entropy(logits, torch.tensor([[-100, -100]]))
    nothing.backward()
    assert float(nothing.detach()) == 0 and (logits.grad == 0).all()


def test_warmup_cosine():
    rates = [warmup_cosine(step, 101, warmup=0.1, floor=0.05) for step in range(101)]
    assert rates[:10] == pytest.approx([0.1 * (i + 1) for i in range(10)])
    assert rates[10] == 1 and rates[-1] == pytest.approx(0.05)
    assert rates[55] == pytest.approx(0.525)
    assert all(a >= b for a, b in zip(rates[10:], rates[11:], strict=False))
    assert warmup_cosine(0, 1) == 1


def test_every_parameter_has_one_optimizer_and_muon_only_matrices():
    from gpt4fast.models import Encoder, EncoderConfig

    for tied in (True, False):
        shape = dict(vocab_size=30, max_length=8, num_layers=2, num_heads=2, embed_dim=8, tie_embeddings=tied)
        encoder = Encoder(EncoderConfig(**shape))
        optimizers = make_optimizers(encoder, 1e-3, 0.1)
        names = {id(p): name for name, p in encoder.named_parameters()}
        owned = {k: [names[id(p)] for g in o.param_groups for p in g["params"]] for k, o in optimizers.items()}
        assert sorted(owned["muon"] + owned["adamw"]) == sorted(names.values())
        assert all("blocks" in name or name == "transform.weight" for name in owned["muon"])
        assert {
            name for name in names.values() if "blocks" in name and "norm" not in name and "bias" not in name
        } <= set(owned["muon"])


def test_clipped_step_clips_the_joint_norm_and_clears():
    first, second = (torch.nn.Parameter(torch.zeros(1)) for _ in range(2))
    optimizers = [torch.optim.SGD([p], lr=9.0) for p in (first, second)]
    first.grad, second.grad = torch.tensor([3.0]), torch.tensor([4.0])
    assert clipped_step(optimizers, 0.1, 1.0) == pytest.approx(5.0)
    assert (float(first.detach()), float(second.detach())) == pytest.approx((-0.06, -0.08))
    assert first.grad is None and second.grad is None


@pytest.mark.parametrize("shape", [(3, 8, 20), (2, 20, 8), (1, 8, 8)])
def test_orthogonalize_keeps_directions_and_levels_sizes(shape):
    matrices = torch.randn(shape, dtype=torch.float64)
    u, s, vh = torch.linalg.svd(matrices, full_matrices=False)
    levelled = u.mT @ orthogonalize(matrices) @ vh.mT
    values = levelled.diagonal(dim1=1, dim2=2)
    torch.testing.assert_close(levelled, torch.diag_embed(values), rtol=0, atol=1e-9)
    # Tiny singular values need more than five steps.
    assert ((values > 0.65) & (values < 1.25))[s > 0.05 * s.amax(1, keepdim=True)].all()


def test_muon_agrees_with_torchs():
    ours, theirs = (torch.nn.Parameter(torch.ones(6, 10)) for _ in range(2))
    optimizers = [
        Muon([ours], lr=0.1, weight_decay=0.2),
        torch.optim.Muon([theirs], lr=0.1, weight_decay=0.2, adjust_lr_fn="match_rms_adamw"),
    ]
    for _ in range(4):
        gradient = torch.randn(6, 10)
        for parameter, optimizer in zip((ours, theirs), optimizers, strict=True):
            parameter.grad = gradient.clone()
            optimizer.step()
    moved = (theirs.detach() - 1).abs().max()
    # torch's works in bfloat16.
    torch.testing.assert_close(ours, theirs, rtol=0, atol=float(moved) * 0.03)
