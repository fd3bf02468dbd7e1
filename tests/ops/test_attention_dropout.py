"""The dropout of attention: counter-based, the same on the native kernel and the reference, forward and backward."""

from __future__ import annotations

import math

import pytest
import torch
from oracles import available

import gpt4fast
from gpt4fast.backends.reference.dropout import keep_mask, philox

OURS = [
    pytest.param(name, marks=pytest.mark.skipif(not available(name), reason="not built"))
    for name in ("reference", "native")
]
# (B, Hq, Hk, Lq, Lk, D, Dv): fewer keys than a block of the generator, a tail, several blocks
SHAPES = [(2, 4, 2, 5, 7, 8, 6), (1, 2, 2, 33, 65, 17, 16), (2, 3, 1, 70, 200, 64, 64), (1, 2, 1, 1, 129, 32, 8)]


@pytest.mark.parametrize(
    ("counter", "key", "expected"),
    [  # Random123's kat_vectors, philox4x32 with 10 rounds
        ("00000000 00000000 00000000 00000000", "00000000 00000000", "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
        ("ffffffff ffffffff ffffffff ffffffff", "ffffffff ffffffff", "408f276d 41c83b0e a20bc7c6 6d5451fd"),
        ("243f6a88 85a308d3 13198a2e 03707344", "a4093822 299f31d0", "d16cfe09 94fdcceb 5001e420 24126ea1"),
    ],
)
def test_philox_known_answers(counter, key, expected):
    counter, key = (tuple(torch.tensor(int(word, 16)) for word in words.split()) for words in (counter, key))
    assert " ".join(f"{int(word):08x}" for word in philox(counter, key)) == expected


def test_keep_mask_is_the_documented_place_of_each_word():
    seed, shape, p = 0x123456789ABCDEF0, (2, 3, 4, 150), 0.3
    kept = keep_mask(torch.tensor([seed]), shape, p)
    key = (torch.tensor(seed & 0xFFFFFFFF), torch.tensor(seed >> 32))
    for b, h, i, j in [(0, 0, 0, 0), (1, 2, 3, 149), (1, 0, 2, 63), (0, 2, 1, 64), (1, 1, 3, 17), (0, 1, 0, 128)]:
        counter = tuple(torch.tensor(n) for n in (j // 64 * 16 + j % 16, i, h, b))
        word = int(philox(counter, key)[j % 64 // 16])
        assert bool(kept[b, h, i, j]) == (word >= math.floor(p * 2**32))


@pytest.mark.parametrize("p", [0.1, 0.5, 0.9])
def test_keep_mask_keeps_the_right_share(p):
    kept = keep_mask(torch.tensor([2**62 + 1]), (4, 4, 64, 256), p).float()
    n = kept.numel()
    assert abs(kept.mean() - (1 - p)) < 5 * math.sqrt(p * (1 - p) / n)
    for dim in range(4):  # neighbours in any direction are independent
        a, b = kept.narrow(dim, 1, kept.shape[dim] - 1), kept.narrow(dim, 0, kept.shape[dim] - 1)
        assert abs(((a - 1 + p) * (b - 1 + p)).mean()) < 5 * p * (1 - p) / math.sqrt(a.numel())
    assert not torch.equal(kept, keep_mask(torch.tensor([2**62 + 2]), (4, 4, 64, 256), p).float())
    assert not torch.equal(kept, keep_mask(torch.tensor([1]), (4, 4, 64, 256), p).float())  # the high word counts


@pytest.mark.parametrize("impl", ["reference", "torch", "native"])
def test_dropped_weights(impl):
    """Weights are dropped with probability p, the others scaled by 1 / (1 - p); the generator decides."""
    if not available(impl):
        pytest.skip("not built")
    query, key = torch.randn(1, 2, 8, 4), torch.randn(1, 2, 64, 4)
    value = torch.eye(64).expand(1, 2, 64, 64)  # the output is then the weights themselves
    plain = gpt4fast.attention(query, key, value, impl=impl)
    torch.manual_seed(5)
    dropped = gpt4fast.attention(query, key, value, dropout_p=0.25, impl=impl)
    assert not torch.equal(dropped, gpt4fast.attention(query, key, value, dropout_p=0.25, impl=impl))
    torch.manual_seed(5)
    assert torch.equal(dropped, gpt4fast.attention(query, key, value, dropout_p=0.25, impl=impl))
    kept = dropped != 0
    assert 0.18 < 1 - kept.float().mean() < 0.32
    torch.testing.assert_close(dropped[kept], plain[kept] / 0.75)
    assert (gpt4fast.attention(query, key, value, dropout_p=1.0, impl=impl) == 0).all()


@pytest.mark.parametrize("impl", OURS)
def test_the_generator_is_drawn_from_once_and_only_for_dropout(impl):
    query, key, value = (torch.randn(1, 2, 5, 8) for _ in range(3))
    before = torch.get_rng_state()
    gpt4fast.attention(query, key, value, impl=impl)
    gpt4fast.explain(gpt4fast.attention, query, key, value, dropout_p=0.5)
    assert torch.equal(torch.get_rng_state(), before)
    gpt4fast.attention(query, key, value, dropout_p=0.5, impl=impl)
    after = torch.get_rng_state()
    torch.set_rng_state(before)
    torch.randint(2**63 - 1, (1,))
    assert torch.equal(torch.get_rng_state(), after)


@pytest.mark.parametrize("impl", OURS)
def test_lse_is_of_the_undropped_weights(impl):
    query, key, value = (torch.randn(1, 2, 5, 8) for _ in range(3))
    _, plain = gpt4fast.attention(query, key, value, return_lse=True, impl=impl)
    _, dropped = gpt4fast.attention(query, key, value, dropout_p=0.7, return_lse=True, impl=impl)
    torch.testing.assert_close(dropped, plain)


KWARGS = [
    {},
    {"is_causal": True, "query_offset": 2, "window": (40, -1)},
    {"softcap": 2.0, "return_lse": True},
]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dropout_p", [0.1, 0.6, 1.0])
@pytest.mark.parametrize("kwargs", KWARGS, ids=str)
def test_native_equals_reference(shape, dropout_p, kwargs, needs_native):
    """From one state of the generator: the same output, gradients and second gradients within rounding."""
    batch, heads, kv_heads, rows, columns, head_dim, value_dim = shape
    query = torch.randn(batch, heads, rows, head_dim, requires_grad=True)
    key = torch.randn(batch, kv_heads, columns, head_dim, requires_grad=True)
    value = torch.randn(batch, kv_heads, columns, value_dim, requires_grad=True)
    mask = torch.randn(heads, 1, columns, requires_grad=True)
    weight = torch.randn(batch, heads, rows, value_dim)

    def results(impl, create_graph):
        torch.manual_seed(11)
        inputs = (query, key, value, mask)
        got = gpt4fast.attention(*inputs, dropout_p=dropout_p, **kwargs, impl=impl)
        out, lse = got if isinstance(got, tuple) else (got, torch.zeros(()))
        loss = (out * weight).sum() + lse.masked_fill(lse == -math.inf, 0).sin().sum()
        first = torch.autograd.grad(loss, inputs, create_graph=create_graph)
        second = torch.autograd.grad(sum(g.square().sum() for g in first), inputs) if create_graph else ()
        return [out, *first, *second]

    for create_graph in (False, True):
        for ours, truth in zip(results("native", create_graph), results("reference", create_graph), strict=True):
            assert (ours - truth).abs().max() <= 2e-5 * max(1, truth.abs().max())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_native_equals_reference_in_half_types(dtype, needs_native):
    query, key, value = (torch.randn(2, 3, 70, 40).to(dtype) for _ in range(3))
    results = []
    for impl in ("native", "reference"):
        torch.manual_seed(3)
        results.append(gpt4fast.attention(query, key, value, dropout_p=0.3, impl=impl).float())
    torch.testing.assert_close(*results, rtol=0.02, atol=0.02)


@pytest.mark.parametrize("impl", OURS)
def test_packed_sequences_drop_what_they_drop_alone(impl):
    """Sequence b of a packed batch keeps the weights of row b of a padded one."""
    lengths = torch.tensor([5, 3, 70])
    starts = torch.tensor([0, *lengths]).cumsum(0)
    padded = [torch.randn(3, 2, 70, 8) for _ in range(3)]
    torch.manual_seed(4)
    expected = gpt4fast.attention(*padded, dropout_p=0.4, kv_lengths=lengths, impl="reference")
    packed = [torch.cat([t[b, :, :n].transpose(0, 1) for b, n in enumerate(lengths)]) for t in padded]
    torch.manual_seed(4)
    got = gpt4fast.attention_varlen(*packed, starts, starts, 70, 70, dropout_p=0.4, impl=impl)
    for b, n in enumerate(lengths):
        torch.testing.assert_close(got[starts[b] : starts[b + 1]], expected[b, :, :n].transpose(0, 1))


def test_gradcheck():
    query, key, value = (torch.randn(1, 2, 3, 4, dtype=torch.float64, requires_grad=True) for _ in range(3))

    def run(*inputs):
        torch.manual_seed(1)
        return gpt4fast.attention(*inputs, dropout_p=0.4, return_lse=True)

    assert torch.autograd.gradcheck(run, (query, key, value))
    assert torch.autograd.gradgradcheck(run, (query, key, value))


@pytest.mark.parametrize("impl", OURS)
def test_compile_fullgraph(impl):
    torch._dynamo.reset()
    inputs = [torch.randn(1, 2, 5, 8, requires_grad=True) for _ in range(3)]

    def run(query, key, value):
        return gpt4fast.attention(query, key, value, dropout_p=0.4, impl=impl)

    def results(function):
        torch.manual_seed(9)
        out = function(*inputs)
        return [out, *torch.autograd.grad(out.square().sum(), inputs)]

    compiled = results(torch.compile(run, fullgraph=True, backend="aot_eager"))
    for got, expected in zip(compiled, results(run), strict=True):
        torch.testing.assert_close(got, expected)


@pytest.mark.parametrize("impl", OURS)
def test_checkpointing_drops_the_same_again(impl):
    inputs = [torch.randn(1, 2, 5, 8, requires_grad=True) for _ in range(3)]

    def run(query, key, value):
        return gpt4fast.attention(query, key, value, dropout_p=0.4, impl=impl).square().sum()

    torch.manual_seed(2)
    expected = torch.autograd.grad(run(*inputs), inputs)
    torch.manual_seed(2)
    loss = torch.utils.checkpoint.checkpoint(run, *inputs, use_reentrant=False)
    for got, truth in zip(torch.autograd.grad(loss, inputs), expected, strict=True):
        torch.testing.assert_close(got, truth)
