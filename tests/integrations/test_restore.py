"""restore(): the model that was given to optimize(), class by class."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import gpt4fast


class LayerNorm2d(nn.LayerNorm):
    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return super().forward(input.movedim(1, -1)).movedim(-1, 1)


class Attention(nn.Module):
    def forward(self, query: torch.Tensor) -> torch.Tensor:
        return nn.functional.scaled_dot_product_attention(query, query, query)


def generator() -> nn.Module:
    return nn.Sequential(
        nn.ConvTranspose2d(4, 8, 4, 2, 1),
        nn.LeakyReLU(0.3),
        nn.ConvTranspose2d(8, 8, 2, 2),
        LayerNorm2d(8),
        nn.ReLU(),
        nn.Sequential(nn.Conv2d(8, 8, 3, 2, 1), nn.ConvTranspose2d(8, 3, 4, 2, 1)),
        Attention(),
    ).eval()


def described(model: nn.Module) -> list[tuple]:
    return [(path, type(module), sorted(vars(module)), str(module)) for path, module in model.named_modules()]


@pytest.mark.parametrize("training", [False, True])
def test_everything_is_as_it_was(training: bool) -> None:
    model, input = generator(), torch.randn(2, 4, 8, 8)
    fast = gpt4fast.optimize(model, training=training)
    changed, plain = described(fast), gpt4fast.restore(fast)
    assert described(plain) == described(model) != changed
    assert described(fast) == changed  # and stays what it is
    assert all(p is q for p, q in zip(model.parameters(), plain.parameters(), strict=True))
    assert list(plain.state_dict()) == list(model.state_dict())
    assert torch.equal(plain(input), model(input))
    assert torch.allclose(fast(input), model(input), atol=1e-5)


def test_batch_norms_of_training_and_multihead_attention() -> None:
    model = nn.ModuleList([nn.Sequential(nn.ConvTranspose1d(4, 4, 4, 2), nn.BatchNorm1d(4), nn.ReLU())])
    model.append(nn.MultiheadAttention(8, 2))
    fast = gpt4fast.optimize(model, training=True)
    assert type(fast[1]) is gpt4fast.nn.MultiheadAttention
    assert described(gpt4fast.restore(fast)) == described(model)
    assert gpt4fast.restore(fast).training == model.training


def test_a_model_that_was_not_optimized() -> None:
    model = generator()
    assert described(gpt4fast.restore(model)) == described(model)
    own = gpt4fast.nn.ConvTranspose2d(3, 3, 2, norm="batch", activation="relu")
    assert type(gpt4fast.restore(own)) is gpt4fast.nn.ConvTranspose2d  # what torch's module could not say


def test_a_folded_batch_norm() -> None:
    model = nn.Sequential(nn.Sequential(nn.ConvTranspose2d(3, 3, 2), nn.BatchNorm2d(3), nn.ReLU())).eval()
    with pytest.raises(ValueError, match=r"but had BatchNorm2d at 0\.1: keep the model"):
        gpt4fast.restore(gpt4fast.optimize(model))
    with pytest.raises(TypeError, match="model must be a torch.nn.Module, but is 3"):
        gpt4fast.restore(3)


def test_transformers_models() -> None:
    transformers = pytest.importorskip("transformers", minversion="5.23")
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    for implementation in ("eager", "sdpa"):
        model = transformers.AutoModel.from_config(
            transformers.LlamaConfig(**sizes), attn_implementation=implementation
        )
        fast = gpt4fast.optimize(nn.Sequential(model))
        assert fast[0].config._attn_implementation == "gpt4fast"
        plain = gpt4fast.restore(fast)[0]
        assert plain.config._attn_implementation == implementation
        assert "attention_before" not in vars(plain) and "attention_before" in vars(fast[0])
    loaded = transformers.AutoModel.from_config(transformers.LlamaConfig(**sizes), attn_implementation="gpt4fast")
    assert gpt4fast.restore(loaded).config._attn_implementation == "sdpa"
