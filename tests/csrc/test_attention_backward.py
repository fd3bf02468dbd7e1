"""The native kernel of attention's gradients, called directly, against autograd through the definition in float64."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

from gpt4fast.backends.reference.dropout import keep_mask

pytestmark = pytest.mark.usefixtures("needs_native")

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
NAMES = ("query", "key", "value", "mask")


def settings_of(query, mask=None, **options) -> tuple:
    """The ops' arguments after the tensors, with defaults for what a test does not care about."""
    defaults = {
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
    }
    assert options.keys() <= defaults.keys()
    return mask, *(defaults | options).values()


def gradients(query, key, value, grad_out, grad_lse=None, mask=None, saved=None, **options) -> list[Tensor]:
    """Those of query, key, value and a float mask, from the ops. saved: out and lse, else the forward op gives them."""
    arguments = settings_of(query, mask, **options)
    out, lse = saved or torch.ops.gpt4fast.attention_forward(query, key, value, *arguments)
    wanted = mask is not None and mask.dtype != torch.bool
    grads = torch.ops.gpt4fast.attention_backward(
        grad_out, grad_lse, query, key, value, out, lse, wanted, *arguments
    )  # fmt: skip
    assert grads[3].dtype == torch.float32
    assert wanted or grads[3].shape == (0,)
    return list(grads[: 4 if wanted else 3])


def visible_keys(query, key, mask=None, **options) -> Tensor:
    """(B, Hq, Lq, Lk), one comparison for each rule of the design."""
    batch, heads, queries, _ = query.shape
    keys = key.shape[2]
    i = positions(query, options)
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


def positions(query, options) -> Tensor:
    offset = options.get("query_offsets")
    offset = options.get("query_offset", 0) if offset is None else offset.view(-1, 1, 1, 1)
    return torch.arange(query.shape[2]).view(1, 1, -1, 1) + offset


def definition(query, key, value, mask=None, **options) -> tuple[Tensor, Tensor, Tensor]:
    """Attention in differentiable torch: out, the logarithm of the sum of exponentials (0 without keys), weights."""
    visible = visible_keys(query, key, mask, **options)
    group = query.shape[1] // max(key.shape[1], 1)
    key, value = (x.repeat_interleave(group, 1) for x in (key, value))
    scores = query @ key.mT * options.get("scale", 1 / math.sqrt(max(query.shape[-1], 1)))
    if options.get("softcap"):
        scores = options["softcap"] * torch.tanh(scores / options["softcap"])
    if mask is not None and mask.dtype != torch.bool:
        scores = scores + mask
    if options.get("alibi_slopes") is not None:
        distance = (positions(query, options) - torch.arange(key.shape[2])).abs()
        scores = scores - (options["alibi_slopes"][:, :, None, None] * distance).to(query.dtype)
    sees_any = visible.any(-1, keepdim=True)
    scores = torch.where(sees_any, scores.masked_fill(~visible, -math.inf), 0)
    lse = torch.where(sees_any.squeeze(-1), scores.logsumexp(-1), 0)
    weights = torch.where(sees_any, scores.softmax(-1), 0)
    if options.get("dropout_p"):
        kept = keep_mask(options["dropout_seed"], tuple(weights.shape), options["dropout_p"])
        weights = weights * kept * (1 / (1 - options["dropout_p"]) if options["dropout_p"] < 1 else 0)
    return weights @ value, lse, weights


def expected_gradients(query, key, value, grad_out, grad_lse=None, mask=None, dtype=torch.float64, **options):
    """By autograd through the definition computed in dtype."""
    wanted = mask is not None and mask.dtype != torch.bool
    inputs = [x.detach().to(dtype).requires_grad_() for x in (query, key, value, *([mask] if wanted else []))]
    out, lse, _ = definition(*inputs[:3], inputs[3] if wanted else mask, **options)
    grad_lse = torch.zeros_like(lse) if grad_lse is None else grad_lse.to(dtype)
    return torch.autograd.grad((out, lse), inputs, (grad_out.to(dtype), grad_lse), materialize_grads=True)


def summed_roundings(query, key, value, grad_out, grad_lse=None, mask=None, **options) -> list[Tensor]:
    """One rounding of every addend of the gradients errs by eps times this.

    In float32 it is what they would be without any cancellation; the rounding of the saved lse is one of exp's
    argument, so it counts as often as lse is large. In half types lse is exact beside a rounding, and as roundings are
    many and independent, their squares add up: what they can be at worst is as large as the gradients themselves.
    """
    group = query.shape[1] // max(key.shape[1], 1)
    is_half = query.dtype != torch.float32
    query, key, value, grad_out = (x.double() for x in (query, key, value, grad_out))
    out, lse, weights = definition(query, key, value, mask, **options)
    undropped = definition(query, key, value, mask, **options | {"dropout_p": 0})[2]
    if not is_half:
        weights, undropped = (x * lse.abs().clamp(min=1).unsqueeze(-1) for x in (weights, undropped))
    of_rows = (grad_out * out).abs().sum(-1, keepdim=True)
    if grad_lse is not None:
        of_rows = of_rows + grad_lse.abs().unsqueeze(-1)
    grads = weights * (grad_out.abs() @ value.abs().repeat_interleave(group, 1).mT) + undropped * of_rows
    scale = abs(options.get("scale", 1 / math.sqrt(max(query.shape[-1], 1))))

    def of_keys(x):
        return x.unflatten(1, (-1, group)).sum(2) if group else x

    power = 2 if is_half else 1
    grads, weights, key, query, grad_out = (x.abs() ** power for x in (grads, weights, key, query, grad_out))
    sums = [
        grads @ key.repeat_interleave(group, 1) * scale**power,
        of_keys(grads.mT @ query) * scale**power,
        of_keys(weights.mT @ grad_out),
    ]
    if mask is not None and mask.dtype != torch.bool:
        sums.append(grads.sum_to_size(mask.shape))
    return [x ** (1 / power) for x in sums]


def assert_close(inputs, mask=None, grad_lse=None, **options):
    """At most twice as far from float64 as plain torch in the same dtype, but for three roundings of the addends.

    They are of the exponential's argument, of its polynomial and of a sum; of few addends torch may have none.
    """
    query, key, value, grad_out = inputs
    got = gradients(*inputs, grad_lse, mask, **options)
    expected = expected_gradients(*inputs, grad_lse, mask, **options)
    plain = expected_gradients(*inputs, grad_lse, mask, dtype=query.dtype, **options)
    addends = summed_roundings(*inputs, grad_lse, mask, **options)
    sources = (query, key, value, mask)
    for name, source, ours, exact, torchs, sums in zip(NAMES, sources, got, expected, plain, addends, strict=False):
        assert ours.shape == source.shape
        if name != "mask":
            assert ours.dtype == source.dtype and ours.stride() == torch.empty_like(source).stride()
        # An addend is rounded six times: the exponent, its power, two products, a difference and the scale.
        allowed = 2 * (torchs.double() - exact).norm() + 6 * torch.finfo(query.dtype).eps * sums.norm()
        error = (ours.double() - exact).norm()
        assert error <= allowed, f"gradient of {name}: {error} from float64, allowed {allowed}"


def make_inputs(batch, heads, kv_heads, queries, keys, dim, value_dim, dtype=torch.float32):
    """query, key, value, grad_out"""
    return (
        torch.randn(batch, heads, queries, dim).to(dtype),
        torch.randn(batch, kv_heads, keys, dim).to(dtype),
        torch.randn(batch, kv_heads, keys, value_dim).to(dtype),
        torch.randn(batch, heads, queries, value_dim).to(dtype),
    )


def sparse_mask(*shape, dtype=torch.float32) -> Tensor:
    mask = torch.randn(shape)
    return mask.masked_fill(mask > 0.8, -math.inf).to(dtype)


def options_named(name: str, batch: int, heads: int, queries: int, keys: int) -> dict:
    """One combination of arguments for the given sizes."""
    full = (batch, heads, queries, keys)
    lengths = torch.randint(0, keys + 1, (batch,))
    slopes = torch.rand(batch, heads)
    seed = torch.randint(2**63 - 1, (1,))
    return {
        "plain": {},
        "scale": {"scale": -0.37},
        "scale of 0": {"scale": 0.0},
        "grad_lse": {"grad_lse": torch.randn(batch, heads, queries)},
        "grad_lse of one head": {"grad_lse": torch.randn(1, 1, queries).expand(full[:3])},
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
        "bool mask of keys": {"mask": torch.rand(batch, 1, 1, keys) > 0.4},
        "bool mask of queries": {"mask": torch.rand(1, 1, queries, 1) > 0.4},
        "bool mask, transposed": {"mask": (torch.rand(batch, heads, keys, queries) > 0.4).mT},
        "bool mask of whole blocks": {"mask": (torch.arange(keys) // 64 % 2 == 1).expand(1, 1, queries, keys)},
        "float32 mask": {"mask": sparse_mask(*full)},
        "bfloat16 mask of heads": {"mask": sparse_mask(1, heads, 1, keys, dtype=torch.bfloat16)},
        "float16 mask of one row": {"mask": sparse_mask(1, 1, 1, keys, dtype=torch.float16)},
        "float32 mask, softcap": {"mask": sparse_mask(1, heads, queries, keys), "softcap": 1.0},
        "dropout": {"dropout_p": 0.3, "dropout_seed": seed},
        "dropout, causal": {"dropout_p": 0.8, "dropout_seed": seed, "is_causal": True},
        "dropout of all": {"dropout_p": 1.0, "dropout_seed": seed},
        "dropout, mask": {"dropout_p": 0.5, "dropout_seed": seed, "mask": sparse_mask(batch, 1, queries, keys)},
        "all": {
            "mask": sparse_mask(batch, 1, queries, keys),
            "grad_lse": torch.randn(batch, heads, queries),
            "is_causal": True,
            "query_offsets": torch.randint(0, keys + 1, (batch,)),
            "kv_lengths": lengths,
            "kv_starts": lengths // 3,
            "window_left": 40,
            "window_right": 2,
            "softcap": 3.0,
            "alibi_slopes": slopes,
            "scale": 0.2,
            "dropout_p": 0.2,
            "dropout_seed": seed,
        },
    }[name]


OPTION_NAMES = [
    "plain", "scale", "scale of 0", "grad_lse", "grad_lse of one head", "causal", "causal, bottom right",
    "causal, before all keys", "offset of each row", "lengths", "starts", "starts and lengths", "lengths out of range",
    "window", "left window, causal", "right window", "softcap", "softcap of large scores", "alibi",
    "alibi, causal, one slope for all", "bool mask", "bool mask of keys", "bool mask of queries",
    "bool mask, transposed", "bool mask of whole blocks", "float32 mask", "bfloat16 mask of heads",
    "float16 mask of one row", "float32 mask, softcap", "dropout", "dropout, causal", "dropout of all",
    "dropout, mask", "all",
]  # fmt: skip

# (B, Hq, Hk, Lq, Lk, D, Dv): few queries, tails of every block size, grouped heads, one key/value head, Dv != D.
SHAPES = [
    (2, 3, 3, 1, 130, 16, 16),
    (1, 2, 2, 2, 5, 7, 3),
    (2, 2, 1, 33, 65, 40, 24),
    (1, 6, 2, 37, 191, 12, 33),
    (1, 1, 1, 100, 100, 32, 1),
    (1, 2, 2, 200, 70, 64, 64),
]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", OPTION_NAMES)
def test_matches_float64(name, dtype):
    for shape in SHAPES:
        batch, heads, _, queries, keys, _, _ = shape
        assert_close(make_inputs(*shape, dtype), **options_named(name, batch, heads, queries, keys))


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_level(level, dtype):
    for name in ("plain", "causal", "window", "all"):
        for shape in SHAPES:
            batch, heads, _, queries, keys, _, _ = shape
            assert_close(make_inputs(*shape, dtype), **options_named(name, batch, heads, queries, keys))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("shape", [(2, 3, 3, 130, 130, 64, 64), (1, 2, 2, 300, 300, 128, 128)])
def test_at_most_twice_the_error_of_torchs_kernel(shape, is_causal, dtype, level):
    ours, theirs = {}, {}  # errors of each gradient, over several draws
    for _ in range(4):
        inputs = make_inputs(*shape, dtype)
        expected = expected_gradients(*inputs, is_causal=is_causal)
        leaves = [x.clone().requires_grad_() for x in inputs[:3]]
        torchs = torch.autograd.grad(F.scaled_dot_product_attention(*leaves, is_causal=is_causal), leaves, inputs[3])
        for results, grads in ((ours, gradients(*inputs, is_causal=is_causal)), (theirs, torchs)):
            for name, grad, exact in zip(NAMES, grads, expected, strict=False):
                results.setdefault(name, []).append((grad - exact).abs())
    for name in ours:
        mine, other = torch.stack(ours[name]).flatten(), torch.stack(theirs[name]).flatten()
        assert mine.norm() <= 2 * other.norm(), name
        largest = mine.numel() // 1000  # a thousandth of all
        assert mine.topk(largest).values.mean() <= 2 * other.topk(largest).values.mean(), name


@pytest.mark.parametrize("dim", [*range(1, 20), 31, 33, 48, 63, 65, 79, 81, 96, 127, 130, 257])
def test_every_size_of_head(dim):
    for dtype in DTYPES:
        assert_close(make_inputs(1, 2, 1, 9, 20, dim, 5, dtype), is_causal=True, query_offset=11)
        assert_close(make_inputs(1, 2, 1, 9, 20, 6, dim, dtype), is_causal=True, query_offset=11)


@pytest.mark.parametrize("length", [1, 5, 6, 7, 15, 16, 17, 63, 64, 65, 95, 96, 97, 128, 191, 193, 257])
def test_lengths_around_the_edges_of_blocks(length):
    for dtype in DTYPES:
        assert_close(make_inputs(1, 1, 1, length, length, 8, 8, dtype), is_causal=True)
        assert_close(make_inputs(1, 3, 1, length, 70, 8, 8, dtype))
        assert_close(make_inputs(1, 2, 1, 70, length, 8, 8, dtype), window_left=30, window_right=30)


def layouts(dtype):
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

    return transposed, misaligned, stepped, columns_first


@pytest.mark.parametrize("dtype", DTYPES)
def test_any_strides(dtype):
    """The bits of contiguous inputs, in gradients laid out like their inputs."""
    inputs = make_inputs(2, 4, 2, 35, 70, 16, 12, dtype)
    arguments = settings_of(inputs[0])
    saved = torch.ops.gpt4fast.attention_forward(*inputs[:3], *arguments)
    expected = gradients(*inputs, saved=saved)
    for layout in layouts(dtype):
        moved = [layout(x) for x in inputs]
        got = gradients(*moved, saved=(layout(saved[0]), saved[1]))
        for ours, theirs, source in zip(got, expected, moved, strict=False):
            assert torch.equal(ours, theirs), layout.__name__
            assert ours.stride() == torch.empty_like(source).stride()
    one = [x[:1, :1] for x in inputs]
    expanded = [x.expand(2, 4, -1, -1) for x in one]
    for ours, theirs in zip(gradients(*expanded), gradients(*(x.contiguous() for x in expanded)), strict=True):
        assert torch.equal(ours, theirs) and ours.is_contiguous()
    ones = torch.ones(()).to(dtype).expand(inputs[3].shape)  # what out.sum().backward() gives
    for ours, theirs in zip(gradients(*inputs[:3], ones), gradients(*inputs[:3], ones.contiguous()), strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("is_float", [True, False])
@pytest.mark.parametrize("axes", list(itertools.product([False, True], repeat=4)))
def test_every_broadcast_of_a_mask(axes, is_float):
    """axes: which of the mask's are full."""
    for sizes in ((3, 4, 110, 130), (2, 2, 7, 70)):
        shape = [size if full else 1 for size, full in zip(sizes, axes, strict=True)]
        mask = sparse_mask(*shape) if is_float else torch.rand(shape) > 0.3
        batch, heads, queries, keys = sizes
        for dtype in (torch.float32, torch.bfloat16):
            assert_close(make_inputs(batch, heads, 2, queries, keys, 12, 8, dtype), mask=mask, is_causal=axes[0])


def test_gradient_of_a_broadcast_mask_is_a_sum_without_rounding_errors_of_its_own():
    """Over 96 heads and over 40 rows of each."""
    inputs = make_inputs(24, 4, 4, 40, 50, 16, 16)
    mask = torch.randn(1, 1, 1, 50)
    addends = gradients(*inputs, mask=mask.expand(24, 4, 40, 50).contiguous())[3].double()
    for shape in ((1, 1, 40, 50), (1, 1, 1, 50), (24, 1, 40, 50)):
        expected = addends.sum_to_size(shape)
        ours = gradients(*inputs, mask=mask.expand(shape).contiguous())[3]
        torch.testing.assert_close(ours.double(), expected, rtol=2e-7, atol=1e-9 * addends.abs().sum().item() / 50)


def test_strided_masks():
    inputs = make_inputs(2, 2, 2, 35, 70, 16, 16)
    mask = sparse_mask(2, 2, 35, 70)
    expected = gradients(*inputs, mask=mask)
    for moved in (mask.mT.contiguous().mT, mask.transpose(0, 1).contiguous().transpose(0, 1)):
        for ours, theirs in zip(gradients(*inputs, mask=moved), expected, strict=True):
            assert torch.equal(ours, theirs)


UNSEEN_CASES = ["lengths", "starts", "causal", "window", "bool mask of keys", "float mask of keys"]


def unseen_case(name, keys, queries):
    lengths, holes = torch.tensor([50, 81]), torch.rand(1, 1, 1, keys) > 0.3
    return {
        "lengths": {"kv_lengths": lengths},
        "starts": {"kv_starts": lengths},
        "causal": {"is_causal": True, "query_offset": keys - queries - 10},
        "window": {"window_left": 9, "window_right": 1, "query_offset": 20},
        "bool mask of keys": {"mask": holes},
        "float mask of keys": {"mask": torch.where(holes, 0.5, -math.inf)},
    }[name]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("queries", [1, 2, 40, 100])
@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("name", UNSEEN_CASES)
def test_unseen_keys_and_values_do_not_matter(name, queries, bad, dtype):
    keys = 140
    options = unseen_case(name, keys, queries)
    query, key, value, grad_out = make_inputs(2, 2, 1, queries, keys, 16, 12, dtype)
    seen = visible_keys(query, key, **options).any(1).any(1)[:, None, :, None]
    clean = [torch.where(seen, x, 0) for x in (key, value)]
    dirty = [torch.where(seen, x, bad) for x in (key, value)]
    expected = gradients(query, *clean, grad_out, **options)
    for ours, theirs in zip(gradients(query, *dirty, grad_out, **options), expected, strict=True):
        # Probabilities that are rounded to bfloat16 may fall to the other side: a rounding of the largest addends.
        rounding = torch.finfo(dtype).eps * theirs.abs().max().item()
        torch.testing.assert_close(ours, theirs, atol=max(rounding, 1e-5), rtol=2 * torch.finfo(dtype).eps)
    for grad in gradients(query, *dirty, grad_out, **options)[1:3]:
        assert grad.masked_select(~seen).eq(0).all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_non_finite_numbers_reach_only_those_who_see_them(bad, dtype):
    """Causal: the last key is seen by the last query, and the first query sees the first key."""
    length = 110
    clean = make_inputs(1, 1, 1, length, length, 16, 12, dtype)
    for place in (length - 1, 70, 3):
        query, key, value, grad_out = (x.clone() for x in clean)
        key[:, :, place] = bad
        grads = gradients(query, key, value, grad_out, is_causal=True)
        assert grads[0][:, :, :place].isfinite().all() and grads[0][:, :, place:].isnan().all()
        # Of keys and values those are clean that no query from `place` on sees: none before it.
        for grad in gradients(query, key, value, grad_out, is_causal=True)[1:]:
            assert grad[:, :, place + 1 :].isnan().all()

        query, key, value, grad_out = (x.clone() for x in clean)
        query[:, :, place] = bad
        grads = gradients(query, key, value, grad_out, is_causal=True)
        assert grads[0][:, :, :place].isfinite().all() and grads[0][:, :, place + 1 :].isfinite().all()
        for grad in grads[1:]:
            assert grad[:, :, place + 1 :].isfinite().all() and not grad[:, :, : place + 1].isfinite().any()

        query, key, value, grad_out = (x.clone() for x in clean)
        grad_out[:, :, place] = bad
        grads = gradients(query, key, value, grad_out, is_causal=True)
        assert grads[0][:, :, :place].isfinite().all() and grads[0][:, :, place + 1 :].isfinite().all()
        assert not grads[0][:, :, place].isfinite().any()
        for grad in grads[1:]:
            assert grad[:, :, place + 1 :].isfinite().all() and not grad[:, :, : place + 1].isfinite().any()

        query, key, value, grad_out = (x.clone() for x in clean)
        value[:, :, place] = bad
        grads = gradients(query, key, value, grad_out, is_causal=True)
        assert grads[0][:, :, :place].isfinite().all() and not grads[0][:, :, place:].isfinite().any()
        assert grads[2].isfinite().all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_rows_that_see_nothing_have_no_gradient(dtype):
    query, key, value, grad_out = make_inputs(2, 4, 2, 6, 70, 8, 5, dtype)
    hidden = torch.zeros(2, 4, 6, 70, dtype=torch.bool)
    for options in (
        {"mask": hidden},
        {"mask": torch.full(hidden.shape, -math.inf)},
        {"kv_lengths": torch.tensor([0, -4])},
        {"kv_starts": torch.tensor([70, 2**62])},
        {"is_causal": True, "query_offset": -6},
        {"window_left": 1, "window_right": 1, "query_offset": 2**60},
    ):
        nan = [torch.full_like(x, math.nan) for x in (query, key, value, grad_out)]
        for grad in gradients(*nan, torch.full((2, 4, 6), math.nan), **options):
            assert grad.eq(0).all()
    # The first two rows see nothing, the others do.
    query[:, :, :2] = grad_out[:, :, :2] = math.nan
    options = {"is_causal": True, "query_offset": -2}
    out, lse = torch.ops.gpt4fast.attention_forward(query, key, value, *settings_of(query, **options))
    out[:, :, :2] = math.nan
    grads = gradients(query, key, value, grad_out, saved=(out, lse), **options)
    assert grads[0][:, :, :2].eq(0).all()
    query[:, :, :2] = grad_out[:, :, :2] = 0
    for ours, theirs in zip(grads, gradients(query, key, value, grad_out, **options), strict=True):
        assert torch.equal(ours, theirs)


def test_extreme_scores():
    inputs = make_inputs(1, 2, 2, 30, 100, 8, 8)
    for scale in (30.0, -30.0, 1e-30):
        for ours, exact in zip(gradients(*inputs, scale=scale), expected_gradients(*inputs, scale=scale), strict=True):
            torch.testing.assert_close(ours.double(), exact, rtol=1e-3, atol=1e-4 * max(abs(scale), 1))
    # Hidden pairs whose products overflow: 0 * inf must not appear.
    query, key, value, grad_out = make_inputs(1, 1, 1, 20, 20, 8, 8)
    value[:, :, :10], value[:, :, 10:] = 1.0, 1e36
    grad_out[:, :, :10], grad_out[:, :, 10:] = 1e4, 1e-36
    mask = torch.ones(1, 1, 20, 20, dtype=torch.bool)
    mask[..., :10, 10:] = False
    for options in ({"is_causal": True}, {"mask": mask}):
        for grad in gradients(query, key, value, grad_out, **options):
            assert grad.isfinite().all()


SPLITS = [
    (1, 1, 1, 700, 700, 16, 16), (1, 3, 3, 300, 300, 16, 16), (1, 5, 5, 200, 260, 8, 24), (1, 8, 1, 60, 300, 16, 16),
    (2, 1, 1, 100, 500, 16, 16), (1, 12, 12, 97, 97, 8, 8),
]  # fmt: skip


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SPLITS)
def test_the_same_bits_again_and_for_any_number_of_threads(shape, dtype):
    """Heads that do not divide among the threads are split, by rows and by keys."""
    batch, heads, _, queries, keys, _, _ = shape
    inputs = make_inputs(*shape, dtype)
    before = torch.get_num_threads()
    options = [
        {"is_causal": True, "query_offset": keys - queries},
        {"mask": sparse_mask(1, heads, 1, keys), "kv_lengths": torch.randint(keys // 2, keys, (batch,))},
    ]
    try:
        for option in options:
            results = []
            for threads in (1, 2, 2, 3, 7):
                torch.set_num_threads(threads)
                results.append(gradients(*inputs, **option))
            for result in results[1:]:
                assert all(map(torch.equal, result, results[0]))
            assert_close(inputs, **option)
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("heads", [(4, 2), (3, 3)])
def test_packed_sequences(heads, dtype):
    """Each sequence as if alone; tokens of none have no gradient."""
    lengths_q, lengths_k = [3, 0, 130, 40, 1], [70, 5, 130, 0, 64]
    gap = 2
    bounds_q = torch.tensor([gap, *itertools.accumulate(lengths_q, initial=gap)][1:])
    bounds_k = torch.tensor([gap, *itertools.accumulate(lengths_k, initial=gap)][1:])
    query, _, _, grad_out = make_inputs(1, *heads, int(bounds_q[-1]) + gap, 1, 16, 12, dtype)
    _, key, value, _ = make_inputs(1, *heads, 1, int(bounds_k[-1]) + gap, 16, 12, dtype)
    options = [
        {"is_causal": True},
        {"query_offsets": torch.tensor([3, 0, 1, 2, 60]), "is_causal": True, "window_left": 30},
        {"kv_lengths": torch.tensor([9, 5, 100, 0, 64]), "alibi_slopes": torch.rand(5, heads[0])},
    ]
    for option in options:
        packed = gradients(query, key, value, grad_out, cu_seqlens_q=bounds_q, cu_seqlens_k=bounds_k, **option)
        alone = [torch.zeros_like(x) for x in (query, key, value)]
        for b in range(len(lengths_q)):
            rows, columns = slice(*bounds_q[b : b + 2].tolist()), slice(*bounds_k[b : b + 2].tolist())
            one = {name: x[b : b + 1] if isinstance(x, Tensor) else x for name, x in option.items()}
            inputs = [query[:, :, rows], key[:, :, columns], value[:, :, columns], grad_out[:, :, rows]]
            for whole, part, places in zip(alone, gradients(*inputs, **one), (rows, columns, columns), strict=True):
                whole[:, :, places] = part
        for ours, theirs in zip(packed, alone, strict=True):  # the outputs of short sequences come from another kernel
            assert (ours - theirs).float().norm() <= 4 * torch.finfo(dtype).eps * theirs.float().norm()
    # Dropout counts inside each sequence, as the forward pass does: its saved output is what the gradients belong to.
    option = {"dropout_p": 0.4, "dropout_seed": torch.tensor([5]), "is_causal": True}
    whole = query[:, :, :130], key[:, :, :130], value[:, :, :130], grad_out[:, :, :130]
    bounds = torch.tensor([0, 130])
    for ours, theirs in zip(
        gradients(*whole, cu_seqlens_q=bounds, cu_seqlens_k=bounds, **option), gradients(*whole, **option), strict=True
    ):
        assert torch.equal(ours, theirs)


def test_sizes_of_zero():
    for axis in (0, 1, 3, 4, 5, 6):
        sizes = [2, 4, 2, 3, 5, 8, 6]
        sizes[axis] = 0
        if axis == 1:
            sizes[2] = 0  # no heads at all
        inputs = make_inputs(*sizes)
        mask = torch.randn(1, 1, sizes[3], sizes[4])
        for grad, source in zip(gradients(*inputs, mask=mask), (*inputs[:3], mask), strict=True):
            assert grad.shape == source.shape
            if axis != 5 and axis != 6:
                assert grad.eq(0).all()
        if axis in (5, 6):
            expected = expected_gradients(*inputs, mask=mask)
            for ours, exact in zip(gradients(*inputs, mask=mask), expected, strict=True):
                torch.testing.assert_close(ours.double(), exact, rtol=1e-4, atol=1e-5)


def bad_calls():
    q, k, v, g = torch.zeros(2, 4, 3, 8), torch.zeros(2, 2, 5, 8), torch.zeros(2, 2, 5, 6), torch.zeros(2, 4, 3, 6)
    good = {"grad_out": g, "grad_lse": None, "query": q, "key": k, "value": v, "out": g, "lse": torch.zeros(2, 4, 3),
            "needs_mask_grad": False, "mask": None}  # fmt: skip
    bad = {
        "grad_out": [g[:, :2], g[..., :5], g.half(), g[0]],
        "grad_lse": [torch.zeros(2, 4), torch.zeros(2, 4, 3).half(), torch.zeros(2, 4, 3, 1)],
        "query": [q[0], {x: good[x].double() for x in ("query", "key", "value", "grad_out", "out")}],
        "key": [k[..., :7], k.half()],
        "value": [v[:, :, :4], v[:1]],
        "out": [g[:, :, :2], g.bfloat16(), g[:1]],
        "lse": [torch.zeros(2, 4), torch.zeros(2, 4, 3).double(), torch.zeros(2, 3, 4).mT, torch.zeros(1, 4, 3)],
        "attn_mask": [{"mask": torch.zeros(2, 4, 3, 4)}, {"mask": torch.ones(1, 1, 1, 1).bool(),
                      "needs_mask_grad": True}, {"needs_mask_grad": True}],
    }  # fmt: skip
    return [
        (name, good | (change if isinstance(change, dict) else {name: change}))
        for name, changes in bad.items()
        for change in changes
    ]


@pytest.mark.parametrize(("name", "arguments"), bad_calls())
def test_bad_direct_calls_raise(name, arguments):
    mask = arguments.pop("mask")
    with pytest.raises(RuntimeError, match=rf"\b{name}\b"):
        torch.ops.gpt4fast.attention_backward(*arguments.values(), *settings_of(torch.zeros(1, 1), mask))


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
    dtype = data.draw(st.sampled_from(DTYPES), "dtype")
    inputs = make_inputs(batch, heads, kv_heads, queries, keys, dim, value_dim, dtype)
    if data.draw(st.booleans(), "transposed"):
        inputs = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in inputs]
    assert_close(inputs, **options)
