"""The native attention kernel, called directly, against the definition in float64."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

pytestmark = pytest.mark.usefixtures("needs_native")

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def attend(query, key, value, mask=None, **options):
    """The op with defaults for what a test does not care about."""
    settings = {
        "dropout_p": 0.0,
        "dropout_seed": None,
        "is_causal": False,
        "scale": 1 / math.sqrt(max(query.shape[-1], 1)),
        "query_offset": 0,
        "query_offsets": None,
        "kv_lengths": None,
        "kv_starts": None,
        "window_left": -1,
        "window_right": -1,
        "softcap": 0.0,
        "alibi_slopes": None,
        "cu_seqlens_q": None,
        "cu_seqlens_k": None,
        "heads_first": False,
    }
    assert options.keys() <= settings.keys()
    return torch.ops.gpt4fast.attention_forward(query, key, value, mask, *(settings | options).values())


def visible_keys(query, key, mask=None, **options) -> Tensor:
    """(B, Hq, Lq, Lk), one comparison for each rule of the design."""
    batch, heads, queries, _ = query.shape
    keys = key.shape[2]
    offset = options.get("query_offsets")
    offset = options.get("query_offset", 0) if offset is None else offset.view(-1, 1, 1, 1)
    i = torch.arange(queries).view(1, 1, -1, 1) + offset
    j = torch.arange(keys).view(1, 1, 1, -1)
    visible = torch.ones(batch, heads, queries, keys, dtype=torch.bool)
    if options.get("is_causal"):
        visible &= j <= i
    if options.get("window_left", -1) >= 0:
        visible &= j >= i - options["window_left"]
    if options.get("window_right", -1) >= 0:
        visible &= j <= i + options["window_right"]
    if options.get("kv_lengths") is not None:
        visible &= j < options["kv_lengths"].view(-1, 1, 1, 1)
    if options.get("kv_starts") is not None:
        visible &= j >= options["kv_starts"].view(-1, 1, 1, 1)
    if mask is not None:
        visible &= mask if mask.dtype == torch.bool else mask != -math.inf
    return visible


def definition(query, key, value, mask=None, dtype=torch.float64, **options) -> tuple[Tensor, Tensor]:
    """Attention in plain torch, computed in dtype. Returns out and the logarithm of the sum of exponentials."""
    visible = visible_keys(query, key, mask, **options)
    group = query.shape[1] // max(key.shape[1], 1)
    query, key, value = (x.to(dtype) for x in (query, key, value))
    key, value = (x.repeat_interleave(group, 1) for x in (key, value))
    scores = query @ key.mT * options.get("scale", 1 / math.sqrt(max(query.shape[-1], 1)))
    if options.get("softcap"):
        scores = options["softcap"] * torch.tanh(scores / options["softcap"])
    if mask is not None and mask.dtype != torch.bool:
        scores = scores + mask.to(dtype)
    if options.get("alibi_slopes") is not None:
        offset = options.get("query_offsets")
        offset = options.get("query_offset", 0) if offset is None else offset.view(-1, 1, 1, 1)
        i = torch.arange(query.shape[2]).view(1, 1, -1, 1) + offset
        distance = (i - torch.arange(key.shape[2])).abs()
        scores = scores - options["alibi_slopes"].to(dtype)[:, :, None, None] * distance.to(dtype)
    scores = scores.masked_fill(~visible, -math.inf)
    lse = scores.logsumexp(-1)
    weights = torch.where(visible.any(-1, keepdim=True), scores.softmax(-1), 0)
    return weights @ value, lse


def make_inputs(batch, heads, kv_heads, queries, keys, dim, value_dim, dtype=torch.float32):
    return (
        torch.randn(batch, heads, queries, dim).to(dtype),
        torch.randn(batch, kv_heads, keys, dim).to(dtype),
        torch.randn(batch, kv_heads, keys, value_dim).to(dtype),
    )


def assert_close(query, key, value, mask=None, **options):
    """Out at most twice as far from float64 as plain torch in the same dtype, lse in float32's rounding."""
    out, lse = attend(query, key, value, mask, **options)
    expected, expected_lse = definition(query, key, value, mask, **options)
    plain, _ = definition(query, key, value, mask, dtype=query.dtype, **options)
    assert out.dtype == query.dtype and out.shape == expected.shape
    assert lse.dtype == torch.float32 and lse.shape == expected_lse.shape
    error = (out.double() - expected).norm().item()
    # On top, for results so few that torch happens to be exact: one rounding of what is added up, and one of the
    # exponents in the weights, which is as large as they are and averages out over many rows.
    magnitude, _ = definition(query, key, value.abs(), mask, **options)
    exponents = expected_lse.nan_to_num(neginf=0.0).abs().unsqueeze(-1)
    roundings = magnitude * (1 + (1 + exponents) / math.sqrt(max(exponents.numel(), 1)))
    allowed = 2 * (plain.double() - expected).norm().item() + torch.finfo(query.dtype).eps * roundings.norm().item()
    assert error <= allowed, f"{error} from float64, allowed {allowed}"
    torch.testing.assert_close(lse.double(), expected_lse, rtol=1e-5, atol=2e-5)


def options_named(name: str, batch: int, heads: int, queries: int, keys: int) -> dict:
    """One combination of arguments for the given sizes."""
    full = (batch, heads, queries, keys)

    def sparse_mask(dtype, *shape):
        mask = torch.randn(shape)
        return mask.masked_fill(mask > 0.8, -math.inf).to(dtype).expand(full)

    lengths = torch.randint(0, keys + 1, (batch,))
    slopes = torch.rand(batch, heads)
    return {
        "plain": {},
        "scale": {"scale": 0.37},
        "causal": {"is_causal": True},
        "causal, bottom right": {"is_causal": True, "query_offset": keys - queries},
        "causal, before all keys": {"is_causal": True, "query_offset": -queries // 2 - 1},
        "offset of each row": {"is_causal": True, "query_offsets": torch.randint(-3, keys + 1, (batch,))},
        "lengths": {"kv_lengths": lengths},
        "starts": {"kv_starts": lengths},
        "starts and lengths": {"kv_starts": lengths - 5, "kv_lengths": lengths + 2},
        "lengths out of range": {"kv_starts": torch.full((batch,), -9), "kv_lengths": torch.full((batch,), keys + 9)},
        "window": {"window_left": 7, "window_right": 3, "query_offset": 2},
        "left window, causal": {"window_left": 5, "is_causal": True, "query_offset": keys - queries},
        "right window": {"window_right": 0, "query_offset": 1},
        "softcap": {"softcap": 1.5},
        "softcap of large scores": {"softcap": 30.0, "scale": 4.0},
        "alibi": {"alibi_slopes": slopes, "query_offset": 3},
        "alibi, causal, one slope for all": {"alibi_slopes": slopes[:1, :1].expand(batch, heads), "is_causal": True},
        "bool mask": {"mask": torch.rand(full) > 0.4},
        "bool mask of keys": {"mask": (torch.rand(batch, 1, 1, keys) > 0.4).expand(full)},
        "bool mask of queries": {"mask": (torch.rand(queries, 1) > 0.4).expand(full)},
        "bool mask, transposed": {"mask": (torch.rand(batch, heads, keys, queries) > 0.4).mT},
        "bool mask of whole blocks": {"mask": (torch.arange(keys) // 64 % 2 == 1).expand(full)},
        "float32 mask": {"mask": sparse_mask(torch.float32, *full)},
        "bfloat16 mask of heads": {"mask": sparse_mask(torch.bfloat16, heads, 1, keys)},
        "float16 mask of one row": {"mask": sparse_mask(torch.float16, 1, keys)},
        "all": {
            "mask": sparse_mask(torch.float32, batch, 1, queries, keys),
            "is_causal": True,
            "query_offsets": torch.randint(0, keys + 1, (batch,)),
            "kv_lengths": lengths,
            "kv_starts": lengths // 3,
            "window_left": 40,
            "window_right": 2,
            "softcap": 3.0,
            "alibi_slopes": slopes,
            "scale": 0.2,
        },
    }[name]


OPTION_NAMES = [
    "plain", "scale", "causal", "causal, bottom right", "causal, before all keys", "offset of each row", "lengths",
    "starts", "starts and lengths", "lengths out of range", "window", "left window, causal", "right window",
    "softcap", "softcap of large scores", "alibi", "alibi, causal, one slope for all", "bool mask",
    "bool mask of keys", "bool mask of queries", "bool mask, transposed", "bool mask of whole blocks",
    "float32 mask", "bfloat16 mask of heads", "float16 mask of one row", "all",
]  # fmt: skip

# (B, Hq, Hk, Lq, Lk, D, Dv): decoding, tails of every block size, grouped heads, one key/value head, Dv != D.
SHAPES = [
    (2, 3, 3, 1, 130, 16, 16),
    (2, 4, 2, 1, 200, 64, 64),
    (1, 2, 2, 2, 5, 7, 3),
    (2, 2, 1, 33, 65, 40, 24),
    (1, 6, 2, 37, 191, 12, 33),
    (1, 1, 1, 100, 100, 32, 1),
]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", OPTION_NAMES)
def test_matches_float64(name, dtype):
    for shape in SHAPES:
        batch, heads, _, queries, keys, _, _ = shape
        assert_close(*make_inputs(*shape, dtype), **options_named(name, batch, heads, queries, keys))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("shape", [(2, 3, 3, 130, 130, 64, 64), (1, 2, 2, 300, 300, 128, 128)])
def test_at_most_twice_the_error_of_torchs_kernel(shape, is_causal, dtype):
    query, key, value = make_inputs(*shape, dtype)
    expected, _ = definition(query, key, value, is_causal=is_causal)
    ours, _ = attend(query, key, value, is_causal=is_causal)
    torchs = F.scaled_dot_product_attention(query, key, value, is_causal=is_causal)
    assert (ours - expected).norm() <= 2 * (torchs - expected).norm()
    assert (ours - expected).norm() <= 2 * (torchs - expected).norm()


@pytest.mark.parametrize("dtype", DTYPES)
def test_any_strides(dtype):
    """Expanded heads, (B, L, H, D) storage, misaligned starts, steps in every dimension: the bits of contiguous."""
    query, key, value = make_inputs(2, 4, 4, 35, 70, 16, 16, dtype)

    def transposed(x):
        return x.transpose(1, 2).contiguous().transpose(1, 2)

    def misaligned(x):
        storage = torch.empty(x.numel() + 1, dtype=dtype)
        return storage[1:].view(x.shape).copy_(x)

    def stepped(x):
        storage = torch.empty(*(2 * size for size in x.shape), dtype=dtype)
        return storage[1::2, ::2, 1::2, ::2].copy_(x)

    def columns_first(x):
        return x.mT.contiguous().mT

    for queries in (1, 35):  # the way for few rows and the way for many
        expected = attend(query[:, :, :queries], key, value)
        for layout in (transposed, misaligned, stepped, columns_first):
            out = attend(layout(query)[:, :, :queries], layout(key), layout(value))
            torch.testing.assert_close(out, expected, rtol=0, atol=0, msg=layout.__name__)
        one = [x[:1, :1] for x in (query, key, value)]
        out = attend(*(x.expand(2, 4, -1, -1)[:, :, : queries if x is one[0] else None] for x in one))
        expected = attend(*(x.expand(2, 4, -1, -1).contiguous() for x in (one[0][:, :, :queries], *one[1:])))
        torch.testing.assert_close(out, expected, rtol=0, atol=0)


def test_layout_of_the_result():
    query, key, value = make_inputs(2, 4, 2, 5, 9, 16, 12, torch.float32)
    assert attend(query, key, value)[0].stride() == (5 * 4 * 12, 12, 4 * 12, 1)
    assert attend(query, key, value, heads_first=True)[0].is_contiguous()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("queries", [1, 2, 3, 6, 40])
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_invisible_keys_and_values_do_not_matter(queries, bad, dtype):
    """What a query may not see can be anything, also where another query of its block sees it."""
    keys = 90
    query, key, value = make_inputs(2, 2, 1, queries, keys, 16, 12, dtype)
    lengths = torch.tensor([50, 81])
    holes = torch.rand(keys) > 0.3
    cases = [
        {"kv_lengths": lengths},
        {"kv_starts": lengths},
        {"is_causal": True, "query_offset": keys - queries - 10},
        {"window_left": 9, "window_right": 1, "query_offset": 20},
        {"mask": holes.expand(2, 2, queries, keys)},
        {"mask": torch.where(holes, 0.5, -math.inf).expand(2, 2, queries, keys)},
    ]
    for options in cases:
        seen = visible_keys(query, key, **options).any(1).any(1)[:, None, :, None]
        clean = [torch.where(seen, x, 0) for x in (key, value)]
        dirty = [torch.where(seen, x, bad) for x in (key, value)]
        out, lse = attend(query, *dirty, **options)
        expected, expected_lse = attend(query, *clean, **options)
        eps = torch.finfo(dtype).eps  # the careful way may add in another order
        torch.testing.assert_close(out, expected, rtol=4 * eps, atol=4 * eps)
        torch.testing.assert_close(lse, expected_lse, rtol=0, atol=0)
    # The last key is seen by the last query alone: the others keep their values.
    key[:, :, -1] = value[:, :, -1] = bad
    out, _ = attend(query, key, value, is_causal=True, query_offset=keys - queries)
    assert out[:, :, :-1].isfinite().all() and not out[:, :, -1].isfinite().any()


def test_values_that_are_seen_reach_the_output():
    query, key, value = make_inputs(1, 1, 1, 5, 70, 8, 8)
    value[0, 0, 3, 2] = math.nan
    value[0, 0, 66, 5] = math.inf
    out, _ = attend(query, key, value, is_causal=True, query_offset=63)
    assert out[0, 0, :, 2].isnan().all()
    assert out[0, 0, :3, 5].isfinite().all() and out[0, 0, 3:, 5].eq(math.inf).all()
    assert out[0, 0][:, [0, 1, 3, 4, 6, 7]].isfinite().all()
    key[0, 0, 0, 0] = math.nan
    out, lse = attend(query, key, value)
    assert out.isnan().all() and lse.isnan().all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_rows_that_see_nothing_are_zero(dtype):
    query, key, value = make_inputs(2, 4, 2, 6, 70, 8, 5, dtype)
    value.fill_(math.nan)
    mask = torch.zeros(2, 4, 6, 70, dtype=torch.bool)
    for options in (
        {"mask": mask},
        {"mask": torch.zeros(mask.shape).masked_fill(~mask, -math.inf)},
        {"kv_lengths": torch.tensor([0, -4])},
        {"kv_starts": torch.tensor([70, 2**62])},
        {"is_causal": True, "query_offset": -6},
        {"window_left": 1, "window_right": 1, "query_offset": 2**60},
    ):
        out, lse = attend(query, key, value, **options)
        assert out.eq(0).all() and lse.eq(-math.inf).all()
    out, _ = attend(query, key, torch.ones_like(value), is_causal=True, query_offset=-2)
    torch.testing.assert_close(out[0, 0, :, 0].float(), torch.tensor([0.0, 0, 1, 1, 1, 1]))


def test_extreme_scores():
    query, key, value = make_inputs(1, 2, 2, 3, 100, 8, 8)
    for scale in (1e4, -1e4, 0.0, 1e-30):
        out, lse = attend(query, key, value, scale=scale)
        expected, expected_lse = definition(query, key, value, scale=scale)
        torch.testing.assert_close(out.double(), expected, rtol=1e-2, atol=1e-2)
        torch.testing.assert_close(lse.double(), expected_lse, rtol=1e-5, atol=1e-5)
    # Rising scores make every block of keys raise the running maximum.
    key = torch.linspace(0, 1, 1000).view(1, 1, -1, 1).expand(1, 1, -1, 4)
    query, value = torch.ones(1, 1, 2, 4), torch.randn(1, 1, 1000, 8)
    for scale in (10.0, 100.0, -100.0):
        expected, _ = definition(query, key, value, scale=scale)
        torch.testing.assert_close(attend(query, key, value, scale=scale)[0].double(), expected, rtol=1e-4, atol=1e-5)


def test_exponential_to_the_last_places():
    """Two keys of scores 0 and -x and values 0 and 1: the output is sigmoid(-x).

    An exponent x is rounded like x itself, which a score of that size was before.
    """
    x = torch.cat([torch.linspace(0, 87, 5000), torch.logspace(-8, 1.9, 5000)])
    query, key = torch.ones(len(x), 1, 1, 1), torch.stack([torch.zeros(len(x)), -x], 1).view(-1, 1, 2, 1)
    out, lse = attend(query, key, torch.tensor([0.0, 1.0]).view(1, 1, 2, 1).expand(len(x), 1, 2, 1))
    error = (out.flatten().double() / (-x.double()).sigmoid() - 1).abs()
    assert (error <= 3e-7 + x * 2**-23).all()
    torch.testing.assert_close(lse.flatten().double(), F.softplus(-x.double()), rtol=3e-7, atol=1.5e-7)
    out, _ = attend(torch.ones(1, 1, 1, 1), torch.tensor([0.0, -200, -3e38]).view(1, 1, 3, 1), torch.ones(1, 1, 3, 1))
    assert out.item() == 1


def test_softcap_to_the_last_places():
    """One key: the logarithm of the sum is the score itself."""
    x = torch.logspace(-6, 3, 5000)
    x = torch.cat([x, -x, torch.linspace(0.5, 0.75, 1000), torch.zeros(1)])
    _, lse = attend(torch.ones(len(x), 1, 1, 1), x.view(-1, 1, 1, 1), torch.ones(len(x), 1, 1, 1), softcap=2.0)
    torch.testing.assert_close(lse.flatten().double(), 2 * torch.tanh(x.double() / 2), rtol=4e-7, atol=1.2e-7)


@pytest.mark.parametrize("value", [0.0, 1e-8, 6e-8, 5e-5, 6.2e-5, 1.0, 65504.0, -3e-7])
def test_float16_subnormals_are_read_exactly(value):
    """One key: the output is the value itself. Both ways of reading: few rows in place, many rows from a copy."""
    for queries in (1, 8):
        values = torch.full((1, 1, 1, 8), value, dtype=torch.float16)
        zeros = torch.zeros(1, 1, queries, 8, dtype=torch.float16)
        out, _ = attend(zeros, zeros[:, :, :1], values)
        assert out.eq(values).all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_same_bits_again_and_for_any_number_of_threads(dtype):
    shapes = [(1, 12, 12, 1, 1000, 64, 64), (2, 4, 2, 130, 130, 32, 32), (1, 1, 1, 200, 200, 16, 16)]
    before = torch.get_num_threads()
    try:
        for shape in shapes:
            inputs = make_inputs(*shape, dtype)
            results = []
            for threads in (1, 2, 2, 3):
                torch.set_num_threads(threads)
                results.append(attend(*inputs, is_causal=True, query_offset=shape[4] - shape[3]))
            for result in results[1:]:
                assert all(map(torch.equal, result, results[0]))
    finally:
        torch.set_num_threads(before)


def test_sizes_of_zero():
    for axis, shape in enumerate(itertools.repeat((2, 4, 2, 3, 5, 8, 6), 7)):
        sizes = list(shape)
        sizes[axis] = 0
        if axis == 1:
            sizes[2] = 0  # no heads at all
        if axis == 2:
            continue
        out, lse = attend(*make_inputs(*sizes))
        expected, expected_lse = definition(*make_inputs(*sizes))
        assert out.shape == expected.shape and lse.shape == expected_lse.shape
        if axis == 4:
            assert out.eq(0).all() and lse.eq(-math.inf).all()
        if axis == 5:  # no columns: every score is 0
            torch.testing.assert_close(lse, torch.full_like(lse, math.log(5)))


def bad_calls():
    q, k, v = torch.zeros(2, 4, 3, 8), torch.zeros(2, 2, 5, 8), torch.zeros(2, 2, 5, 6)
    mask = torch.ones(2, 4, 3, 5, dtype=torch.bool)
    huge = torch.zeros(1).expand(1, 1, 1, 2**45)
    return {
        "query": [
            (q[0], k, v, {}), (q.double(), k.double(), v.double(), {}), (q.long(), k.long(), v.long(), {}),
            (torch.zeros(2, 3, 3, 8), k, v, {}), (huge, huge, huge, {}),
        ],
        "key": [
            (q, k[0], v, {}), (q, k.half(), v, {}), (q, k[:1], v, {}), (q, k[..., :7], v, {}),
            (q, k[:, :0], v[:, :0], {}),
        ],
        "value": [
            (q, k, v[0], {}), (q, k, v.half(), {}), (q, k, v[:, :1], {}), (q, k, v[:, :, :4], {}), (q, k, v[:1], {}),
        ],
        "attn_mask": [
            (q, k, v, {"mask": mask[:, :2]}), (q, k, v, {"mask": mask[..., :4]}), (q, k, v, {"mask": mask.double()}),
            (q, k, v, {"mask": mask[0]}),
        ],
        "query_offsets": [
            (q, k, v, {"query_offsets": torch.zeros(3, dtype=torch.int64)}),
            (q, k, v, {"query_offsets": torch.zeros(2)}), (q, k, v, {"query_offsets": torch.tensor([0, 2**62])}),
        ],
        "kv_lengths": [
            (q, k, v, {"kv_lengths": torch.zeros(2, dtype=torch.int32)}),
            (q, k, v, {"kv_lengths": torch.zeros(1, dtype=torch.int64).expand(2)}),
        ],
        "kv_starts": [
            (q, k, v, {"kv_starts": torch.zeros(2, 1, dtype=torch.int64)}),
            (q, k, v, {"kv_starts": torch.zeros(0, dtype=torch.int64)}),
        ],
        "alibi_slopes": [
            (q, k, v, {"alibi_slopes": torch.zeros(4)}), (q, k, v, {"alibi_slopes": torch.zeros(2, 4).half()}),
            (q, k, v, {"alibi_slopes": torch.zeros(2, 2)}),
        ],
        "query_offset": [(q, k, v, {"query_offset": 2**62}), (q, k, v, {"query_offset": -(2**63)})],
        "window_left": [(q, k, v, {"window_left": -2})],
        "window_right": [(q, k, v, {"window_right": -(2**63)})],
    }  # fmt: skip


@pytest.mark.parametrize(("name", "index"), [(n, i) for n, calls in bad_calls().items() for i in range(len(calls))])
def test_bad_direct_calls_raise(name, index):
    query, key, value, options = bad_calls()[name][index]
    with pytest.raises(RuntimeError, match=rf"\b{name}\b"):
        attend(query, key, value, **options)


def test_outputs_too_large_to_allocate_raise():
    wide = torch.zeros(1).expand(2**30, 2**20, 2**12, 1)
    with pytest.raises(RuntimeError):
        attend(wide, wide, wide)


def test_window_and_offset_do_not_overflow():
    query, key, value = make_inputs(1, 1, 1, 3, 5, 8, 8)
    expected = attend(query, key, value)
    for options in ({"window_left": 2**63 - 1, "window_right": 2**63 - 1}, {"is_causal": True, "query_offset": 2**60}):
        assert all(map(torch.equal, attend(query, key, value, **options), expected))
    out, _ = attend(query, key, value, window_right=2**63 - 1, query_offset=-(2**60))
    assert torch.equal(out, expected[0])


@given(data=st.data())
def test_random_calls(data):
    torch.manual_seed(data.draw(st.integers(0, 2**31), "seed"))
    size = st.one_of(st.integers(1, 6), st.integers(1, 150))
    group, kv_heads = data.draw(st.integers(1, 4), "group"), data.draw(st.integers(1, 3), "kv_heads")
    batch, heads = data.draw(st.integers(1, 3), "batch"), group * kv_heads
    queries, keys = data.draw(size, "queries"), data.draw(size, "keys")
    dim, value_dim = data.draw(st.integers(1, 40), "dim"), data.draw(st.integers(1, 40), "value_dim")
    options = dict(options_named(data.draw(st.sampled_from(OPTION_NAMES), "first"), batch, heads, queries, keys))
    options |= options_named(data.draw(st.sampled_from(OPTION_NAMES), "second"), batch, heads, queries, keys)
    inputs = make_inputs(
        batch, heads, kv_heads, queries, keys, dim, value_dim, data.draw(st.sampled_from(DTYPES), "dtype")
    )
    if data.draw(st.booleans(), "transposed"):
        inputs = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in inputs]
    assert_close(*inputs, **options)
