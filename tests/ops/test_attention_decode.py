"""``attention_decode``: a step over a cache equals attention over the whole sequence."""

from __future__ import annotations

import pytest
import torch
from oracles import CPU_IMPLEMENTATIONS, available, naive_attention

import gpt4fast

IMPLEMENTATIONS = [
    pytest.param(name, marks=pytest.mark.skipif(not available(name), reason="not built"))
    for name in CPU_IMPLEMENTATIONS
]
BATCH, HEADS, KV_HEADS, HEAD_DIM, CAPACITY, BLOCK = 3, 4, 2, 8, 24, 4


def rotation(positions, dim):
    angles = torch.arange(positions)[:, None] * 10000.0 ** (-torch.arange(0, dim, 2) / dim)
    return angles.cos(), angles.sin()


def rotated(x, first, tables, interleaved):
    """Each token of (H, L, D) turned by itself as complex numbers."""
    cos, sin = tables
    half = cos.shape[1]
    out = x.clone().double()
    for t in range(x.shape[1]):
        for c in range(half):
            a, b = (2 * c, 2 * c + 1) if interleaved else (c, c + half)
            turned = torch.complex(x[:, t, a].double(), x[:, t, b].double()) * torch.complex(
                cos[first + t, c].double(), sin[first + t, c].double()
            )
            out[:, t, a], out[:, t, b] = turned.real, turned.imag
    return out


def paged(cache):
    """A contiguous cache cut into shuffled blocks, with one spare block."""
    blocks = cache.shape[2] // BLOCK
    order = torch.randperm(BATCH * blocks + 1)[:-1]
    pool = torch.full((BATCH * blocks + 1, KV_HEADS, BLOCK, cache.shape[3]), float("nan"))
    pool[order] = cache.unflatten(2, (blocks, BLOCK)).transpose(1, 2).flatten(0, 1)
    return pool, order.view(BATCH, blocks)


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@pytest.mark.parametrize("new", [1, 3])
@pytest.mark.parametrize("layout", ["contiguous", "paged"])
@pytest.mark.parametrize("rotary", [None, "halves", "interleaved", "partial"])
@pytest.mark.parametrize(
    "kwargs", [{}, {"window": (5, -1), "scale": 0.5}, {"kv_starts": torch.tensor([0, 2, 4])}], ids=str
)
def test_append_and_attend(impl, new, layout, rotary, kwargs):
    lengths = torch.tensor([4, 9, CAPACITY - new])
    key_cache, value_cache = (
        torch.randn(BATCH, KV_HEADS, CAPACITY, HEAD_DIM),
        torch.randn(BATCH, KV_HEADS, CAPACITY, HEAD_DIM),
    )
    for b, length in enumerate(lengths):  # what lies past the end is garbage
        key_cache[b, :, length:] = value_cache[b, :, length:] = float("nan")
    query = torch.randn(BATCH, HEADS, new, HEAD_DIM)
    key, value = torch.randn(BATCH, KV_HEADS, new, HEAD_DIM), torch.randn(BATCH, KV_HEADS, new, HEAD_DIM)
    tables = None if rotary is None else rotation(CAPACITY, HEAD_DIM // 2 if rotary == "partial" else HEAD_DIM)
    interleaved = rotary == "interleaved"

    expected, full_keys = [], []
    for b, length in enumerate(lengths.tolist()):
        q, k = query[b], key[b]
        if tables is not None:
            q, k = rotated(q, length, tables, interleaved), rotated(k, length, tables, interleaved)
        keys = torch.cat((key_cache[b, :, :length].double(), k.double()), 1)
        values = torch.cat((value_cache[b, :, :length], value[b]), 1)
        starts = kwargs["kv_starts"][b : b + 1] if "kv_starts" in kwargs else None
        rest = {name: v for name, v in kwargs.items() if name != "kv_starts"}
        expected.append(
            naive_attention(
                q[None], keys[None], values[None], is_causal=True, query_offset=length, kv_starts=starts, **rest
            )[0]
        )
        full_keys.append(keys)

    table = None
    if layout == "paged":
        (key_cache, table), value_pool = paged(key_cache), None
        blocks = table.shape[1]
        value_pool = torch.full_like(key_cache, float("nan"))
        value_pool[table.flatten()] = value_cache.unflatten(2, (blocks, BLOCK)).transpose(1, 2).flatten(0, 1)
        value_cache = value_pool
    got = gpt4fast.attention_decode(
        query, key_cache, value_cache, lengths, key=key, value=value, block_table=table, rotary=tables,
        rotary_interleaved=interleaved, **kwargs, impl=impl,
    )  # fmt: skip
    torch.testing.assert_close(got.double(), torch.cat(expected), rtol=1e-5, atol=1e-5)
    for b, length in enumerate(lengths.tolist()):  # the cache now holds the new entries, rotated
        stored = key_cache[b] if table is None else key_cache[table[b]].transpose(0, 1).flatten(1, 2)
        torch.testing.assert_close(stored[:, : length + new].double(), full_keys[b], rtol=1e-5, atol=1e-5)

    # Without key and value the lengths count everything, and nothing is written.
    before = key_cache.clone()
    again = gpt4fast.attention_decode(
        query,
        key_cache,
        value_cache,
        lengths + new,
        block_table=table,
        rotary=tables,
        rotary_interleaved=interleaved,
        **kwargs,
        impl=impl,
    )
    assert torch.equal(again, got) and torch.equal(before.nan_to_num(7.0), key_cache.nan_to_num(7.0))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_types(dtype):
    query, key, value = torch.randn(2, 4, 1, 8), torch.randn(2, 2, 1, 8), torch.randn(2, 2, 1, 8)
    caches = torch.randn(2, 2, 2, 10, 8)
    lengths = torch.tensor([3, 9])
    tables = rotation(10, 8)
    exact = gpt4fast.attention_decode(query, *caches.clone(), lengths, key=key, value=value, rotary=tables)
    half = [t.to(dtype) for t in (query, *caches)]
    got = gpt4fast.attention_decode(*half, lengths, key=key.to(dtype), value=value.to(dtype), rotary=tables)
    assert got.dtype == dtype
    torch.testing.assert_close(got.float(), exact, rtol=0.03, atol=0.03)


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_compile_fullgraph_appends_in_place(impl):
    torch._dynamo.reset()
    query, key, value = torch.randn(2, 4, 1, 8), torch.randn(2, 2, 1, 8), torch.randn(2, 2, 1, 8)
    caches, lengths = torch.randn(2, 2, 2, 10, 8), torch.tensor([3, 9])

    def step(query, key_cache, value_cache, lengths, key, value):
        return gpt4fast.attention_decode(query, key_cache, value_cache, lengths, key=key, value=value, impl=impl)

    ours, theirs = caches.clone(), caches.clone()
    expected = step(query, *theirs, lengths, key, value)
    got = torch.compile(step, fullgraph=True, backend="aot_eager")(query, ours[0], ours[1], lengths, key, value)
    torch.testing.assert_close(got, expected)
    torch.testing.assert_close(ours, theirs)


def test_an_error_leaves_the_cache_as_it_was():
    caches = torch.randn(2, 2, 2, 10, 8)
    before = caches.clone()
    new = torch.randn(2, 2, 3, 8)
    with pytest.raises(ValueError, match="kv_lengths"):
        gpt4fast.attention_decode(torch.randn(2, 4, 3, 8), *caches, torch.tensor([3, 8]), key=new, value=new)
    assert torch.equal(caches, before)
