"""GPT against the same network written by hand from torch's own functions, in every style."""

from __future__ import annotations

import copy
import dataclasses

import pytest
import torch
from torch.nn import functional as F

from gpt4fast.models import GPT, GPTConfig


def plain_gpt(state, config, ids, starts=None, lengths=None):
    """Logits by F.linear, F.scaled_dot_product_attention, and rotary positions as multiplication of complex numbers."""

    def linear(x, name):
        return F.linear(x, state[f"{name}.weight"], state.get(f"{name}.bias"))

    def norm(x, name):
        if config.norm == "rms":
            return x / (x.pow(2).mean(-1, keepdim=True) + config.norm_eps).sqrt() * state[f"{name}.weight"]
        return F.layer_norm(x, x.shape[-1:], state[f"{name}.weight"], state.get(f"{name}.bias"), config.norm_eps)

    B, L = ids.shape
    D, Hq, Hk = config.embed_dim // config.num_heads, config.num_heads, config.num_kv_heads
    place = torch.arange(L).expand(B, L)
    visible = torch.ones(L, L, dtype=torch.bool).tril().expand(B, 1, L, L)
    if starts is not None:
        visible = visible & (place >= starts[:, None])[:, None, None] & (place < lengths[:, None])[:, None, None]
        place = (place - starts[:, None]).clamp(min=0)
    x = F.embedding(ids, state["stack.tokens.weight"])
    if config.positions == "learned":
        x = x + F.embedding(place, state["stack.positions.weight"])
    turn = torch.polar(
        torch.ones(B, L, D // 2, dtype=torch.float64),
        place[:, :, None] / config.rotary_base ** (torch.arange(D // 2, dtype=torch.float64) * 2 / D),
    )

    def rotate(heads):  # (B, H, L, D)
        if config.positions == "learned":
            return heads
        turned = torch.complex(*heads.double().split(D // 2, -1)) * turn[:, None]
        return torch.cat((turned.real, turned.imag), -1).to(heads.dtype)

    for i in range(config.num_layers):
        name = f"stack.blocks.{i}"
        q, k, v = linear(norm(x, f"{name}.attention_norm"), f"{name}.attention.qkv").split([Hq * D, Hk * D, Hk * D], -1)
        q, k, v = (t.unflatten(-1, (-1, D)).transpose(1, 2) for t in (q, k, v))
        y = F.scaled_dot_product_attention(rotate(q), rotate(k), v, attn_mask=visible, enable_gqa=True)
        x = x + linear(y.transpose(1, 2).flatten(2), f"{name}.attention.out")
        y = linear(norm(x, f"{name}.mlp_norm"), f"{name}.mlp.up")
        if config.mlp == "swiglu":
            gate, y = y.split(config.mlp_dim, -1)
            y = F.silu(gate) * y
        else:
            y = F.gelu(y, approximate="tanh" if config.mlp == "gelu_tanh" else "none")
        x = x + linear(y, f"{name}.mlp.down")
    return linear(norm(x, "stack.norm"), "head")


def test_logits_and_gradients_equal_plain_torch(style, randomize):
    model = randomize(GPT(style).double())
    ids = torch.randint(style.vocab_size, (3, 17))
    state = {name: p.detach().requires_grad_() for name, p in model.named_parameters(remove_duplicate=False)}
    if style.tie_embeddings:
        state["head.weight"] = state["stack.tokens.weight"]
    expected = plain_gpt(state, style, ids)
    actual = model(ids).logits
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-11)

    weights = torch.randn_like(expected)
    (expected * weights).sum().backward()
    (actual * weights).sum().backward()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(
            parameter.grad, state[name].grad, rtol=1e-9, atol=1e-9, msg=lambda m, n=name: f"{n}: {m}"
        )


def test_padded_rows_equal_plain_torch(style, randomize):
    model = randomize(GPT(style).double())
    ids = torch.randint(style.vocab_size, (3, 9))
    starts, lengths = torch.tensor([0, 4, 1]), torch.tensor([9, 9, 6])
    index = torch.arange(9)
    real = (index >= starts[:, None]) & (index < lengths[:, None])
    expected = plain_gpt(model.state_dict(), style, ids, starts, lengths)
    torch.testing.assert_close(model(ids, attention_mask=real).logits[real], expected[real], rtol=0, atol=1e-11)
    for b in range(3):  # and each row is what it would be alone, without its padding
        alone = model(ids[b : b + 1, starts[b] : lengths[b]]).logits
        torch.testing.assert_close(
            model(ids, attention_mask=real.long()).logits[b, real[b]], alone[0], rtol=0, atol=1e-11
        )


def test_loss_is_cross_entropy_over_labels_that_are_not_ignored(style):
    model = GPT(style)
    ids, labels = torch.randint(style.vocab_size, (2, 2, 10))
    labels[0, 3:] = -100
    output = model(ids, labels)
    expected = F.cross_entropy(output.logits.flatten(0, 1), labels.flatten(), ignore_index=-100)
    torch.testing.assert_close(output.loss, expected)
    assert abs(output.loss.item() - torch.tensor(61.0).log().item()) < 0.3  # a fresh model knows nothing


def test_loss_is_zero_and_gradients_finite_where_all_labels_are_ignored():
    model = GPT(GPTConfig.gpt2(vocab_size=61, max_length=8, num_layers=1, num_heads=2, embed_dim=8))
    loss = model(torch.zeros(2, 4, dtype=torch.long), torch.full((2, 4), -100)).loss
    loss.backward()
    assert loss.item() == 0
    assert all(p.grad.abs().max() == 0 for p in model.parameters())


def test_initial_values():
    model = GPT(GPTConfig.gpt2(num_layers=8, num_heads=4, embed_dim=256, vocab_size=512, max_length=64))
    block = model.stack.blocks[3]
    for weight, std in (
        (model.stack.tokens.weight, 0.02),
        (block.attention.qkv.weight, 0.02),
        (block.attention.out.weight, 0.02 / 16**0.5),
        (block.mlp.up.weight, 0.02),
        (block.mlp.down.weight, 0.02 / 16**0.5),
    ):
        assert abs(weight.std().item() / std - 1) < 0.05
    assert block.attention.qkv.bias.abs().max() == 0
    assert model.head.weight is model.stack.tokens.weight


def test_presets_have_the_sizes_of_their_papers():
    with torch.device("meta"):
        assert sum(p.numel() for p in GPT(GPTConfig.gpt2()).parameters()) == 124_439_808
        assert sum(p.numel() for p in GPT(GPTConfig.llama()).parameters()) == 1_100_048_384
    assert GPTConfig.llama(embed_dim=256, num_heads=4).mlp_dim == 704  # 8/3 of 256, rounded up to 64


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_errs_no_more_than_twice_as_much_as_plain_torch(style, randomize, dtype):
    half = randomize(GPT(style)).to(dtype)
    ids = torch.randint(style.vocab_size, (2, 12))
    expected = copy.deepcopy(half).double()(ids).logits  # the same rounded weights
    output = half(ids, ids)
    assert output.logits.dtype == dtype and output.loss.dtype == torch.float32
    plain = plain_gpt(half.state_dict(), style, ids)
    assert (output.logits - expected).abs().max() <= 2 * (plain - expected).abs().max()
    output.loss.backward()
    assert all(torch.isfinite(p.grad).all() for p in half.parameters())


def test_dropout_acts_in_training_only():
    model = GPT(GPTConfig.gpt2(vocab_size=61, max_length=8, num_layers=2, num_heads=2, embed_dim=16, dropout=0.5))
    ids = torch.randint(61, (2, 8))
    assert not torch.equal(model(ids).logits, model(ids).logits)
    model.eval()
    assert torch.equal(model(ids).logits, model(ids).logits)


def test_learns_a_repeating_text(any_style):
    model = GPT(any_style)
    text = torch.arange(16).repeat(2, 2)[:, :17]
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    losses = []
    for _ in range(40):
        loss = model(text[:, :-1], text[:, 1:]).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 < losses[0]


@pytest.mark.parametrize("any_style", ["gpt2", "llama", "gemma", "t5"], indirect=True)
def test_compiles_without_graph_breaks(any_style):
    windows = any_style.windows and any_style.windows[:1]
    model = GPT(dataclasses.replace(any_style, num_layers=1, windows=windows))
    ids = torch.randint(61, (2, 8))
    mask = torch.ones(2, 8, dtype=torch.bool)
    mask[0, :3] = False
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    expected, actual = model(ids, ids, attention_mask=mask), compiled(ids, ids, attention_mask=mask)
    torch.testing.assert_close(actual.logits[mask], expected.logits[mask])
    torch.testing.assert_close(actual.loss, expected.loss)
