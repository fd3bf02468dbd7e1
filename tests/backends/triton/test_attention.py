"""The Triton kernels of attention, by Triton's interpreter (or on a GPU, where it is off): values and gradients
against float64."""

from __future__ import annotations

import pytest
import torch

import gpt4fast
from gpt4fast.backends.reference import attention as reference_attention
from gpt4fast.backends.triton import attention as triton_attention
from gpt4fast.backends.triton import attention_config as config
from gpt4fast.backends.triton import attention_launch, availability
from gpt4fast.ops.attention import prepare
from gpt4fast.ops.attention_varlen import prepare as prepare_varlen

pytest.importorskip("triton")
if not availability.INTERPRETED and not torch.cuda.is_available():
    pytest.skip("neither a GPU nor TRITON_INTERPRET=1", allow_module_level=True)
DEVICE = "cpu" if availability.INTERPRETED else "cuda"
DEFAULTS = {
    "attn_mask": None, "dropout_p": 0.0, "is_causal": False, "scale": None, "query_offset": 0, "kv_lengths": None,
    "kv_starts": None, "window": None, "softcap": 0.0, "alibi_slopes": None, "return_lse": True,
}  # fmt: skip
# name: (batch, query heads, heads, queries, keys, D, Dv), options; masks are made anew in each test
CASES = {
    "grouped heads": ((1, 2, 1, 33, 40, 16, 16), {}),
    "causal, widths that are no powers of two": ((1, 2, 2, 40, 40, 20, 12), {"is_causal": True}),
    "window": ((2, 4, 2, 17, 50, 33, 40), {"window": (9, 3), "query_offset": 20}),
    "offsets of rows": ((2, 2, 2, 9, 33, 8, 8), {"is_causal": True, "query_offset": lambda: torch.tensor([3, 24])}),
    "float mask and softcap": (
        (1, 2, 1, 30, 45, 8, 8),
        {"attn_mask": lambda: torch.randn(1, 1, 30, 45), "softcap": 5.0},
    ),
    "mask of one row": ((2, 2, 1, 20, 33, 8, 8), {"attn_mask": lambda: torch.randn(2, 1, 1, 33), "scale": 0.7}),
    "boolean mask and slopes": (
        (1, 2, 1, 30, 45, 8, 8),
        {"attn_mask": lambda: torch.rand(1, 2, 1, 45) < 0.7, "alibi_slopes": lambda: torch.rand(2)},
    ),
    "bounds, and a batch that sees nothing": (
        (2, 2, 2, 20, 30, 16, 16),
        {"kv_lengths": lambda: torch.tensor([0, 17]), "kv_starts": lambda: torch.tensor([0, 5])},
    ),
    "one query": ((2, 4, 2, 1, 70, 32, 32), {}),
}


def run(function, tensors, options, grads, dtype):
    """Output, log-sum-exp, and gradients of query, key, value and a float mask."""
    inputs = [t.detach().to(dtype).requires_grad_() for t in tensors]
    mask = options["attn_mask"]
    if mask is not None and mask.dtype != torch.bool:
        mask = mask.to(dtype).requires_grad_()
    call, _ = prepare(*inputs, *(options | {"attn_mask": mask}).values())
    out, lse = function(**call)
    wanted = [*inputs, *([mask] if mask is not None and mask.requires_grad else [])]
    results = out, torch.where(lse.isfinite(), lse, 0)
    return [
        out.detach(),
        lse.detach(),
        *torch.autograd.grad(results, wanted, [g.to(r.dtype) for g, r in zip(grads, results, strict=True)]),
    ]


def operands(shape, dtype):
    batch, heads, kv_heads, queries, keys, dim, value_dim = shape
    sizes = (batch, heads, queries, dim), (batch, kv_heads, keys, dim), (batch, kv_heads, keys, value_dim)
    grads = torch.randn(batch, heads, queries, value_dim), torch.randn(batch, heads, queries)
    return [torch.randn(size).to(dtype).to(DEVICE) for size in sizes], [g.to(DEVICE) for g in grads]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("case", CASES)
def test_values_and_gradients(case, dtype):
    """At most twice as far from float64 as the reference in the same dtype."""
    shape, options = CASES[case]
    made = {name: value().to(DEVICE) if callable(value) else value for name, value in options.items()}
    tensors, grads = operands(shape, dtype)
    ours, theirs, exact = (
        run(function, tensors, DEFAULTS | made, grads, precision)
        for function, precision in (
            (triton_attention.attention, dtype),
            (reference_attention.attention, dtype),
            (reference_attention.attention, torch.float64),
        )
    )
    for name, got, other, true in zip(
        ("out", "lse", "query", "key", "value", "mask"), ours, theirs, exact, strict=False
    ):
        assert torch.equal(got.isfinite(), true.isfinite()), name
        got, other, true = (torch.where(true.isfinite(), t.double(), 0) for t in (got, other, true))
        eps = torch.finfo(torch.float32 if name == "lse" else dtype).eps
        roundings = 4 if DEVICE == "cuda" else 2  # a GPU's exp2 and log2 are off by two units themselves
        assert (got - true).norm() <= 2 * (other - true).norm() + roundings * eps * true.norm(), name


@pytest.mark.parametrize("case", CASES)
def test_descriptors_fetch_the_same(case, monkeypatch):
    """Bit by bit what pointers fetch: whole tiles, rows narrower than a tile, and heads that are shared."""
    shape, options = CASES[case]
    made = {name: value().to(DEVICE) if callable(value) else value for name, value in options.items()}
    shape = *shape[:5], *(-(-width // 8) * 8 for width in shape[5:])  # rows of whole 16 bytes
    (query, key, value), _ = operands(shape, torch.float16)
    call, _ = prepare(query, key, value, *(DEFAULTS | made).values())
    assert not any(described(monkeypatch, 0, call)[1])
    results, loads = described(monkeypatch, 1, call)
    for got, expected in zip(results, described(monkeypatch, 0, call)[0], strict=True):
        assert torch.equal(got, expected)
    assert set(loads) == {"Key", "Value"}


def described(monkeypatch, choice, call, function=triton_attention.attention):
    """Results with descriptors (1) or pointers (0), and what there were descriptors of."""
    made, original = [], attention_launch.descriptor

    def descriptor(tensor, *block):
        made.append("Key" if tensor.data_ptr() == call["key"].data_ptr() else "Value")
        return original(tensor, *block)

    monkeypatch.setattr(attention_launch, "descriptor", descriptor)
    monkeypatch.setattr(
        attention_launch.tuning, "fastest", lambda kernel, shapes, tile, *_: {**tile, "DESCRIPTORS": choice}
    )
    results = function(**call)
    monkeypatch.undo()
    return results, made


def test_descriptors_of_packed_sequences(monkeypatch):
    """A sequence's tiles begin anywhere among the rows."""
    starts = torch.tensor([0, 40, 65, 135], device=DEVICE)
    query, key, value = (torch.randn(135, heads, 24, device=DEVICE) for heads in (4, 2, 2))
    call = prepare_varlen(
        query, key, value, starts, starts, 70, 70, 0.0, True, None, 0, None, 0.0, None, True
    )  # fmt: skip
    results, loads = described(monkeypatch, 1, call, triton_attention.attention_varlen)
    expected, _ = described(monkeypatch, 0, call, triton_attention.attention_varlen)
    assert set(loads) == {"Key", "Value"} and all(map(torch.equal, results, expected))


def test_what_descriptors_take():
    """Rows of whole 16 bytes on Hopper and after; no head that is expanded."""
    matrices = torch.empty(2, 3, 5, 24, dtype=torch.float16, device=DEVICE)
    assert config.takes_descriptor(matrices, (9, 0)) and config.takes_descriptor(matrices, (10, 0))
    assert config.takes_descriptor(matrices.transpose(1, 2), (9, 0))
    assert not config.takes_descriptor(matrices, (8, 9))
    assert not config.takes_descriptor(matrices[:, :, :0], (9, 0))
    for odd in (matrices[..., 1:], matrices[:, :1].expand(2, 3, 5, 24), matrices.transpose(2, 3), matrices[..., ::2]):
        assert not config.takes_descriptor(odd, (9, 0))
    assert not config.takes_descriptor(torch.empty(2, 3, 5, 20, dtype=torch.float16), (9, 0))


def test_a_hidden_nan_stays_hidden():
    (query, key, value), _ = operands((1, 2, 2, 20, 40, 16, 16), torch.float32)
    expected = gpt4fast.attention(query, key, value, is_causal=True, impl="triton")
    key[:, :, 20:], value[:, :, 20:] = float("nan"), float("nan")
    assert torch.equal(gpt4fast.attention(query, key, value, is_causal=True, impl="triton"), expected)


def test_strides_and_layout():
    (query, key, value), _ = operands((2, 3, 3, 20, 40, 16, 16), torch.float32)
    expected = gpt4fast.attention(query, key, value, impl="triton")
    moved = [t.transpose(1, 2).contiguous().transpose(1, 2) for t in (query, key, value)]
    torch.testing.assert_close(gpt4fast.attention(*moved, impl="triton"), expected)
    expanded = [query, key[:, :1].expand_as(key), value[:, :1].expand_as(value)]
    torch.testing.assert_close(
        gpt4fast.attention(*expanded, impl="triton"),
        gpt4fast.attention(query, key[:, :1].repeat(1, 3, 1, 1), value[:, :1].repeat(1, 3, 1, 1), impl="reference"),
    )


def test_second_derivatives():
    tensors, _ = operands((1, 2, 1, 5, 7, 8, 8), torch.float32)
    results = []
    for impl in ("triton", "reference"):
        inputs = [(t / 2).requires_grad_() for t in tensors]
        out = gpt4fast.attention(*inputs, impl=impl)
        first = torch.autograd.grad(out.square().sum(), inputs, create_graph=True)
        results.append([*first, *torch.autograd.grad(sum(g.square().sum() for g in first), inputs)])
    for got, expected in zip(*results, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)


def test_dropout_drops_that_share_and_the_same_weights_in_backward():
    (query, key, _), _ = operands((1, 2, 2, 32, 48, 16, 16), torch.float32)
    value = torch.eye(48, device=DEVICE).expand(1, 2, 48, 48).clone().requires_grad_()  # the output is the weights
    torch.manual_seed(3)
    weights = gpt4fast.attention(query, key, value, dropout_p=0.3, impl="triton")
    assert 0.2 < (weights == 0).float().mean() < 0.4
    (grad,) = torch.autograd.grad(weights.sum(), value)
    torch.testing.assert_close(grad[..., 0], weights.detach().sum(2), rtol=1e-4, atol=1e-5)
    torch.manual_seed(3)
    assert torch.equal(gpt4fast.attention(query, key, value, dropout_p=0.3, impl="triton"), weights)


def test_no_rows_and_no_keys():
    for queries, keys in ((0, 5), (5, 0)):
        (query, key, value), _ = operands((1, 2, 2, queries, keys, 8, 8), torch.float32)
        out = gpt4fast.attention(query, key, value, impl="triton")
        assert out.shape == query.shape and not out.any()


def test_what_it_refuses():
    (query, key, value), _ = operands((1, 1, 1, 3, 3, 8, 8), torch.float32)
    for tensors, options, reason in (
        ([t.double() for t in (query, key, value)], {}, "float64"),
        ([torch.randn(1, 1, 3, 300, device=DEVICE)] * 3, {}, "at most 256"),
        ([query, key, value], {"attn_mask": torch.zeros(3, 3, dtype=torch.float64, device=DEVICE)}, "float64 mask"),
        ([query, key, value], {"alibi_slopes": torch.ones(1, device=DEVICE, requires_grad=True)}, "alibi_slopes"),
    ):
        with pytest.raises(RuntimeError, match=reason):
            gpt4fast.attention(*tensors, **options, impl="triton")


PACKED = {
    "plain": {},
    "causal, bottom right": {"is_causal": True, "query_offset": "ends"},
    "window and softcap": {"window": (9, 4), "softcap": 4.0, "query_offset": 3},
    "slopes": {"is_causal": True, "alibi_slopes": torch.rand(4)},
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", PACKED)
def test_packed_sequences(name, dtype):
    """Values, log-sum-exp and gradients as the reference's in float64, with sequences of no queries and of no keys."""
    lengths_q, lengths_k = torch.tensor([20, 0, 1, 45]), torch.tensor([33, 7, 0, 40])
    starts = [torch.nn.functional.pad(n.cumsum(0), (1, 0)).to(DEVICE) for n in (lengths_q, lengths_k)]
    longest = int(lengths_q.max()), int(lengths_k.max()) + 3
    options = dict(PACKED[name])
    if options.get("query_offset") == "ends":
        options["query_offset"] = (lengths_k - lengths_q).to(DEVICE)
    if "alibi_slopes" in options:
        options["alibi_slopes"] = options["alibi_slopes"].to(DEVICE)
    sizes = (66, 4, 24), (80, 2, 24), (80, 2, 16)
    tensors = [torch.randn(size).to(dtype).to(DEVICE) for size in sizes]
    grads = torch.randn(66, 4, 16).to(DEVICE), torch.randn(66, 4).to(DEVICE)

    def results(dtype, impl):
        inputs = [t.detach().to(dtype).requires_grad_() for t in tensors]
        out, lse = gpt4fast.attention_varlen(*inputs, *starts, *longest, **options, return_lse=True, impl=impl)
        seen = torch.where(lse.isfinite(), lse, 0)
        given = [g.to(r.dtype) for g, r in zip(grads, (out, seen), strict=True)]
        return [out.detach(), seen.detach(), *torch.autograd.grad((out, seen), inputs, given)]

    exact, plain = results(torch.float64, "reference"), results(dtype, "reference")
    for ours, other, true in zip(results(dtype, "triton"), plain, exact, strict=True):
        allowed = 2 * (other.double() - true).norm() + 3 * torch.finfo(dtype).eps * true.norm()
        assert (ours.double() - true).norm() <= allowed


def test_packed_sequences_have_no_row_of_another():
    """NaN in one sequence stays there, and dropout drops what it drops in a padded batch."""
    query = torch.randn(3 * 20, 2, 16, device=DEVICE)
    starts = torch.tensor([0, 20, 40, 60], device=DEVICE)
    spoiled = query.clone()
    spoiled[20:40] = float("nan")
    out = gpt4fast.attention_varlen(query, spoiled, spoiled, starts, starts, 20, 20, impl="triton")
    assert out[:20].isfinite().all() and out[40:].isfinite().all() and out[20:40].isnan().all()
    padded = query.view(3, 20, 2, 16).transpose(1, 2)
    torch.manual_seed(5)
    ours = gpt4fast.attention_varlen(query, query, query, starts, starts, 20, 20, 0.4, impl="triton")
    torch.manual_seed(5)
    expected = gpt4fast.attention(padded, padded, padded, dropout_p=0.4, impl="triton")
    torch.testing.assert_close(ours, expected.transpose(1, 2).flatten(0, 1))
