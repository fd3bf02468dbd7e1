"""The CUDA kernels of attention's gradients, emulated, against float64: the cases of ../test_attention_backward.py,
small."""

from __future__ import annotations

import math
from functools import partial

import pytest
import torch

from gpt4fast.backends.compiled import attention as compiled
from gpt4fast.backends.reference import attention as reference
from gpt4fast.backends.reference.attention_varlen import attention_varlen as padded_attention

from .. import test_attention_backward as cpu
from ..test_attention_backward import DTYPES, OPTION_NAMES, assert_close, gradients, make_inputs, options_named


@pytest.fixture(autouse=True)
def _cuda_ops(cuda_ops, monkeypatch):
    monkeypatch.setattr(torch.ops, "gpt4fast", cuda_ops)


# (B, Hq, Hk, Lq, Lk, D, Dv): tails of queries and keys, grouped heads, copies of 16 bytes and of single numbers.
SHAPES = [(2, 2, 1, 33, 65, 40, 24), (1, 2, 1, 5, 3, 7, 3)]
LARGER = (1, 2, 2, 70, 150, 16, 16)  # of several tiles either way, for what differs from tile to tile


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", OPTION_NAMES)
def test_matches_float64(name, dtype):
    differs = any(word in name for word in ("causal", "window", "dropout", "blocks", "all"))
    for shape in [*SHAPES, LARGER] if differs and dtype != torch.bfloat16 else SHAPES:
        batch, heads, _, queries, keys, _, _ = shape
        assert_close(make_inputs(*shape, dtype), **options_named(name, batch, heads, queries, keys))


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_width(dtype):
    for dim, value_dim in ((64, 64), (128, 72), (40, 128)):
        inputs = make_inputs(1, 1, 1, 70, 90, dim, value_dim, dtype)
        assert_close(inputs, is_causal=True, query_offset=20)
        for name in ("all", "dropout, mask"):
            assert_close(inputs, **options_named(name, 1, 1, 70, 90))


WIDE_NAMES = [
    "plain", "causal, bottom right", "starts and lengths", "window", "bool mask of whole blocks",
    "float32 mask, softcap", "dropout, causal", "dropout, mask", "all",
]  # fmt: skip


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", WIDE_NAMES)
def test_wide_heads(name, dtype):
    """Of which a warp sums up the gradients of keys, or those of values: copies of 16 bytes and of single numbers."""
    dims = (131, 256) if name == "all" else (256, 136)
    assert_close(make_inputs(1, 2, 1, 37, 70, *dims, dtype), **options_named(name, 1, 2, 37, 70))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("dropout_p", [0.0, 0.3])
def test_wide_heads_of_packed_sequences(dropout_p, dtype):
    """Each as if alone; tokens of none have no gradient."""
    bounds_q, bounds_k = torch.tensor([1, 21, 21, 34]), torch.tensor([2, 41, 44, 60])
    query, _, _, grad_out = make_inputs(1, 2, 1, 35, 1, 136, 200, dtype)
    _, key, value, _ = make_inputs(1, 2, 1, 1, 61, 136, 200, dtype)
    options = {"is_causal": True, "query_offset": 10, "dropout_p": dropout_p, "dropout_seed": torch.tensor([2**40 + 3])}
    packed = gradients(query, key, value, grad_out, cu_seqlens_q=bounds_q, cu_seqlens_k=bounds_k, **options)
    for grad, bounds in zip(packed, (bounds_q, bounds_k, bounds_k), strict=True):
        assert grad[:, :, : bounds[0]].eq(0).all() and grad[:, :, bounds[-1] :].eq(0).all()
    for index in (0, 2) if dropout_p == 0.0 else (0,):  # which weights are dropped hangs on the sequence's number
        rows, columns = slice(*bounds_q[index : index + 2]), slice(*bounds_k[index : index + 2])
        inputs = query[:, :, rows], key[:, :, columns], value[:, :, columns], grad_out[:, :, rows]
        assert_close(inputs, **options)
        for whole, part, place in zip(packed, gradients(*inputs, **options), (rows, columns, columns), strict=True):
            assert torch.equal(whole[:, :, place], part)


@pytest.mark.parametrize("dtype", DTYPES)
def test_what_wide_heads_do_not_see_does_not_matter(dtype):
    """Keys that a mask hides from all queries, and queries from which it hides all keys."""
    query, key, value, grad_out = make_inputs(1, 1, 1, 20, 70, 136, 200, dtype)
    mask, columns, rows = torch.rand(20, 70) > 0.3, torch.arange(70) % 3 == 1, torch.arange(20) % 4 == 2
    mask = (mask & ~columns & ~rows[:, None])[None, None]
    out, lse = torch.ops.gpt4fast.attention_forward(query, key, value, *cpu.settings_of(query, mask))
    expected = gradients(query, key, value, grad_out, mask=mask, saved=(out, lse))
    for hidden, tensors in ((rows, (query, grad_out, out)), (columns, (key, value))):
        for tensor in tensors:
            tensor[:, :, hidden] = math.nan
    got = gradients(query, key, value, grad_out, mask=mask, saved=(out, lse))
    assert all(map(torch.equal, got, expected))


@pytest.mark.parametrize("dtype", DTYPES)
def test_dropout_from_the_middle_of_a_draw_on(dtype):
    """What is drawn for 64 keys serves several tiles, of which the first may lie anywhere in them."""
    options = {"kv_starts": torch.tensor([44]), "dropout_p": 0.4, "dropout_seed": torch.tensor([2**50 + 1])}
    for dim in (64, 128, 256):
        assert_close(make_inputs(1, 1, 1, 20, 70, dim, 8, dtype), **options)


@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("shape", [(1, 6, 2, 37, 70, 16, 16), (1, 1, 1, 260, 260, 64, 64)])
def test_several_tiles_of_several_heads(shape, is_causal):
    """Past more tiles than shared memory has room for."""
    assert_close(make_inputs(*shape, torch.float16), is_causal=is_causal)
    assert_close(make_inputs(*shape, torch.bfloat16), window_left=90, window_right=20)


@pytest.mark.parametrize("dtype", DTYPES)
def test_packed_sequences(dtype):
    cpu.test_packed_sequences((2, 1), dtype)


@pytest.mark.parametrize("dtype", DTYPES)
def test_any_strides(dtype):
    cpu.test_any_strides(dtype)


@pytest.mark.parametrize("axes", [(True, False, True, True), (False, True, False, True), (False, False, True, False)])
def test_gradient_of_a_broadcast_mask(axes):
    sizes = 2, 2, 35, 70
    shape = [size if full else 1 for size, full in zip(sizes, axes, strict=True)]
    for dtype in (torch.float32, torch.bfloat16):
        inputs = make_inputs(2, 2, 1, 35, 70, 12, 8, dtype)
        assert_close(inputs, mask=cpu.sparse_mask(*shape), is_causal=axes[0])
        assert_close(inputs, mask=torch.rand(shape) > 0.3)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", cpu.UNSEEN_CASES)
def test_unseen_keys_and_values_do_not_matter(name, dtype):
    for bad in (math.nan, math.inf):
        cpu.test_unseen_keys_and_values_do_not_matter(name, 40, bad, dtype)


@pytest.mark.parametrize("dtype", DTYPES)
def test_rows_that_see_nothing_have_no_gradient(dtype):
    cpu.test_rows_that_see_nothing_have_no_gradient(dtype)


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_same_bits_again(dtype):
    """In another order of blocks and threads."""
    inputs = make_inputs(2, 4, 2, 70, 90, 16, 16, dtype)
    options = {"mask": torch.randn(1, 4, 70, 90), "dropout_p": 0.3, "dropout_seed": torch.tensor([7])}
    first, *others = (gradients(*inputs, **options) for _ in range(3))
    assert all(all(map(torch.equal, other, first)) for other in others)


def test_sizes_of_zero():
    cpu.test_sizes_of_zero()


@pytest.mark.parametrize(("name", "arguments"), cpu.bad_calls())
def test_bad_direct_calls_raise(name, arguments):
    cpu.test_bad_direct_calls_raise(name, dict(arguments))


def test_wide_heads_and_dropout_without_a_seed_raise():
    with pytest.raises(RuntimeError, match="at most 256"):
        gradients(*make_inputs(1, 1, 1, 3, 3, 8, 257))
    saved = torch.zeros(1, 1, 3, 8), torch.zeros(1, 1, 3)
    with pytest.raises(RuntimeError, match="dropout_seed"):
        gradients(*make_inputs(1, 1, 1, 3, 3, 8, 8), saved=saved, dropout_p=0.5)


def derivatives(attend, tensors, *arguments) -> list[torch.Tensor]:
    """First derivatives, by the kernels and as functions, and second ones."""
    leaves = [t.clone().requires_grad_() for t in tensors]
    torch.manual_seed(5)  # of dropout
    out, lse = attend(*leaves, *arguments)
    loss = out.square().sum() + lse.sum()
    first = torch.autograd.grad(loss, leaves, retain_graph=True)
    again = torch.autograd.grad(loss, leaves, create_graph=True)
    return [*first, *again, *torch.autograd.grad(sum(grad.square().sum() for grad in again), leaves)]


def test_autograd(cuda_ops):
    """What backends/compiled makes of the ops: of a mask that is learned, with dropout and grouped heads."""
    if not isinstance(cuda_ops, torch._ops._OpNamespace):
        pytest.skip("the ops of the emulation; tests/gpu has those of a GPU")
    *tensors, _ = make_inputs(2, 4, 2, 33, 40, 16, 8)
    rules = 0.3, True, 0.3, 9, None, None, (20, -1), 2.0, None, True
    inputs = [*tensors, torch.randn(1, 4, 33, 40)]
    expected = derivatives(reference.attention, inputs, *rules)
    for ours, theirs in zip(derivatives(compiled.attention, inputs, *rules), expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-4)

    packed = [t[0].transpose(0, 1).contiguous() for t in tensors]
    bounds = torch.tensor([0, 10, 33]), torch.tensor([0, 12, 40])
    rules = *bounds, 23, 28, 0.3, True, 0.3, 9, (20, -1), 2.0, None, True
    expected = derivatives(partial(padded_attention, reference.attention), packed, *rules)
    for ours, theirs in zip(derivatives(compiled.attention_varlen, packed, *rules), expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-4)


def test_schema(cuda_ops):
    """Neither writes to an argument nor returns one."""
    if not isinstance(cuda_ops, torch._ops._OpNamespace):
        pytest.skip("the ops of the emulation; tests/gpu has those of a GPU")
    query, key, value, grad_out = make_inputs(1, 2, 1, 5, 7, 8, 8)
    settings = cpu.settings_of(query, torch.randn(1, 1, 5, 7))
    saved = cuda_ops.attention_forward(query, key, value, *settings)
    arguments = grad_out, torch.randn(1, 2, 5), query, key, value, *saved, True, *settings
    torch.library.opcheck(cuda_ops.attention_backward.default, arguments, test_utils="test_schema")
    torch.library.opcheck(cuda_ops.attention_forward.default, (query, key, value, *settings), test_utils="test_schema")
