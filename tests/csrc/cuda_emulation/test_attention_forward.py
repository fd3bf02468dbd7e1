"""The CUDA kernel of attention, emulated, against float64: the cases of ../test_attention_forward.py, small."""

from __future__ import annotations

import math

import pytest
import torch

from .. import test_attention_backward as backward
from ..test_attention_forward import DTYPES, OPTION_NAMES, assert_close, attend, definition, make_inputs, options_named

HALF = [torch.bfloat16, torch.float16]


@pytest.fixture(autouse=True)
def _cuda_ops(cuda_ops, monkeypatch):
    monkeypatch.setattr(torch.ops, "gpt4fast", cuda_ops)


@pytest.fixture
def _hopper(cuda_ops, monkeypatch):
    """Hopper's own kernel, which has half types and no masks."""
    monkeypatch.setenv("GPT4FAST_WGMMA", "1")


@pytest.fixture(params=["0", "1"], ids=["", "hopper"])
def _both(cuda_ops, monkeypatch, request):
    monkeypatch.setenv("GPT4FAST_WGMMA", request.param)


# (B, Hq, Hk, Lq, Lk, D, Dv): tails of queries and keys, grouped heads, copies of 16 bytes and of single numbers.
SHAPES = [(2, 2, 1, 33, 65, 40, 24), (1, 2, 2, 70, 150, 16, 16), (1, 2, 1, 5, 3, 7, 3)]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", OPTION_NAMES)
def test_matches_float64(name, dtype):
    for shape in SHAPES:
        batch, heads, _, queries, keys, _, _ = shape
        assert_close(*make_inputs(*shape, dtype), **options_named(name, batch, heads, queries, keys))


@pytest.mark.usefixtures("_hopper")
@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("name", [name for name in OPTION_NAMES if "mask" not in name])
def test_hopper_matches_float64(name, dtype):
    """One tile, several of each width of heads, and their ends; copies of 16 bytes and of single numbers."""
    for shape in [(2, 2, 1, 33, 65, 40, 24), (1, 2, 1, 200, 400, 16, 16), (1, 1, 1, 70, 300, 128, 80)]:
        batch, heads, _, queries, keys, _, _ = shape
        assert_close(*make_inputs(*shape, dtype), **options_named(name, batch, heads, queries, keys))
    assert_close(*make_inputs(1, 1, 1, 5, 150, 7, 3, dtype), **options_named(name, 1, 1, 5, 150))


@pytest.mark.usefixtures("_hopper")
@pytest.mark.parametrize("dtype", HALF)
def test_hopper_with_every_width(dtype):
    for dim, value_dim in ((64, 64), (128, 72), (72, 128), (256, 200), (136, 256)):
        assert_close(*make_inputs(1, 1, 1, 130, 140, dim, value_dim, dtype), is_causal=True, query_offset=20)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", [name for name in backward.OPTION_NAMES if "dropout" in name])
def test_dropout(name, dtype):
    """The weights that the definition drops, and no others."""
    for shape in [*SHAPES, (1, 1, 1, 20, 140, 128, 16), (1, 1, 1, 20, 140, 200, 16)]:
        batch, heads, _, queries, keys, _, _ = shape
        inputs = make_inputs(*shape, dtype)
        options = backward.options_named(name, batch, heads, queries, keys)
        out, lse = attend(*inputs, **options)
        expected, expected_lse, _ = backward.definition(*(x.double() for x in inputs), **options)
        tolerance = 16 * torch.finfo(dtype).eps  # 6 were seen, of scores of 200 products
        torch.testing.assert_close(out.double(), expected, rtol=tolerance, atol=tolerance)
        torch.testing.assert_close(lse.double(), expected_lse, rtol=1e-5, atol=2e-5)


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_width(dtype):
    for dim, value_dim in ((64, 64), (128, 72), (256, 200)):
        mask = torch.rand(1, 1, 70, 90) > 0.3
        assert_close(*make_inputs(1, 1, 1, 70, 90, dim, value_dim, dtype), is_causal=True, query_offset=20)
        assert_close(*make_inputs(1, 1, 1, 70, 90, dim, value_dim, dtype), mask)


@pytest.mark.usefixtures("_both")
@pytest.mark.parametrize("dtype", DTYPES)
def test_packed_sequences(dtype):
    lengths = (5, 0, 70, 1), (9, 3, 64, 0)
    starts_q, starts_k = (torch.tensor([0, *torch.tensor(x).cumsum(0)]) for x in lengths)
    query, key, value = make_inputs(1, 2, 1, 76, 76, 24, 16, dtype)
    options = {"is_causal": True, "window_left": 30}
    out, lse = attend(query, key, value, cu_seqlens_q=starts_q, cu_seqlens_k=starts_k, **options)
    for b in range(4):
        rows, columns = (slice(starts[b], starts[b + 1]) for starts in (starts_q, starts_k))
        one = query[:, :, rows], key[:, :, columns], value[:, :, columns]
        expected, expected_lse = definition(*one, **options)
        tolerance = 4 * torch.finfo(dtype).eps
        torch.testing.assert_close(out[:, :, rows].double(), expected, rtol=tolerance, atol=tolerance)
        torch.testing.assert_close(lse[:, :, rows].double(), expected_lse, rtol=1e-5, atol=2e-5)


@pytest.mark.usefixtures("_both")
@pytest.mark.parametrize("dtype", DTYPES)
def test_any_strides_and_layouts(dtype):
    query, key, value = make_inputs(2, 2, 1, 33, 40, 16, 24, dtype)
    expected = attend(query, key, value)

    def stepped(x):
        return torch.empty(*(2 * size for size in x.shape), dtype=x.dtype)[:, :, 1::2, ::2][:2, : x.shape[1]].copy_(x)

    def rows_first(x):
        return x.transpose(1, 2).contiguous().transpose(1, 2)

    for change in (stepped, rows_first, lambda x: x.mT.contiguous().mT):
        for same in (attend(change(query), change(key), change(value), heads_first=True),):
            assert all(map(torch.equal, same, expected))
    assert expected[0].transpose(1, 2).is_contiguous()


@pytest.mark.usefixtures("_both")
def test_keys_that_no_query_sees_do_not_matter():
    query, key, value = make_inputs(1, 1, 1, 20, 90, 16, 16, torch.float16)
    options = {"kv_lengths": torch.tensor([70]), "kv_starts": torch.tensor([5]), "is_causal": True, "query_offset": 40}
    expected = attend(query, key, value, **options)
    for tensor in (key, value):
        tensor[:, :, :5] = tensor[:, :, 60:] = math.nan
    assert all(map(torch.equal, attend(query, key, value, **options), expected))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("is_float", [False, True], ids=["bool", "float"])
def test_keys_that_a_mask_hides_do_not_matter(is_float, dtype):
    """Also where others of their tile are seen."""
    query, key, value = make_inputs(2, 2, 1, 70, 90, 16, 16, dtype)
    mask = torch.rand(2, 1, 1, 90) > 0.4
    hidden = ~mask.mT
    mask = torch.where(mask, 0.3, -math.inf) if is_float else mask
    expected = attend(query, key, value, mask)
    for bad in (math.nan, math.inf):
        got = attend(query, key.masked_fill(hidden, bad), value.masked_fill(hidden, bad), mask)
        assert all(map(torch.equal, got, expected))


def test_masks_of_the_lowest_numbers_hide_nothing():
    """Models mask with float32's lowest: a row that has only those sees all, equally."""
    query, key, value = make_inputs(1, 1, 1, 5, 20, 16, 16)
    mask = torch.full((1, 1, 5, 20), torch.finfo(torch.float32).min)
    out, _ = attend(query, key, value, mask)
    torch.testing.assert_close(out, value.mean(2, keepdim=True).expand_as(out))


def test_sizes_of_zero_and_bad_arguments():
    query, key, value = make_inputs(1, 2, 1, 3, 0, 8, 8)
    out, lse = attend(query, key, value)
    assert out.eq(0).all() and lse.eq(-math.inf).all()
    assert attend(query[:0], key[:0], value[:0])[0].shape == (0, 2, 3, 8)
    with pytest.raises(RuntimeError, match="attn_mask"):
        attend(query, key, value, mask=torch.ones(1, 2, 4, 0, dtype=torch.bool))
    with pytest.raises(RuntimeError, match="dropout_seed"):
        attend(query, key, value, dropout_p=0.5)
    with pytest.raises(RuntimeError, match="at most 256"):
        attend(*make_inputs(1, 1, 1, 3, 3, 260, 8))
