"""gpt4fast.nn.MultiheadAttention gives torch's values, gradients, errors and state dict in every form of the call."""

from __future__ import annotations

import copy
import itertools
import pickle

import pytest
import torch
from torch import nn

import gpt4fast
from gpt4fast import ops

EMBED, HEADS, BATCH, QUERIES, KEYS = 12, 3, 2, 5, 4


@pytest.fixture
def calls(monkeypatch) -> list[str]:
    """One entry for every call of gpt4fast.attention."""
    entries = []
    attention = ops.attention

    def recording(*args, **kwargs):
        entries.append("attention")
        return attention(*args, **kwargs)

    monkeypatch.setattr(ops, "attention", recording)
    return entries


@pytest.fixture(params=["auto", "reference"])
def impl(request, monkeypatch) -> str:
    monkeypatch.setenv("GPT4FAST_IMPL", request.param)
    return request.param


def pair(**options) -> tuple[nn.MultiheadAttention, gpt4fast.nn.MultiheadAttention]:
    """Torch's module and ours with the same parameters, none of them zero."""
    torchs, ours = (kind(EMBED, HEADS, **options) for kind in (nn.MultiheadAttention, gpt4fast.nn.MultiheadAttention))
    for parameter in torchs.parameters():
        nn.init.normal_(parameter, std=0.3)
    assert list(ours.state_dict()) == list(torchs.state_dict())
    ours.load_state_dict(torchs.state_dict())
    return torchs, ours


def inputs(module: nn.MultiheadAttention, kind: str, batched: bool = True) -> tuple[torch.Tensor, ...]:
    """query, key, value: all one tensor ("self"), two ("cross") or three ("separate")."""

    def make(length: int, width: int) -> torch.Tensor:
        shape = (BATCH, length, width) if module.batch_first else (length, BATCH, width)
        return torch.randn(shape if batched else (length, width), requires_grad=True)

    if kind == "self":
        return (make(KEYS, EMBED),) * 3
    query, key = make(QUERIES, EMBED), make(KEYS, module.kdim)
    return query, key, key if kind == "cross" else make(KEYS, module.vdim)


def make_masks(attn: str | None, padding: str | None, queries: int, batched: bool) -> dict:
    """Masks in torch's sense (True: hidden); every query sees at least the first key."""
    hidden = torch.rand(BATCH * HEADS if batched else HEADS, queries, KEYS) < 0.4
    hidden[..., 0] = False
    padded = torch.arange(KEYS).expand(BATCH, KEYS) >= torch.tensor([[KEYS], [KEYS - 2]])
    found = {}
    if attn is not None:
        mask = hidden if "heads" in attn else hidden[0]
        found["attn_mask"] = torch.randn(mask.shape).masked_fill(mask, -torch.inf) if "float" in attn else mask
    if padding is not None:
        mask = padded if batched else padded[1]
        found["key_padding_mask"] = torch.randn(mask.shape) if padding == "float" else mask
    return found


def assert_same(torchs, ours, args, **kwargs) -> None:
    """Values of both, and gradients for the inputs and every parameter."""
    expected, weights = torchs(*args, **kwargs)
    out, our_weights = ours(*args, **kwargs)
    torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-5)
    if weights is None:
        assert our_weights is None
    else:
        torch.testing.assert_close(our_weights, weights)
    leaves = list(dict.fromkeys(args))
    theirs = torch.autograd.grad(expected.square().sum(), [*leaves, *torchs.parameters()], allow_unused=True)
    mine = torch.autograd.grad(out.square().sum(), [*leaves, *ours.parameters()], allow_unused=True)
    for grad, their in zip(mine, theirs, strict=True):
        torch.testing.assert_close(grad, their, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize("batch_first", [False, True])
@pytest.mark.parametrize("kind", ["self", "cross", "separate"])
@pytest.mark.parametrize("batched", [True, False], ids=["batched", "unbatched"])
def test_every_mask(kind, batched, batch_first, training, impl, calls) -> None:
    torchs, ours = (m.train(training) for m in pair(batch_first=batch_first))
    masks = [(None, None), ("bool", None), ("float heads", None), (None, "bool"), (None, "float")]
    masks += [("bool heads", "bool"), ("float", "float"), ("bool", "bool")]
    for attn, padding in masks:
        args = inputs(torchs, kind, batched)
        found = make_masks(attn, padding, KEYS if kind == "self" else QUERIES, batched)
        assert_same(torchs, ours, args, need_weights=False, **found)
    assert len(calls) == len(masks)


@pytest.mark.parametrize("options", [
    {"bias": False},
    {"add_bias_kv": True},
    {"add_zero_attn": True},
    {"add_bias_kv": True, "add_zero_attn": True, "bias": False},
    {"kdim": 7, "vdim": 9},
    {"kdim": 7, "vdim": 9, "bias": False, "add_bias_kv": True},
    {"vdim": 5, "add_zero_attn": True},
], ids=str)  # fmt: skip
@pytest.mark.parametrize("batch_first", [False, True])
def test_every_option(options, batch_first, impl, calls) -> None:
    torchs, ours = pair(batch_first=batch_first, **options)
    kinds = ["separate"] if "vdim" in options else ["self", "cross", "separate"]
    for kind, batched in itertools.product(kinds, (True, False)):
        queries = KEYS if kind == "self" else QUERIES
        for attn, padding in ((None, None), ("bool", "bool"), ("float heads", None)):
            found = make_masks(attn, padding, queries, batched)
            assert_same(torchs, ours, inputs(torchs, kind, batched), need_weights=False, **found)
    assert len(calls) == 6 * len(kinds)


@pytest.mark.parametrize("average", [True, False])
@pytest.mark.parametrize("batched", [True, False])
def test_weights_are_returned_where_asked_for(average, batched) -> None:
    torchs, ours = pair()
    args = inputs(torchs, "separate", batched)
    assert_same(torchs, ours, args, average_attn_weights=average, **make_masks("bool", None, QUERIES, batched))
    out, weights = ours(*args)
    assert weights.shape == ((BATCH, QUERIES, KEYS) if batched else (QUERIES, KEYS))
    torch.testing.assert_close(ours(*args, need_weights=False)[0], out)


@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("need_weights", [False, True])
def test_causal_hint(training, padded, need_weights, impl) -> None:
    torchs, ours = (m.train(training) for m in pair(batch_first=True))
    masks = make_masks(None, "bool" if padded else None, KEYS, True)
    causal = torch.ones(KEYS, KEYS, dtype=torch.bool).triu(1)
    assert_same(
        torchs, ours, inputs(torchs, "self"), need_weights=need_weights, attn_mask=causal, is_causal=True, **masks
    )
    with torch.no_grad():  # torch's own fast path
        x = torch.randn(BATCH, KEYS, EMBED)
        kwargs = {"need_weights": need_weights, "attn_mask": causal, "is_causal": True, **masks}
        torch.testing.assert_close(ours(x, x, x, **kwargs), torchs(x, x, x, **kwargs))


def test_dropout_is_drawn_from_torchs_generator(impl, monkeypatch) -> None:
    """The same weights from the same seed; on torch's kernels those that torch drops."""
    torchs, ours = pair(dropout=0.5)
    args = inputs(torchs, "separate")

    def drawn(module, seed):
        torch.manual_seed(seed)
        return module(*args, need_weights=False)[0]

    assert torch.equal(drawn(ours, 5), drawn(ours, 5)) and not torch.allclose(drawn(ours, 5), drawn(ours, 6))
    monkeypatch.setenv("GPT4FAST_IMPL", "torch")
    torch.testing.assert_close(drawn(ours, 5), drawn(torchs, 5))
    torch.testing.assert_close(ours.eval()(*args, need_weights=False), torchs.eval()(*args, need_weights=False))


def test_a_query_that_sees_nothing_gives_the_bias(impl) -> None:
    torchs, ours = pair(batch_first=True)
    x = torch.randn(BATCH, KEYS, EMBED, requires_grad=True)
    hidden = torch.zeros(KEYS, KEYS, dtype=torch.bool)
    hidden[2] = True
    out, _ = ours(x, x, x, need_weights=False, attn_mask=hidden)
    torch.testing.assert_close(out[:, 2], ours.out_proj.bias.expand(BATCH, -1))
    assert_same(torchs, ours, (x, x, x), need_weights=False, attn_mask=hidden)


def test_second_derivatives(impl) -> None:
    module = gpt4fast.nn.MultiheadAttention(4, 2, batch_first=True, dtype=torch.float64)
    x = torch.randn(1, 3, 4, dtype=torch.float64, requires_grad=True)
    hidden = torch.ones(3, 3, dtype=torch.bool).triu(1)
    assert torch.autograd.gradgradcheck(lambda x: module(x, x, x, need_weights=False, attn_mask=hidden)[0], x)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_and_autocast(dtype, calls) -> None:
    torchs, ours = pair(batch_first=True)
    x = torch.randn(BATCH, KEYS, EMBED)
    exact, _ = copy.deepcopy(torchs).double()(*(x.double(),) * 3, need_weights=False)
    with torch.autocast("cpu", dtype):
        results = [(module(x, x, x, need_weights=False)[0]) for module in (torchs, ours)]
    torchs, ours = torchs.to(dtype), ours.to(dtype)
    results += [module(*(x.to(dtype),) * 3, need_weights=False)[0] for module in (torchs, ours)]
    assert {r.dtype for r in results} == {dtype}
    errors = [(r.double() - exact).abs().max().item() for r in results]
    assert errors[1] <= 2 * errors[0] + 1e-3
    assert errors[3] <= 2 * errors[2] + 1e-3
    assert len(calls) == 2


BAD_CALLS = {
    "no mask for the hint": lambda m, x: m(x, x, x, need_weights=False, is_causal=True),
    "mask shape": lambda m, x: m(x, x, x, need_weights=False, attn_mask=torch.zeros(2, 2, dtype=torch.bool)),
    "3-D mask shape": lambda m, x: m(x, x, x, need_weights=False, attn_mask=torch.zeros(2, 4, 4, dtype=torch.bool)),
    "padding shape": lambda m, x: m(x, x, x, torch.zeros(4, 4, dtype=torch.bool), need_weights=False),
    "integer mask": lambda m, x: m(x, x, x, need_weights=False, attn_mask=torch.zeros(4, 4, dtype=torch.int64)),
    "width": lambda m, x: m(x[..., :6], x[..., :6], x[..., :6], need_weights=False),
    "lengths": lambda m, x: m(x, x, x[:, :1], need_weights=False),
    "dimensions": lambda m, x: m(x[0], x, x, need_weights=False),
    "4-D": lambda m, x: m(x[None], x[None], x[None], need_weights=False),
    "dtype": lambda m, x: m(x.double(), x.double(), x.double(), need_weights=False),
}


@pytest.mark.parametrize("case", BAD_CALLS)
@pytest.mark.parametrize("batch_first", [False, True])
def test_errors_are_torchs(case, batch_first) -> None:
    torchs, ours = pair(batch_first=batch_first)
    x = torch.randn(BATCH, KEYS, EMBED) if batch_first else torch.randn(KEYS, BATCH, EMBED)
    with pytest.raises(Exception) as expected:  # noqa: B017, PT011 - whichever torch raises
        BAD_CALLS[case](torchs, x)
    with pytest.raises(type(expected.value)) as raised:
        BAD_CALLS[case](ours, x)
    assert case == "dtype" or str(raised.value) == str(expected.value)  # torch's own words vary with the path it takes


def test_copies_pickles_and_compiles() -> None:
    torchs, ours = pair(batch_first=True)
    x = torch.randn(BATCH, KEYS, EMBED)
    expected = torchs(x, x, x, need_weights=False)
    for module in (copy.deepcopy(ours), pickle.loads(pickle.dumps(ours))):
        torch.testing.assert_close(module(x, x, x, need_weights=False), expected)
    torch._dynamo.reset()
    compiled = torch.compile(ours, fullgraph=True, backend="aot_eager")
    hidden = torch.ones(KEYS, KEYS, dtype=torch.bool).triu(1)
    expected = torchs(x, x, x, need_weights=False, attn_mask=hidden)
    torch.testing.assert_close(compiled(x, x, x, need_weights=False, attn_mask=hidden), expected)


def test_within_torchs_transformer() -> None:
    layer = nn.TransformerDecoderLayer(EMBED, HEADS, 24, batch_first=True).eval()
    target, memory = torch.randn(BATCH, QUERIES, EMBED), torch.randn(BATCH, KEYS, EMBED)
    causal = nn.Transformer.generate_square_subsequent_mask(QUERIES)
    expected = layer(target, memory, tgt_mask=causal, tgt_is_causal=True)
    for name in ("self_attn", "multihead_attn"):
        replacement = gpt4fast.nn.MultiheadAttention(EMBED, HEADS, batch_first=True)
        replacement.load_state_dict(getattr(layer, name).state_dict())
        setattr(layer, name, replacement.eval())
    torch.testing.assert_close(layer(target, memory, tgt_mask=causal, tgt_is_causal=True), expected)
