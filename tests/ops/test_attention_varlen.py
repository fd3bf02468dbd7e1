"""``attention_varlen``: each packed sequence gives what it gives alone."""

from __future__ import annotations

import pytest
import torch
from oracles import CPU_IMPLEMENTATIONS, available

import gpt4fast

IMPLEMENTATIONS = [
    pytest.param(name, marks=pytest.mark.skipif(not available(name), reason="not built"))
    for name in CPU_IMPLEMENTATIONS
]
LENGTHS = [([5, 0, 3, 9], [4, 2, 0, 11]), ([1], [1]), ([7, 7], [7, 7]), ([70, 1, 200], [130, 64, 65])]


def packed(lengths_q, lengths_k, requires_grad=False):
    query = torch.randn(sum(lengths_q), 4, 8, requires_grad=requires_grad)
    key = torch.randn(sum(lengths_k), 2, 8, requires_grad=requires_grad)
    value = torch.randn(sum(lengths_k), 2, 6, requires_grad=requires_grad)
    starts = [torch.tensor([0, *lengths]).cumsum(0).int() for lengths in (lengths_q, lengths_k)]
    return query, key, value, *starts, max(lengths_q), max(lengths_k)


def one_by_one(query, key, value, starts_q, starts_k, **kwargs):
    """Each sequence alone, in float64 by the reference of ``attention``."""
    outputs, lses = [], []
    offsets, slopes = kwargs.pop("query_offset", 0), kwargs.pop("alibi_slopes", None)
    for b in range(len(starts_q) - 1):
        rows, columns = slice(*starts_q[b : b + 2]), slice(*starts_k[b : b + 2])
        out, lse = gpt4fast.attention(
            *(t.double().transpose(0, 1) for t in (query[rows], key[columns], value[columns])),
            query_offset=int(offsets[b]) if isinstance(offsets, torch.Tensor) else offsets,
            alibi_slopes=slopes if slopes is None or slopes.dim() == 1 else slopes[b],
            **kwargs,
            return_lse=True,
            impl="reference",
        )
        outputs.append(out.transpose(0, 1))
        lses.append(lse.transpose(0, 1))
    return torch.cat(outputs), torch.cat(lses)


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@pytest.mark.parametrize("lengths", LENGTHS, ids=str)
@pytest.mark.parametrize(
    "kwargs",
    [
        {},
        {"is_causal": True},
        {"window": (2, 1), "scale": 0.4},
        {"alibi_slopes": torch.tensor([0.1, 0.2, 0.3, 0.4])},
        {"alibi_slopes": "per sequence", "softcap": 1.5, "is_causal": True, "query_offset": -1},
    ],
    ids=str,
)
def test_values(impl, lengths, kwargs):
    if impl == "torch" and "softcap" in kwargs:
        pytest.skip("torch has no softcap")
    if kwargs.get("alibi_slopes") == "per sequence":
        kwargs = kwargs | {"alibi_slopes": torch.rand(len(lengths[0]), 4)}
    arguments = packed(*lengths)
    expected, lse = one_by_one(*arguments[:5], **kwargs)
    torch.testing.assert_close(
        gpt4fast.attention_varlen(*arguments, **kwargs, impl=impl).double(), expected, rtol=1e-5, atol=1e-5
    )
    if impl != "torch":
        _, got = gpt4fast.attention_varlen(*arguments, **kwargs, return_lse=True, impl=impl)
        torch.testing.assert_close(got.double(), lse, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_bottom_right_causal(impl):
    """The alignment of flash-attn, by the offset the docstring names."""
    query, key, value, starts_q, starts_k, *longest = packed([3, 2], [5, 4])
    offset = starts_k.diff() - starts_q.diff()
    got = gpt4fast.attention_varlen(
        query, key, value, starts_q, starts_k, *longest, is_causal=True, query_offset=offset, impl=impl
    )
    expected, _ = one_by_one(query, key, value, starts_q, starts_k, is_causal=True, query_offset=offset)
    torch.testing.assert_close(got.double(), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_half_types_and_strides(impl, dtype):
    """Views into one fused projection, as a model has them."""
    fused = torch.randn(16, 8, 8).to(dtype)  # total, Hq + 2 Hk, D
    query, key, value = fused.split([4, 2, 2], 1)
    starts = torch.tensor([0, 9, 9, 16])
    got = gpt4fast.attention_varlen(query, key, value, starts, starts, 9, 9, is_causal=True, impl=impl)
    expected, _ = one_by_one(query, key, value, starts, starts, is_causal=True)
    assert got.dtype == dtype
    close = 1e-5 if dtype == torch.float32 else 0.02
    torch.testing.assert_close(got.double(), expected, rtol=close, atol=close)


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@pytest.mark.parametrize("lengths", LENGTHS, ids=str)
@pytest.mark.parametrize("kwargs", [{"is_causal": True}, {"softcap": 2.0, "return_lse": True}], ids=str)
def test_gradients(impl, lengths, kwargs):
    if impl == "torch" and "softcap" in kwargs:
        pytest.skip("torch has no softcap")
    arguments = packed(*lengths, requires_grad=True)

    def gradients(out, lse):
        loss = out.square().sum()
        if "return_lse" in kwargs:
            loss = loss + lse.masked_fill(lse == -torch.inf, 0).sin().sum()
        return torch.autograd.grad(loss, arguments[:3])

    got = gpt4fast.attention_varlen(*arguments, **kwargs, impl=impl)
    got = got if isinstance(got, tuple) else (got, None)
    exact = one_by_one(*arguments[:5], **{k: v for k, v in kwargs.items() if k != "return_lse"})
    for ours, truth in zip(gradients(*got), gradients(*exact), strict=True):
        torch.testing.assert_close(ours, truth, rtol=1e-4, atol=1e-5)


def test_second_gradients():
    query, key, value, *rest = packed([3, 2], [2, 3])
    inputs = [t.detach().double().requires_grad_() for t in (query, key, value)]
    assert torch.autograd.gradgradcheck(lambda *qkv: gpt4fast.attention_varlen(*qkv, *rest, is_causal=True), inputs)


def test_native_second_gradients(needs_native):
    query, key, value, *rest = packed([3, 0, 2], [2, 1, 3], requires_grad=True)

    def second(impl):
        out, lse = gpt4fast.attention_varlen(query, key, value, *rest, is_causal=True, return_lse=True, impl=impl)
        loss = out.square().sum() + lse.masked_fill(lse == -torch.inf, 0).sin().sum()
        first = torch.autograd.grad(loss, (query, key, value), create_graph=True)
        return torch.autograd.grad(sum(g.square().sum() for g in first), (query, key, value))

    for ours, truth in zip(second("native"), second("reference"), strict=True):
        torch.testing.assert_close(ours, truth, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_compile_fullgraph(impl):
    torch._dynamo.reset()
    arguments = packed([5, 2, 3], [4, 2, 6], requires_grad=True)
    compiled = torch.compile(gpt4fast.attention_varlen, fullgraph=True, backend="aot_eager")
    results = []
    for function in (compiled, gpt4fast.attention_varlen):
        out = function(*arguments, is_causal=True, impl=impl)
        results.append([out, *torch.autograd.grad(out.square().sum(), arguments[:3])])
    for got, expected in zip(*results, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_nothing_at_all(impl):
    arguments = packed([0, 0], [0, 0])
    assert gpt4fast.attention_varlen(*arguments, impl=impl).shape == (0, 4, 6)
