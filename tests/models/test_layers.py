"""Configurations, checks and padding: every wrong value is refused by name."""

from __future__ import annotations

import pytest
import torch

from gpt4fast.models import GPT, GPTConfig
from gpt4fast.models.inputs import Padding
from gpt4fast.models.positions import apply_rotary, rotary_tables

SMALL = {"vocab_size": 61, "max_length": 8, "num_layers": 1, "num_heads": 2, "embed_dim": 16}


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"vocab_size": 0}, "vocab_size must be a positive int, got 0"),
        ({"num_layers": 1.0}, "num_layers must be a positive int, got 1.0"),
        ({"mlp_dim": -4}, "mlp_dim must be a positive int, got -4"),
        ({"num_heads": 3}, r"embed_dim \(16\) must be a multiple of num_heads \(3\)"),
        ({"num_heads": 4, "num_kv_heads": 3}, r"num_heads \(4\) must be a multiple of num_kv_heads \(3\)"),
        ({"positions": "rotary", "num_heads": 16}, "rotary positions need an even head_dim, got 1"),
        ({"norm": "batch"}, "norm must be one of 'layer', 'rms', got 'batch'"),
        ({"positions": "none"}, "positions must be one of 'learned', 'rotary', 'relative', got 'none'"),
        ({"mlp": "maxout"}, "mlp must be one of 'gelu', 'gelu_tanh', .*, got 'maxout'"),
        ({"norm_placement": "end"}, "norm_placement must be one of 'pre', 'post', 'sandwich', got 'end'"),
        ({"head_dim": 0}, "head_dim must be a positive int, got 0"),
        ({"attention_softcap": -1.0}, "attention_softcap must be a number, 0 or more, got -1.0"),
        ({"logit_softcap": float("inf")}, "logit_softcap must be a number, 0 or more, got inf"),
        ({"windows": (4, 4)}, r"windows must be 1 ints, one per layer and none negative, got \(4, 4\)"),
        ({"windows": (-1,)}, r"windows must be 1 ints, one per layer and none negative, got \(-1,\)"),
        ({"rotary_frequencies": (1.0,) * 5}, "rotary_frequencies must be 1 to 4 numbers, .* got 5"),
        ({"relative_buckets": 6}, "relative_buckets must be a positive multiple of 4, got 6"),
        ({"relative_max_distance": 16}, r"more than half of relative_buckets \(32\), got 16"),
        ({"dropout": 1.0}, r"dropout must be in \[0, 1\), got 1.0"),
    ],
)
def test_wrong_configurations(changes, message):
    with pytest.raises(ValueError, match=message):
        GPTConfig(**{**SMALL, **changes})


@pytest.mark.parametrize(
    "ids, labels, mask, error, message",
    [
        ([[1, 2]], None, None, TypeError, "input_ids must be a tensor, got list"),
        (torch.zeros(1, 4), None, None, TypeError, "input_ids must be int64 or int32, got torch.float32"),
        (
            torch.zeros(4, dtype=torch.long),
            None,
            None,
            ValueError,
            r"input_ids must be \(batch, length\), got shape \(4,\)",
        ),
        (
            torch.zeros(1, 9, dtype=torch.long),
            None,
            None,
            ValueError,
            "input_ids has length 9, more than max_length = 8",
        ),
        (torch.tensor([[1, 61]]), None, None, ValueError, r"input_ids holds 61, .* \(0 to 60\)"),
        (torch.tensor([[1, -100]]), None, None, ValueError, "input_ids holds -100, which is not in the vocabulary"),
        (torch.tensor([[1, 2]]), torch.tensor([[1, 61]]), None, ValueError, "labels holds 61, .*, nor -100"),
        (torch.tensor([[1, 2]]), torch.tensor([[1, -1]]), None, ValueError, "labels holds -1"),
        (
            torch.tensor([[1, 2]]),
            torch.tensor([[1]]),
            None,
            ValueError,
            r"labels must have the shape of input_ids, \(1, 2\)",
        ),
        (
            torch.tensor([[1, 2]]),
            torch.zeros(1, 2),
            None,
            TypeError,
            "labels must be int64 or int32, got torch.float32",
        ),
        (
            torch.tensor([[1, 2]]),
            None,
            torch.ones(1, 3),
            ValueError,
            r"attention_mask must have the shape .* \(1, 2\), got",
        ),
        (torch.tensor([[1, 2]]), None, torch.ones(1, 2), TypeError, "attention_mask must be bool or integer"),
        (
            torch.tensor([[1, 2, 3]]),
            None,
            torch.tensor([[1, 0, 1]]),
            ValueError,
            "attention_mask must mark one unbroken run",
        ),
    ],
)
def test_wrong_inputs(ids, labels, mask, error, message):
    with pytest.raises(error, match=message):
        GPT(GPTConfig(**SMALL))(ids, labels, attention_mask=mask)


def test_int32_ids_and_empty_batches_work():
    model = GPT(GPTConfig(**SMALL))
    ids = torch.randint(61, (2, 5))
    assert torch.equal(model(ids.int(), ids.int()).loss, model(ids, ids).loss)
    assert model(ids[:0]).logits.shape == (0, 5, 61)


def test_padding_from_masks():
    mask = torch.tensor([[1, 1, 1, 1], [0, 0, 1, 1], [1, 0, 0, 0], [0, 1, 1, 0], [0, 0, 0, 0]])
    padding = Padding.from_mask(mask, mask)
    assert padding.starts.tolist() == [0, 2, 0, 1, 0]
    assert padding.lengths.tolist() == [4, 4, 1, 3, 0]


def test_rotary_scores_depend_on_the_distance_only():
    config = GPTConfig(**{**SMALL, "positions": "rotary"})
    x = torch.randn(2, 1, 8, dtype=torch.float64)
    (tables,) = rotary_tables(50, config, x)
    q, k = (apply_rotary(t.expand(50, 8), tables) for t in x)
    scores = q @ k.T
    for distance in (-7, 0, 30):
        diagonal = scores.diagonal(distance)
        torch.testing.assert_close(diagonal, diagonal[:1].expand_as(diagonal))
    assert scores[0, 1] != scores[1, 0]


def test_rotary_angles_survive_bfloat16():
    config = GPTConfig(**{**SMALL, "positions": "rotary"})
    ((cos, _),) = rotary_tables(2048, config, torch.zeros(1, dtype=torch.bfloat16))
    assert cos.dtype == torch.float32
    torch.testing.assert_close(cos[2047, 0], torch.tensor(2047.0, dtype=torch.float64).cos().float())
