"""Encoder against torch's own nn.TransformerEncoderLayer with the weights moved over."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from gpt4fast.models import Encoder, EncoderConfig

SMALL = {"vocab_size": 61, "max_length": 16, "num_layers": 2, "num_heads": 4, "embed_dim": 32, "mlp_dim": 48}


def torch_layers(model):
    """The blocks as torch's layers, in double precision."""
    layers = nn.ModuleList(
        nn.TransformerEncoderLayer(32, 4, 48, dropout=0, activation="gelu", batch_first=True, norm_first=True)
        for _ in model.stack.blocks
    ).double()
    names = {
        "attention.qkv.weight": "self_attn.in_proj_weight", "attention.qkv.bias": "self_attn.in_proj_bias",
        "attention.out.weight": "self_attn.out_proj.weight", "attention.out.bias": "self_attn.out_proj.bias",
        "attention_norm.weight": "norm1.weight", "attention_norm.bias": "norm1.bias",
        "mlp_norm.weight": "norm2.weight", "mlp_norm.bias": "norm2.bias",
        "mlp.up.weight": "linear1.weight", "mlp.up.bias": "linear1.bias",
        "mlp.down.weight": "linear2.weight", "mlp.down.bias": "linear2.bias",
    }  # fmt: skip
    for layer, block in zip(layers, model.stack.blocks, strict=True):
        layer.load_state_dict({names[name]: tensor for name, tensor in block.state_dict().items()})
    return layers


@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("padded", [False, True])
def test_equals_torch(randomize, is_causal, padded):
    model = randomize(Encoder(EncoderConfig(**SMALL)).double())
    ids = torch.randint(61, (3, 12))
    lengths = torch.tensor([12, 5, 9] if padded else [12, 12, 12])
    real = torch.arange(12) < lengths[:, None]
    x = F.embedding(ids, model.stack.tokens.weight) + model.stack.positions.weight[:12]
    for layer in torch_layers(model):
        x = layer(
            x, src_mask=torch.ones(12, 12, dtype=torch.bool).triu(1) if is_causal else None, src_key_padding_mask=~real
        )
    hidden = F.layer_norm(x, (32,), model.stack.norm.weight, model.stack.norm.bias)
    y = F.gelu(F.linear(hidden, model.transform.weight, model.transform.bias))
    y = F.layer_norm(y, (32,), model.transform_norm.weight, model.transform_norm.bias)
    logits = (hidden if is_causal else y) @ model.stack.tokens.weight.T + (0 if is_causal else model.head.bias)

    output = model(ids, attention_mask=real if padded else None, is_causal=is_causal)
    torch.testing.assert_close(output.hidden[real], hidden[real], rtol=0, atol=1e-11)
    torch.testing.assert_close(output.logits[real], logits[real], rtol=0, atol=1e-11)
    assert torch.equal(model.encode(ids, attention_mask=real if padded else None, is_causal=is_causal), output.hidden)


def test_reads_both_ways_unless_causal(randomize):
    model = randomize(Encoder(EncoderConfig(**SMALL, positions="rotary", norm="rms", num_kv_heads=2)).double())
    ids = torch.randint(61, (1, 10))
    changed = ids.clone()
    changed[0, 7] = (ids[0, 7] + 1) % 61
    moved = (model.encode(ids) - model.encode(changed)).abs().amax(-1)[0]
    assert (moved > 1e-6).all()
    moved = (model.encode(ids, is_causal=True) - model.encode(changed, is_causal=True)).abs().amax(-1)[0]
    assert moved[:7].max() == 0 and (moved[7:] > 1e-6).all()


def test_loss_counts_masked_positions_only():
    model = Encoder(EncoderConfig(**SMALL))
    ids = torch.randint(61, (2, 10))
    labels = torch.full_like(ids, -100)
    labels[:, [1, 4]] = ids[:, [1, 4]]
    output = model(ids, labels)
    torch.testing.assert_close(
        output.loss, F.cross_entropy(output.logits[:, [1, 4]].flatten(0, 1), ids[:, [1, 4]].flatten())
    )
    output.loss.backward()
    assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in model.parameters())


def test_learns_to_fill_in_masked_tokens():
    model = Encoder(EncoderConfig(**SMALL))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    losses = []
    for _ in range(100):
        text = torch.randint(60, (32, 1)).repeat(1, 10)  # one token over and over: what is masked stands beside it
        masked = torch.rand(text.shape) < 0.2
        loss = model(text.masked_fill(masked, 60), text.masked_fill(~masked, -100)).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[0] > 4 and losses[-1] < 1


def test_compiles_without_graph_breaks():
    model = Encoder(EncoderConfig(**SMALL))
    ids = torch.randint(61, (2, 8))
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(ids, ids).loss, model(ids, ids).loss)
