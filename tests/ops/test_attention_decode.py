"""``attention_decode``: a step over a cache equals attention over the whole sequence."""

from __future__ import annotations

import pytest
import torch
from oracles import CPU_IMPLEMENTATIONS, available, naive_attention

import gpt4fast
from gpt4fast.backends import dispatch

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


def step(dtype=torch.float32, batch=3, heads=4, kv_heads=2, new=1, head_dim=8, value_dim=8, capacity=CAPACITY):
    """Tensors of one call: query, caches, lengths, and the new key and value."""
    query = torch.randn(batch, heads, new, head_dim).to(dtype)
    caches = [torch.randn(batch, kv_heads, capacity, d).to(dtype) for d in (head_dim, value_dim)]
    lengths = torch.randint(0, capacity - new + 1, (batch,))
    fresh = [torch.randn(batch, kv_heads, new, d).to(dtype) for d in (head_dim, value_dim)]
    return query, *caches, lengths, *fresh


def exact_decode(query, key_cache, value_cache, lengths, key, value, **kwargs):
    """In float64 on the reference, on copies: output and log-sum-exp."""
    doubles = [t.double() for t in (query, key_cache, value_cache, key, value)]
    return gpt4fast.attention_decode(
        *doubles[:3], lengths, key=doubles[3], value=doubles[4], **kwargs, return_lse=True, impl="reference"
    )


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(
    "sizes",
    [
        {"batch": 1, "heads": 12, "kv_heads": 12, "head_dim": 64, "value_dim": 64, "capacity": 300},
        {"batch": 2, "heads": 14, "kv_heads": 2, "head_dim": 64, "value_dim": 64, "capacity": 1100},
        {"batch": 1, "heads": 8, "kv_heads": 1, "head_dim": 128, "value_dim": 96, "capacity": 700, "new": 4},
        {"batch": 3, "heads": 3, "kv_heads": 3, "head_dim": 17, "value_dim": 5, "capacity": 65, "new": 2},
        {"batch": 1, "heads": 4, "kv_heads": 2, "head_dim": 40, "value_dim": 40, "capacity": 200, "new": 130},
    ],
    ids=str,
)
def test_sizes_and_dtypes(impl, dtype, sizes):
    """Long caches (which a kernel may split), grouped heads, odd head sizes, several queries, a whole prompt."""
    query, key_cache, value_cache, lengths, key, value = step(dtype, **sizes)
    tables = rotation(sizes["capacity"], sizes["head_dim"] // 2 * 2)
    expected, _ = exact_decode(query, key_cache, value_cache, lengths, key, value, rotary=tables)
    got = gpt4fast.attention_decode(
        query, key_cache, value_cache, lengths, key=key, value=value, rotary=tables, impl=impl
    )
    assert got.dtype == dtype and got.shape == expected.shape
    close = {torch.float32: 1e-5, torch.bfloat16: 0.03, torch.float16: 4e-3}[dtype]
    torch.testing.assert_close(got.double(), expected, rtol=close, atol=close)


@pytest.mark.parametrize("impl", ["reference", "native"])
@pytest.mark.parametrize(
    "kwargs",
    [
        {"softcap": 2.0},
        {"alibi_slopes": torch.tensor([0.1, 0.2, 0.3, 0.4])},
        {"alibi_slopes": torch.rand(3, 4), "window": (7, 0), "scale": 0.3, "kv_starts": torch.tensor([1, 0, 5])},
    ],
    ids=["softcap", "alibi", "all"],
)
@pytest.mark.parametrize("new", [1, 3])
def test_options_and_lse(impl, kwargs, new):
    if not available(impl):
        pytest.skip("not built")
    query, key_cache, value_cache, lengths, key, value = step(new=new)
    expected = exact_decode(query, key_cache, value_cache, lengths, key, value, **kwargs)
    got = gpt4fast.attention_decode(
        query, key_cache, value_cache, lengths.int(), key=key, value=value, **kwargs, return_lse=True, impl=impl
    )
    for ours, truth in zip(got, expected, strict=True):
        torch.testing.assert_close(ours.double(), truth, rtol=1e-5, atol=1e-5)


def rounded(x):
    """(..., D) as an int8 cache holds it: the definition."""
    scales = x.float().abs().amax(-1) / 127
    scales[scales == 0] = 1
    return (x.float() / scales[..., None]).round().to(torch.int8), scales


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("new", [1, 3])
@pytest.mark.parametrize("layout", ["contiguous", "paged"])
@pytest.mark.parametrize("rotary", [None, "halves", "interleaved"])
def test_int8_cache(impl, dtype, new, layout, rotary):
    query, key_cache, value_cache, lengths, key, value = step(dtype, new=new)
    key[0, 0] = 0  # a scale of 1, not of 0
    tables = None if rotary is None else rotation(CAPACITY, HEAD_DIM)
    (keys, key_scales), (values, value_scales) = rounded(key_cache), rounded(value_cache)
    for b, length in enumerate(lengths):  # what lies past the end is garbage
        key_scales[b, :, length:] = value_scales[b, :, length:] = float("nan")
    turned = key.double()
    if tables is not None:
        turned = torch.stack(
            [rotated(k, int(n), tables, rotary == "interleaved") for k, n in zip(key, lengths, strict=True)]
        )
    exact = []
    for cache, scales, fresh in ((keys, key_scales, turned), (values, value_scales, value.double())):
        dense = cache.double() * scales.double()[..., None]
        for b, length in enumerate(lengths.tolist()):
            entry, scale = rounded(fresh[b])
            dense[b, :, length : length + new] = entry.double() * scale.double()[..., None]
        exact.append(dense)
    expected = gpt4fast.attention_decode(
        query.double(), *exact, lengths + new, rotary=tables, rotary_interleaved=rotary == "interleaved",
        impl="reference",
    )  # fmt: skip

    table = None
    stored = [keys, values, key_scales[..., None], value_scales[..., None]]
    if layout == "paged":
        blocks = CAPACITY // BLOCK
        order = torch.randperm(3 * blocks + 1)[:-1]
        table = order.view(3, blocks)
        for n, cache in enumerate(stored):
            pool = torch.full((3 * blocks + 1, 2, BLOCK, cache.shape[3]), 99, dtype=cache.dtype)
            pool[order] = cache.unflatten(2, (blocks, BLOCK)).transpose(1, 2).flatten(0, 1)
            stored[n] = pool
    keys, values, key_scales, value_scales = stored[0], stored[1], stored[2].squeeze(3), stored[3].squeeze(3)
    got = gpt4fast.attention_decode(
        query, keys, values, lengths, key=key, value=value, block_table=table, rotary=tables,
        rotary_interleaved=rotary == "interleaved", key_scales=key_scales, value_scales=value_scales, impl=impl,
    )  # fmt: skip
    assert got.dtype == dtype
    # A new entry that lies between two integers may round either way: half a step of 1 / 127.
    close = 0.02 if dtype == torch.float32 else 0.04
    torch.testing.assert_close(got.double(), expected, rtol=close, atol=close)
    for cache, scales, dense in ((keys, key_scales, exact[0]), (values, value_scales, exact[1])):
        if table is not None:
            cache, scales = (t[table].transpose(1, 2).flatten(2, 3) for t in (cache, scales))
        for b, length in enumerate(lengths.tolist()):
            seen = slice(0, length + new)
            step_size = scales[b, :, seen, None].double()
            assert ((cache[b, :, seen].double() * step_size - dense[b, :, seen]).abs() <= 1.01 * step_size).all()
            appended = cache[b, :, length : length + new]
            assert ((appended.abs().amax(-1) == 127) | (appended == 0).all(-1)).all()
    at = 0, 0, int(lengths[0])
    assert (key_scales if table is None else key_scales[table].transpose(1, 2).flatten(2, 3))[at] == 1


@pytest.mark.parametrize("impl", ["auto", "reference", "torch"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_float8_cache(impl, dtype):
    """What is attended to is what the cache stands for: entries times scales, the new ones rounded by torch's cast."""
    query, key_cache, value_cache, lengths, key, value = step(dtype, new=3)
    key[0, 0] = 0  # a scale of 1, not of 0
    stored, exact = [], []
    for dense, fresh in ((key_cache, key), (value_cache, value)):
        dense = dense.float()
        for b, length in enumerate(lengths.tolist()):
            dense[b, :, length : length + 3], dense[b, :, length + 3 :] = fresh[b].float(), 0
        scale = (dense.abs().amax(-1) / 448).masked_fill((dense == 0).all(-1), 1)
        rounded = (dense / scale[..., None]).to(torch.float8_e4m3fn)
        stored.append((rounded, scale))
        exact.append(rounded.double() * scale.double()[..., None])
    expected = gpt4fast.attention_decode(query.double(), *exact, lengths + 3, impl="reference")
    caches, scales = ([pair[i].clone() for pair in stored] for i in range(2))
    for into in (*caches, *scales):
        for b, length in enumerate(lengths.tolist()):
            into[b, :, length:] = 99
    got = gpt4fast.attention_decode(
        query, *caches, lengths, key=key, value=value, key_scales=scales[0], value_scales=scales[1], impl=impl
    )
    close = 1e-4 if dtype == torch.float32 else 0.02
    assert got.dtype == dtype
    torch.testing.assert_close(got.double(), expected, rtol=close, atol=close)
    for into, scale, (source, source_scale) in zip(caches, scales, stored, strict=True):
        for b, length in enumerate(lengths.tolist()):
            assert torch.equal(into[b, :, : length + 3].float(), source[b, :, : length + 3].float())
            assert torch.equal(scale[b, :, : length + 3], source_scale[b, :, : length + 3])


@pytest.mark.parametrize("impl", ["reference", "native"])
def test_int8_rounding_is_to_nearest_even(impl):
    if not available(impl):
        pytest.skip("not built")
    key = torch.tensor([127, 0.5, 1.5, -2.5, 3.49, -126.51, 0, 64]).view(1, 1, 1, 8)
    caches, scales = torch.zeros(2, 1, 1, 4, 8, dtype=torch.int8), torch.zeros(2, 1, 1, 4)
    gpt4fast.attention_decode(
        torch.zeros(1, 1, 1, 8), *caches, torch.tensor([2]), key=key, value=-key, key_scales=scales[0],
        value_scales=scales[1], impl=impl,
    )  # fmt: skip
    assert caches[0, 0, 0, 2].tolist() == [127, 0, 2, -2, 3, -127, 0, 64]
    assert caches[1, 0, 0, 2].tolist() == [-127, 0, -2, 2, -3, 127, 0, -64]
    assert (scales[:, 0, 0] == torch.tensor([0.0, 0, 1, 0])).all()


def test_gradients_are_the_reference_s():
    """Where a gradient is asked for, the native kernel is not taken, and says why."""
    query, key_cache, value_cache, lengths, key, value = step()
    query, value = query.requires_grad_(), value.requires_grad_()
    arguments = {"key": key, "value": value}

    def gradients(impl):
        out = gpt4fast.attention_decode(query, key_cache.clone(), value_cache.clone(), lengths, **arguments, impl=impl)
        return torch.autograd.grad(out.square().sum(), (query, value))

    for ours, truth in zip(gradients(None), gradients("reference"), strict=True):
        torch.testing.assert_close(ours, truth)
    explanation = gpt4fast.explain("attention_decode", query, key_cache, value_cache, lengths, **arguments)
    if available("native"):
        assert "gradient" in explanation.reasons["native"]
        with torch.no_grad():
            explanation = gpt4fast.explain("attention_decode", query, key_cache, value_cache, lengths, **arguments)
            assert explanation.implementation == "native"


def test_autocast():
    """The cache's dtype is computed in, whatever a linear layer before it made; the result has autocast's."""
    query, key_cache, value_cache, lengths, key, value = step()
    expected, _ = exact_decode(query, key_cache, value_cache, lengths, key, value)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = gpt4fast.attention_decode(
            query.bfloat16(), key_cache, value_cache, lengths, key=key.bfloat16(), value=value.bfloat16()
        )
    assert got.dtype == torch.bfloat16
    torch.testing.assert_close(got.double(), expected, rtol=0.03, atol=0.03)


def test_opcheck(needs_native):
    query, key_cache, value_cache, lengths, key, value = step()
    cos, sin = rotation(CAPACITY, HEAD_DIM)
    decode = torch.ops.gpt4fast.attention_decode.default
    rest = (0.3, None, -1, -1, 0.0, None)
    torch.library.opcheck(
        decode, (query, key_cache, value_cache, lengths, key, value, None, cos, sin, False, None, None, *rest)
    )
    (keys, key_scales), (values, value_scales) = rounded(key_cache), rounded(value_cache)
    torch.library.opcheck(
        decode, (query, keys, values, lengths, key, value, None, None, None, False, key_scales, value_scales, *rest)
    )
    torch.library.opcheck(decode, (query, key_cache, value_cache, lengths + 1, *(None,) * 5, False, None, None, *rest))


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


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_compile_fullgraph_int8(impl):
    torch._dynamo.reset()
    query, key_cache, value_cache, lengths, key, value = step()
    (keys, key_scales), (values, value_scales) = rounded(key_cache), rounded(value_cache)
    stored = (keys, values, key_scales, value_scales)

    def run(query, lengths, key, value, keys, values, key_scales, value_scales):
        scales = {"key_scales": key_scales, "value_scales": value_scales}
        return gpt4fast.attention_decode(query, keys, values, lengths, key=key, value=value, **scales, impl=impl)

    ours, theirs = ([t.clone() for t in stored] for _ in range(2))
    expected = run(query, lengths, key, value, *theirs)
    got = torch.compile(run, fullgraph=True, backend="aot_eager")(query, lengths, key, value, *ours)
    torch.testing.assert_close(got, expected)
    torch.testing.assert_close(ours, theirs)


def test_an_error_leaves_the_cache_as_it_was():
    caches = torch.randn(2, 2, 2, 10, 8)
    before = caches.clone()
    new = torch.randn(2, 2, 3, 8)
    with pytest.raises(ValueError, match="kv_lengths"):
        gpt4fast.attention_decode(torch.randn(2, 4, 3, 8), *caches, torch.tensor([3, 8]), key=new, value=new)
    assert torch.equal(caches, before)


@pytest.mark.parametrize("impl", [None, *IMPLEMENTATIONS])
def test_repeated_calls_are_looked_at_again_where_anything_differs(impl):
    """What is kept of a call serves those that differ in numbers alone, and lengths and block tables are numbers."""
    caches = torch.randn(2, BATCH, KV_HEADS, CAPACITY, HEAD_DIM)
    pool, table = paged(caches[0])
    query, slopes = torch.randn(BATCH, HEADS, 1, HEAD_DIM), torch.rand(HEADS)
    new = torch.randn(2, BATCH, KV_HEADS, 1, HEAD_DIM)

    def check(query, key_cache, value_cache, lengths, **options):
        stored = key_cache.clone(), value_cache.clone()
        ours = gpt4fast.attention_decode(query, *stored, lengths, **options, impl=impl)
        options = {name: t.double() if name in ("key", "value") else t for name, t in options.items()}
        wide = [t.double() for t in (query, key_cache, value_cache)]
        with dispatch.listening(lambda op, name: None):  # then nothing is kept
            expected = gpt4fast.attention_decode(*wide, lengths, **options, impl="reference")
        torch.testing.assert_close(ours.double(), expected, rtol=1e-4, atol=1e-5)

    for _ in range(2):
        for lengths in (torch.tensor([3, 9, 20]), torch.tensor([24, 1, 2]), torch.tensor([4, 4, 4], dtype=torch.int32)):
            check(query, *caches, lengths)
            for number in (3, 5):
                check(query, *caches, lengths, window=(number, 0))
                check(query, *caches, lengths, scale=0.1 * number)
            check(query, *caches, lengths, alibi_slopes=slopes)
            check(query, *caches, lengths, kv_starts=torch.tensor([0, 0, 1]))
            check(query, *caches, lengths.clamp(max=20), key=new[0], value=new[1])
            check(query, *caches, lengths.clamp(max=20), key=new[0], value=new[1], rotary=rotation(CAPACITY, 4))
            check(query, pool, pool, lengths, block_table=table)
        with pytest.raises(ValueError, match="kv_lengths"):
            check(query, *caches, torch.tensor([3, 9, CAPACITY + 1]))
        with pytest.raises(ValueError, match="block_table"):
            check(query, pool, pool, lengths, block_table=table + 1000)
        with pytest.raises(ValueError, match="rotary"):
            check(query, *caches, torch.tensor([3, 9, 20]), key=new[0], value=new[1], rotary=rotation(20, 4))
        with pytest.raises(TypeError, match="return_lse"):
            gpt4fast.attention_decode(query, *caches, lengths, return_lse=0, impl=impl)
