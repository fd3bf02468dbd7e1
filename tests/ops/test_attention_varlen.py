"""``attention_varlen``: each packed sequence gives what it gives alone."""

from __future__ import annotations

import pytest
import torch
from oracles import CPU_IMPLEMENTATIONS, available, naive_attention

import gpt4fast

IMPLEMENTATIONS = [
    pytest.param(name, marks=pytest.mark.skipif(not available(name), reason="not built"))
    for name in CPU_IMPLEMENTATIONS
]
LENGTHS = [([5, 0, 3, 9], [4, 2, 0, 11]), ([1], [1]), ([7, 7], [7, 7])]


def packed(lengths_q, lengths_k, requires_grad=False):
    query = torch.randn(sum(lengths_q), 4, 8, requires_grad=requires_grad)
    key = torch.randn(sum(lengths_k), 2, 8, requires_grad=requires_grad)
    value = torch.randn(sum(lengths_k), 2, 6, requires_grad=requires_grad)
    starts = [torch.tensor([0, *lengths]).cumsum(0).int() for lengths in (lengths_q, lengths_k)]
    return query, key, value, *starts, max(lengths_q), max(lengths_k)


def one_by_one(query, key, value, starts_q, starts_k, **kwargs):
    outputs, lses = [], []
    offsets = kwargs.pop("query_offset", 0)
    for b in range(len(starts_q) - 1):
        q, k, v = (
            query[starts_q[b] : starts_q[b + 1]],
            key[starts_k[b] : starts_k[b + 1]],
            value[starts_k[b] : starts_k[b + 1]],
        )
        offset = int(offsets[b]) if isinstance(offsets, torch.Tensor) else offsets
        out, lse = naive_attention(*(t.transpose(0, 1)[None] for t in (q, k, v)), query_offset=offset, **kwargs)
        outputs.append(out[0].transpose(0, 1))
        lses.append(lse[0].transpose(0, 1))
    return torch.cat(outputs), torch.cat(lses)


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@pytest.mark.parametrize("lengths", LENGTHS, ids=str)
@pytest.mark.parametrize(
    "kwargs",
    [{}, {"is_causal": True}, {"window": (2, 1), "scale": 0.4}, {"alibi_slopes": torch.tensor([0.1, 0.2, 0.3, 0.4])}],
    ids=str,
)
def test_values(impl, lengths, kwargs):
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
def test_gradients(impl):
    arguments = packed([5, 0, 3], [4, 2, 6], requires_grad=True)
    expected, _ = one_by_one(*arguments[:5], is_causal=True)
    got = gpt4fast.attention_varlen(*arguments, is_causal=True, impl=impl)
    for ours, truth in zip(
        *(torch.autograd.grad(t.square().sum(), arguments[:3]) for t in (got, expected)), strict=True
    ):
        torch.testing.assert_close(ours, truth, rtol=1e-4, atol=1e-5)


def test_second_gradients():
    query, key, value, *rest = packed([3, 2], [2, 3])
    inputs = [t.detach().double().requires_grad_() for t in (query, key, value)]
    assert torch.autograd.gradgradcheck(lambda *qkv: gpt4fast.attention_varlen(*qkv, *rest, is_causal=True), inputs)


def test_compile_fullgraph():
    torch._dynamo.reset()
    arguments = packed([5, 2, 3], [4, 2, 6])
    compiled = torch.compile(gpt4fast.attention_varlen, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(
        compiled(*arguments, is_causal=True), gpt4fast.attention_varlen(*arguments, is_causal=True)
    )


def test_nothing_at_all():
    arguments = packed([0, 0], [0, 0])
    assert gpt4fast.attention_varlen(*arguments).shape == (0, 4, 6)
