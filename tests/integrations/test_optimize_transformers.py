"""optimize() on nn.TransformerEncoder, its layers, decoder layers and attention blocks of other libraries."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import nn

import gpt4fast
from gpt4fast.integrations import transformer_layers
from gpt4fast.integrations.transformer_layers import Encoder, EncoderLayer

pytestmark = pytest.mark.filterwarnings(
    "ignore:.*nested tensors is in prototype stage:UserWarning", "ignore:enable_nested_tensor is True:UserWarning"
)


@pytest.fixture
def all_large(monkeypatch, needs_native) -> None:
    for name in ("WHOLE", "PADDED", "PADDED_HALF", "PACKED"):
        monkeypatch.setattr(transformer_layers, f"FEWEST_{name}", 0)


@pytest.fixture
def calls(monkeypatch) -> list[str]:
    """Which of torch's fused op and our attention ran."""
    from gpt4fast.backends import dispatch

    found, fused, run = [], torch._transformer_encoder_layer_fwd, dispatch.run
    monkeypatch.setattr(torch, "_transformer_encoder_layer_fwd", lambda *args: found.append("torch") or fused(*args))
    monkeypatch.setattr(dispatch, "run", lambda op, *args: found.append(op.name) or run(op, *args))
    return found


def masks(batch: int, length: int, heads: int) -> dict[str, dict]:
    position = torch.arange(length)
    right = position >= torch.tensor([length, 3, length - 2])[:batch, None]
    hidden = torch.rand(length, length) < 0.3
    hidden[:, 0] = False  # all see one
    holes = torch.rand(batch, length) < 0.3
    holes[:, 0] = False
    causal = nn.Transformer.generate_square_subsequent_mask(length)
    return {
        "none": {},
        "right": {"src_key_padding_mask": right},
        "left": {"src_key_padding_mask": right.flip(1)},
        "holes": {"src_key_padding_mask": holes},
        "float padding": {"src_key_padding_mask": torch.zeros(batch, length).masked_fill(holes, -torch.inf)},
        "bool": {"src_mask": hidden},
        "float": {"src_mask": torch.randn(length, length)},
        "heads": {"src_mask": hidden.expand(batch * heads, -1, -1)},
        "both": {"src_mask": hidden, "src_key_padding_mask": right},
        "mixed": {"src_mask": torch.randn(length, length), "src_key_padding_mask": right},
        "causal": {"src_mask": causal, "is_causal": True},
        "causal right": {"src_mask": causal < 0, "is_causal": True, "src_key_padding_mask": right},
    }


MASKS = list(masks(1, 4, 1))


@pytest.mark.filterwarnings("ignore:Support for mismatched .*mask:UserWarning")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("norm_first", [False, True])
@pytest.mark.parametrize("mask", MASKS)
def test_encoder_layers(mask, norm_first, dtype, all_large, calls) -> None:
    layer = nn.TransformerEncoderLayer(32, 4, 48, 0.1, "gelu", batch_first=True, norm_first=norm_first).eval().to(dtype)
    x = torch.randn(3, 11, 32).to(dtype)
    settings = masks(3, 11, 4)[mask]
    fast = gpt4fast.optimize(layer)
    assert isinstance(fast, EncoderLayer)
    exact = copy.deepcopy(layer).double()(x.double(), **settings)
    torchs = layer(x, **settings)  # with gradients: torch's fused op takes what is finite in a float mask as hidden
    allowed = 2 * (torchs - exact).norm() + 4 * torch.finfo(dtype).eps * exact.norm()
    for gradients in (False, True):
        calls.clear()
        with torch.set_grad_enabled(gradients):
            ours = fast(x, **settings)
        assert calls == ["attention"] or mask == "mixed"  # which torch itself makes masks of one dtype from
        assert ours.requires_grad == gradients
        assert (ours - exact).norm() <= allowed


@pytest.mark.parametrize("norm", [False, True])
@pytest.mark.parametrize("mask", ["none", "right", "left", "holes", "bool", "both", "causal"])
def test_encoders(mask, norm, all_large, calls) -> None:
    layer = nn.TransformerEncoderLayer(32, 4, 48, batch_first=True)
    model = nn.TransformerEncoder(layer, 2, nn.LayerNorm(32) if norm else None).eval()
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.3)
    x = torch.randn(3, 11, 32)
    settings = masks(3, 11, 4)[mask]
    if "src_mask" in settings:
        settings["mask"] = settings.pop("src_mask")
    fast = gpt4fast.optimize(model)
    assert isinstance(fast, Encoder) and isinstance(fast, nn.TransformerEncoder)
    with torch.no_grad():
        expected = model(x, **settings)
        calls.clear()
        out = fast(x, **settings)
        copied = pickle.loads(pickle.dumps(fast))(x, **settings)
    assert set(calls) == {"attention_varlen" if mask == "right" else "attention"}
    torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-4)
    if mask == "right" and not norm:
        assert out[1, 3:].count_nonzero() == 0
    assert torch.equal(copied, out)
    assert [type(m) for m in gpt4fast.restore(fast).modules()] == [type(m) for m in model.modules()]


def test_small_layers_keep_torchs_fused_op(calls) -> None:
    layer = nn.TransformerEncoderLayer(32, 4, 48, batch_first=True).eval()
    model = nn.TransformerEncoder(layer, 2)
    fast = gpt4fast.optimize(model)
    right = masks(3, 11, 4)["right"]
    with torch.no_grad():
        x = torch.randn(3, 11, 32)
        torch.testing.assert_close(fast(x), model(x))
        assert calls == ["torch"] * 4
        torch.testing.assert_close(fast(x, **right), model(x, **right))
        assert calls == ["torch"] * 8


def test_what_is_tied_to_a_layer_is_honoured(all_large, calls) -> None:
    layer = nn.TransformerEncoderLayer(32, 4, 48, batch_first=True).eval()
    x, outputs = torch.randn(3, 11, 32), []
    layer.self_attn.register_forward_hook(lambda module, args, out: outputs.append(out[0]))
    fast, settings = gpt4fast.optimize(layer), masks(3, 11, 4)["left"]
    with torch.no_grad():
        torch.testing.assert_close(fast(x, **settings), layer(x, **settings))
    torch.testing.assert_close(*outputs)
    fast.train(), layer.train()
    torch.manual_seed(0)
    assert not torch.equal(fast(x), fast(x))  # dropout
    with pytest.raises((RuntimeError, AssertionError)):
        fast(torch.randn(3, 11, 16))


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("batch_first", [False, True])
def test_decoder_layers(batch_first, training, calls) -> None:
    layer = nn.TransformerDecoderLayer(32, 4, 48, 0.0, batch_first=batch_first)
    model = nn.TransformerDecoder(layer, 2).train(training)
    fast = gpt4fast.optimize(model, training=training)
    target, memory = torch.randn(3, 7, 32), torch.randn(3, 9, 32)
    if not batch_first:
        target, memory = target.transpose(0, 1), memory.transpose(0, 1)
    settings = {
        "tgt_mask": nn.Transformer.generate_square_subsequent_mask(7),
        "tgt_is_causal": True,
        "memory_key_padding_mask": torch.arange(9) >= torch.tensor([9, 4, 6])[:, None],
    }
    out, expected = fast(target, memory, **settings), model(target, memory, **settings)
    torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-5)
    assert calls == ["attention"] * 4
    for ours, torchs in zip(*(torch.autograd.grad(o.square().sum(), list(m.parameters())) for o, m in
                              ((out, fast), (expected, model))), strict=True):  # fmt: skip
        torch.testing.assert_close(ours, torchs, rtol=1e-3, atol=1e-4)
