"""flash-attn's functions against its documented semantics, written out in float64; and the module it stands in for."""

from __future__ import annotations

import inspect
import math
import subprocess
import sys

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from gpt4fast.integrations import flash_attn
from gpt4fast.integrations.flash_attn import bert_padding

QUERY_HEADS, KEY_HEADS, SIZE = 4, 2, 16


def expected(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: torch.Tensor | None = None,
    leftpad: int = 0,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Of one sequence: q (Lq, H, D), k and v (Lk, Hk, D) give (Lq, H, D) and the log-sum-exp (H, Lq), in float64."""
    q, k, v = (t.double() for t in (q, k, v))
    groups = q.shape[1] // k.shape[1]
    k, v = (t.repeat_interleave(groups, 1) for t in (k, v))
    scores = torch.einsum("ihd,jhd->hij", q, k) * (q.shape[-1] ** -0.5 if softmax_scale is None else softmax_scale)
    if softcap:
        scores = softcap * torch.tanh(scores / softcap)
    j = torch.arange(k.shape[0])
    position = torch.arange(q.shape[0])[:, None] + k.shape[0] - q.shape[0]
    left, right = window_size
    visible = j >= leftpad
    if causal:
        visible = visible & (j <= position)
    if left >= 0:
        visible = visible & (j >= position - left)
    if right >= 0:
        visible = visible & (j <= position + right)
    if alibi_slopes is not None:
        scores = scores - alibi_slopes.double()[:, None, None] * (position - j).abs()
    scores = scores.masked_fill(~visible, -math.inf)
    weights = scores.softmax(-1).nan_to_num(0.0)
    lse = scores.logsumexp(-1)
    return torch.einsum("hij,jhd->ihd", weights, v), lse.masked_fill(lse == -math.inf, math.inf)


def assert_close(actual: torch.Tensor, exact: torch.Tensor, tolerance: float = 2e-5) -> None:
    torch.testing.assert_close(actual.double(), exact, rtol=tolerance, atol=tolerance)


@st.composite
def settings(draw, rows: int, columns: int) -> dict:
    sides = st.integers(-1, max(rows, columns))
    slopes = draw(st.sampled_from([None, "shared", "own"]))
    return {
        "causal": draw(st.booleans()),
        "window_size": draw(st.one_of(st.just((-1, -1)), st.tuples(sides, sides))),
        "softcap": draw(st.sampled_from([0.0, 2.0])),
        "softmax_scale": draw(st.sampled_from([None, 0.3])),
        "alibi_slopes": slopes,
    }


def with_slopes(kwargs: dict, batch: int) -> tuple[dict, list[dict]]:
    """The call's arguments, and those of each of its rows."""
    kind = kwargs["alibi_slopes"]
    slopes = None if kind is None else torch.rand((batch, QUERY_HEADS) if kind == "own" else (QUERY_HEADS,))
    rows = [slopes if slopes is None or slopes.dim() == 1 else slopes[b] for b in range(batch)]
    return kwargs | {"alibi_slopes": slopes}, [kwargs | {"alibi_slopes": row} for row in rows]


@given(st.data(), st.integers(1, 3), st.integers(1, 20), st.integers(1, 20), st.integers(0, 2**31))
def test_flash_attn_func(data, batch: int, rows: int, columns: int, seed: int) -> None:
    torch.manual_seed(seed)
    kwargs, rows_kwargs = with_slopes(data.draw(settings(rows, columns)), batch)
    q = torch.randn(batch, rows, QUERY_HEADS, SIZE, requires_grad=True)
    k, v = (torch.randn(batch, columns, KEY_HEADS, SIZE, requires_grad=True) for _ in range(2))
    out, lse, S_dmask = flash_attn.flash_attn_func(q, k, v, **kwargs, return_attn_probs=True)
    exact = [expected(q[b], k[b], v[b], **row) for b, row in enumerate(rows_kwargs)]
    assert_close(out, torch.stack([pair[0] for pair in exact]))
    assert_close(lse, torch.stack([pair[1] for pair in exact]))
    assert S_dmask.numel() == 0 and not lse.requires_grad and out.is_contiguous()
    assert torch.equal(flash_attn.flash_attn_func(q, k, v, **kwargs), out)

    grad = torch.randn_like(out)
    wanted = torch.autograd.grad(torch.stack([pair[0] for pair in exact]), (q, k, v), grad.double())
    for actual, exact_grad in zip(torch.autograd.grad(out, (q, k, v), grad), wanted, strict=True):
        assert_close(actual, exact_grad.double(), 1e-4)


@given(st.data(), st.lists(st.tuples(st.integers(0, 12), st.integers(0, 12)), min_size=1, max_size=4), st.integers(0))
def test_flash_attn_varlen_func(data, lengths: list[tuple[int, int]], seed: int) -> None:
    torch.manual_seed(seed % 2**31)
    rows, columns = zip(*lengths, strict=True)
    kwargs, rows_kwargs = with_slopes(data.draw(settings(max(rows), max(columns))), len(lengths))
    cu_q, cu_k = (torch.tensor([0, *n]).cumsum(0, dtype=torch.int32) for n in (rows, columns))
    q = torch.randn(sum(rows), QUERY_HEADS, SIZE, requires_grad=True)
    k, v = (torch.randn(sum(columns), KEY_HEADS, SIZE, requires_grad=True) for _ in range(2))
    longest = max(rows), max(columns)
    call = (cu_q, cu_k, *longest)
    out, lse, _ = flash_attn.flash_attn_varlen_func(q, k, v, *call, **kwargs, return_attn_probs=True)
    parts = zip(q.split(rows), k.split(columns), v.split(columns), rows_kwargs, strict=True)
    exact = [expected(a, b, c, **row) for a, b, c, row in parts]
    assert_close(out, torch.cat([pair[0] for pair in exact]))
    assert_close(lse, torch.cat([pair[1] for pair in exact], -1))
    kv = torch.stack((k, v), 1)
    assert torch.equal(flash_attn.flash_attn_varlen_kvpacked_func(q, kv, *call, **kwargs), out)

    grad = torch.randn_like(out)
    wanted = torch.autograd.grad(torch.cat([pair[0] for pair in exact]), (q, k, v), grad.double())
    for actual, exact_grad in zip(torch.autograd.grad(out, (q, k, v), grad), wanted, strict=True):
        assert_close(actual, exact_grad.double(), 1e-4)


def test_packed_functions() -> None:
    """Positional arguments included: dropout, scale, causal, window."""
    qkv = torch.randn(2, 7, 3, QUERY_HEADS, SIZE, requires_grad=True)
    settings = 0.0, 0.3, True, (2, 0), 1.5
    exact = flash_attn.flash_attn_func(*qkv.unbind(2), *settings)
    assert torch.equal(flash_attn.flash_attn_qkvpacked_func(qkv, *settings), exact)
    assert torch.equal(flash_attn.flash_attn_kvpacked_func(qkv[:, :, 0], qkv[:, :, 1:], *settings), exact)
    cu = torch.tensor([0, 7, 14], dtype=torch.int32)
    packed = flash_attn.flash_attn_varlen_qkvpacked_func(qkv.flatten(0, 1), cu, 7, *settings)
    torch.testing.assert_close(packed.unflatten(0, (2, 7)), exact)
    (grad,) = torch.autograd.grad(packed.sum(), qkv)
    (exact_grad,) = torch.autograd.grad(exact.sum(), qkv)
    torch.testing.assert_close(grad, exact_grad)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_dtypes(dtype: torch.dtype) -> None:
    q, k, v = (torch.randn(2, 33, heads, 64, dtype=dtype) for heads in (QUERY_HEADS, KEY_HEADS, KEY_HEADS))
    out, lse, _ = flash_attn.flash_attn_func(q, k, v, causal=True, return_attn_probs=True)
    assert out.dtype == dtype and lse.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    exact = torch.stack([expected(q[b], k[b], v[b], causal=True)[0] for b in range(2)])
    assert (out - exact).abs().max() <= 4 * torch.finfo(dtype).eps * exact.abs().max()


def test_the_mask_is_aligned_to_the_bottom_right_corner() -> None:
    """The two pictures in flash-attn's documentation."""
    for rows, columns, picture in (
        (2, 5, [[1, 1, 1, 1, 0], [1, 1, 1, 1, 1]]),
        (5, 2, [[0, 0], [0, 0], [0, 0], [1, 0], [1, 1]]),
    ):
        q, k = torch.zeros(1, rows, 1, 8), torch.zeros(1, columns, 1, 8)
        weights = flash_attn.flash_attn_func(q, k, torch.eye(columns)[None, :, None], causal=True)[0, :, 0]
        assert torch.equal(weights > 0, torch.tensor(picture) > 0)


@pytest.mark.parametrize("packed", [False, True])
def test_dropout_and_probabilities(packed: bool) -> None:
    q, k, v = (torch.randn(2, 40, heads, SIZE) for heads in (QUERY_HEADS, KEY_HEADS, KEY_HEADS))
    if packed:
        cu = torch.tensor([0, 40, 80], dtype=torch.int32)
        flat = (t.flatten(0, 1) for t in (q, k, v))
        call = {"dropout_p": 0.25, "causal": True, "return_attn_probs": True}
        out, lse, S_dmask = flash_attn.flash_attn_varlen_func(*flat, cu, cu, 40, 40, **call)
        out, lse = out.unflatten(0, (2, 40)), lse.unflatten(1, (2, 40)).transpose(0, 1)
    else:
        out, lse, S_dmask = flash_attn.flash_attn_func(q, k, v, 0.25, causal=True, return_attn_probs=True)
    assert S_dmask.shape == (2, QUERY_HEADS, 40, 40)
    kept = S_dmask.clamp(min=0) / 0.75
    assert_close(out, torch.einsum("bhij,bjhd->bihd", kept.double(), v.double().repeat_interleave(2, 2)))
    without, exact_lse, _ = flash_attn.flash_attn_func(q, k, v, causal=True, return_attn_probs=True)
    weights = S_dmask.abs().double()
    assert_close(without, torch.einsum("bhij,bjhd->bihd", weights, v.double().repeat_interleave(2, 2)))
    assert_close(lse, exact_lse.double())
    dropped = (S_dmask < 0).sum() / (S_dmask != 0).sum()
    assert 0.2 < dropped < 0.3
    assert not torch.equal(without, out)


# With a cache


@st.composite
def cached_calls(draw) -> dict:
    batch, rows = draw(st.integers(1, 3)), draw(st.integers(1, 4))
    paged = draw(st.booleans())
    new = draw(st.sampled_from([None, rows, rows, 1]))
    capacity = 4 * draw(st.integers(2, 6))
    most = capacity - (new or 0)
    lengths = draw(st.one_of(st.integers(0, most), st.lists(st.integers(0, most), min_size=batch, max_size=batch)))
    if new is None and draw(st.booleans()):
        lengths = None
    listed = [capacity if lengths is None else lengths] * batch if not isinstance(lengths, list) else lengths
    leftpad = [draw(st.integers(0, n)) for n in listed] if draw(st.booleans()) else None
    return {
        "batch": batch,
        "rows": rows,
        "new": new,
        "capacity": capacity,
        "lengths": lengths,
        "listed": listed,
        "leftpad": leftpad,
        "blocks": "paged" if paged else draw(st.sampled_from([None, "rows"])),
        "rotary": new is not None and draw(st.booleans()),
        "interleaved": draw(st.booleans()),
        "settings": draw(settings(rows, capacity)),
        "seed": draw(st.integers(0, 2**31)),
    }


def turned(x: torch.Tensor, places: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, interleaved: bool):
    """(L, H, D), its first 2 · half channels turned by the angles at places (L,)."""
    half = cos.shape[1]
    cos, sin = cos[places][:, None].double(), sin[places][:, None].double()
    x = x.double()
    first, second = (
        (x[..., 0 : 2 * half : 2], x[..., 1 : 2 * half : 2]) if interleaved else x[..., : 2 * half].chunk(2, -1)
    )
    pair = first * cos - second * sin, first * sin + second * cos
    both = torch.stack(pair, -1).flatten(-2) if interleaved else torch.cat(pair, -1)
    return torch.cat((both, x[..., 2 * half :]), -1)


@given(cached_calls())
def test_flash_attn_with_kvcache(call: dict) -> None:
    torch.manual_seed(call["seed"])
    batch, rows, new, capacity = (call[name] for name in ("batch", "rows", "new", "capacity"))
    kwargs, rows_kwargs = with_slopes(call["settings"], batch)
    q = torch.randn(batch, rows, QUERY_HEADS, SIZE)
    fresh = [None, None] if new is None else [torch.randn(batch, new, KEY_HEADS, SIZE) for _ in range(2)]
    caches = [torch.randn(batch, capacity, KEY_HEADS, SIZE) for _ in range(2)]  # as each row sees them
    table, stored, where = None, [cache.clone() for cache in caches], {}
    if call["blocks"] == "paged":
        table = torch.randperm(batch * capacity // 4 + 2)[: batch * capacity // 4].view(batch, -1).int()
        stored = [torch.randn(table.numel() + 2, 4, KEY_HEADS, SIZE) for _ in range(2)]
        for blocks, cache in zip(stored, caches, strict=True):
            blocks[table.flatten().long()] = cache.view(-1, 4, KEY_HEADS, SIZE)
        given = table.clone()
        for b, length in enumerate(call["listed"]):
            given[b, -(-(length + (new or 0)) // 4) :] = -1  # blocks that are not needed
        where = {"block_table": given}
    elif call["blocks"] == "rows":
        index = torch.randperm(batch + 2)[:batch].int()
        stored = [torch.randn(batch + 2, capacity, KEY_HEADS, SIZE) for _ in range(2)]
        for blocks, cache in zip(stored, caches, strict=True):
            blocks[index.long()] = cache
        where = {"cache_batch_idx": index}
    others = [blocks.clone() for blocks in stored]
    angles = torch.rand(capacity + 8, 4)
    rotary = (angles.cos(), angles.sin()) if call["rotary"] else (None, None)
    lengths = torch.tensor(call["lengths"]).int() if isinstance(call["lengths"], list) else call["lengths"]
    leftpad = None if call["leftpad"] is None else torch.tensor(call["leftpad"]).int()

    out, lse = flash_attn.flash_attn_with_kvcache(
        q, *stored, *fresh, *rotary, lengths, cache_leftpad=leftpad, rotary_interleaved=call["interleaved"], **where,
        **kwargs, return_softmax_lse=True,
    )  # fmt: skip
    for b in range(batch):
        length, query = call["listed"][b], q[b]
        if new is not None:
            places, key = torch.arange(new) + length, fresh[0][b]
            if call["rotary"]:
                in_order = kwargs["causal"] or max(kwargs["window_size"]) >= 0
                query = turned(query, length + torch.arange(rows) * in_order, *rotary, call["interleaved"])
                key = turned(key, places, *rotary, call["interleaved"])
            caches[0][b, places], caches[1][b, places] = key.float(), fresh[1][b]
        total = length + (new or 0)
        pad = 0 if call["leftpad"] is None else call["leftpad"][b]
        exact, exact_lse = expected(query, caches[0][b, :total], caches[1][b, :total], **rows_kwargs[b], leftpad=pad)
        assert_close(out[b], exact)
        assert_close(lse[b], exact_lse)
    for blocks, before, cache in zip(stored, others, caches, strict=True):  # written in place, and nowhere else
        if call["blocks"] == "paged":
            before[table.flatten().long()] = cache.view(-1, 4, KEY_HEADS, SIZE)
        elif call["blocks"] == "rows":
            before[index.long()] = cache
        else:
            before = cache
        torch.testing.assert_close(blocks, before)


def test_varlen_with_a_block_table() -> None:
    lengths_q, lengths_k = [3, 1], [9, 6]
    cu_q, cu_k = (torch.tensor([0, *n]).cumsum(0, dtype=torch.int32) for n in (lengths_q, lengths_k))
    q, table = torch.randn(4, QUERY_HEADS, SIZE), torch.tensor([[3, 0, 4], [1, 5, -1]], dtype=torch.int32)
    k, v = (torch.randn(6, 4, KEY_HEADS, SIZE) for _ in range(2))
    out = flash_attn.flash_attn_varlen_func(q, k, v, cu_q, cu_k, 3, 9, causal=True, block_table=table)
    for b, part in enumerate(out.split(lengths_q)):
        keys, values = (t[table[b]].flatten(0, 1)[: lengths_k[b]] for t in (k, v))
        assert_close(part, expected(q.split(lengths_q)[b], keys, values, causal=True)[0])


# bert_padding


def test_unpad_and_pad() -> None:
    states = torch.randn(3, 5, 2, 4, requires_grad=True)
    mask = torch.tensor([[1, 1, 0, 0, 0], [0, 1, 1, 1, 1], [1, 1, 1, 1, 1]])
    rows, indices, cu_seqlens, longest, used = bert_padding.unpad_input(states, mask)
    assert torch.equal(rows, states[mask.bool()])
    assert indices.tolist() == mask.flatten().nonzero().flatten().tolist()
    assert cu_seqlens.tolist() == [0, 2, 6, 11] and cu_seqlens.dtype == torch.int32
    assert longest == 5 and type(longest) is int and used.tolist() == [2, 4, 5]
    padded = bert_padding.pad_input(rows, indices.int(), 3, 5)
    assert torch.equal(padded, states * mask[..., None, None])
    (grad,) = torch.autograd.grad(padded.sum(), states)
    assert torch.equal(grad, mask[..., None, None].expand_as(states).float())
    unused = torch.tensor([[0, 0, 1, 0, 0]] + [[0] * 5] * 2)
    rows, _, cu_seqlens, _, used = bert_padding.unpad_input(states, mask, unused)
    assert cu_seqlens.tolist() == [0, 3, 7, 12] and used.tolist() == [2, 4, 5] and rows.shape == (12, 2, 4)


# Errors


@pytest.mark.parametrize(
    ("function", "shapes", "message"),
    [
        ("flash_attn_func", [(5, 4, 8)] * 3, r"q must have shape \(batch, length, heads, head_dim\), but is a tensor"),
        ("flash_attn_func", [(2, 5, 4, 8), (2, 5, 3, 8), (2, 5, 3, 8)], "number of heads that divides query's 4"),
        ("flash_attn_func", [(2, 5, 4, 8), (3, 5, 4, 8), (3, 5, 4, 8)], "must have query's batch dimensions"),
        ("flash_attn_qkvpacked_func", [(2, 5, 2, 4, 8)], "qkv must have 5 dimensions .*3, heads, head_dim"),
        ("flash_attn_kvpacked_func", [(2, 5, 4, 8), (2, 5, 3, 4, 8)], "kv must have 5 dimensions .*2, heads, head_dim"),
    ],
)
def test_wrong_shapes(function: str, shapes: list[tuple], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        getattr(flash_attn, function)(*(torch.randn(shape) for shape in shapes))


def test_wrong_calls_with_a_cache() -> None:
    q, cache, angles = torch.randn(2, 1, 4, 8), torch.zeros(2, 6, 4, 8), torch.zeros(6, 4)
    for kwargs, message in (
        ({"k": q}, "k and v must be given together"),
        ({"k": q, "v": q}, "cache_seqlens must be given with k and v"),
        ({"rotary_cos": angles}, "so must rotary_cos and rotary_sin"),
        ({"rotary_cos": angles, "rotary_sin": angles}, "k and v must be given with rotary_cos"),
        ({"k": q, "v": q, "cache_seqlens": 6}, "kv_lengths must fit the cache"),
        ({"k": q.repeat(1, 2, 1, 1), "v": q.repeat(1, 2, 1, 1), "cache_seqlens": 5}, "must leave room for 2 in 6"),
        ({"cache_seqlens": 7, "block_table": torch.tensor([[0, 1], [1, -1]])}, r"a block for each of \[7, 7\] entries"),
        ({"cache_batch_idx": torch.zeros(2).int(), "block_table": torch.zeros(2, 1).int()}, "must be None with block"),
    ):
        with pytest.raises(ValueError, match=message):
            flash_attn.flash_attn_with_kvcache(q, cache, cache, **kwargs)
    assert not cache.any()


# The module flash_attn


def run(code: str) -> str:
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return result.stdout


def test_install() -> None:
    code = """
import torch
from gpt4fast.integrations import flash_attn as ours
ours_pad_input = ours.bert_padding.pad_input
ours.install()
ours.install()
import flash_attn, flash_attn.bert_padding, flash_attn.flash_attn_interface
from flash_attn import flash_attn_func
from flash_attn.flash_attn_interface import flash_attn_varlen_func, flash_attn_with_kvcache
from flash_attn.bert_padding import index_first_axis, pad_input, unpad_input
assert flash_attn is ours and pad_input is ours_pad_input
q = torch.randn(1, 3, 2, 8)
print(flash_attn.__version__, tuple(flash_attn_func(q, q, q).shape))
"""
    assert run(code) == "2.8.4+gpt4fast (1, 3, 2, 8)\n"


def test_install_beside_the_real_one(tmp_path) -> None:
    (tmp_path / "flash_attn").mkdir()
    (tmp_path / "flash_attn" / "__init__.py").write_text("")
    code = f"""
import sys
sys.path.insert(0, {str(tmp_path)!r})
from gpt4fast.integrations import flash_attn
try:
    flash_attn.install()
except RuntimeError as error:
    print(error)
import flash_attn
print(flash_attn.__file__)
"""
    message, file = run(code).splitlines()
    assert message.startswith("install() stands in for a missing flash-attn only") and str(tmp_path) in file


def test_signatures() -> None:
    """What callers look for by name (transformers does), in flash-attn's order."""
    dense = ["dropout_p", "softmax_scale", "causal", "window_size", "softcap", "alibi_slopes", "deterministic"]
    dense.append("return_attn_probs")
    packed = ["cu_seqlens_q", "cu_seqlens_k", "max_seqlen_q", "max_seqlen_k"]
    cached = """q k_cache v_cache k v rotary_cos rotary_sin cache_seqlens cache_batch_idx cache_leftpad block_table
    softmax_scale causal window_size softcap rotary_interleaved alibi_slopes num_splits return_softmax_lse"""
    names = {name: list(inspect.signature(getattr(flash_attn, name)).parameters) for name in flash_attn.__all__}
    assert names["flash_attn_func"] == ["q", "k", "v", *dense]
    assert names["flash_attn_varlen_func"] == ["q", "k", "v", *packed, *dense, "block_table"]
    assert names["flash_attn_with_kvcache"] == cached.split()


def test_transformers_flash_attention_2(monkeypatch) -> None:
    """transformers wants a GPU for flash_attention_2. With that check lifted its models run on these functions: padded
    batches by unpad_input and flash_attn_varlen_func, windows and softcap by their arguments."""
    transformers = pytest.importorskip("transformers", minversion="5.23")
    from transformers import modeling_flash_attention_utils as utils

    monkeypatch.setattr(transformers.PreTrainedModel, "_flash_attn_can_dispatch", lambda *args, **kwargs: True)
    monkeypatch.setattr(utils, "is_flash_attn_2_available", lambda *args, **kwargs: True)
    matrix = utils.FLASH_ATTENTION_COMPATIBILITY_MATRIX
    monkeypatch.setitem(matrix, 2, matrix[2] | {"general_availability_check": lambda *args, **kwargs: True})
    monkeypatch.setitem(sys.modules, "flash_attn", flash_attn)
    monkeypatch.setitem(sys.modules, "flash_attn.bert_padding", bert_padding)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = transformers.Gemma2Config(
        **sizes, num_key_value_heads=2, head_dim=8, vocab_size=99, sliding_window=4, attn_logit_softcapping=3.0
    )
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    ids, mask = torch.randint(3, 99, (2, 11)), torch.ones(2, 11, dtype=torch.long)
    mask[0, :4] = 0
    for kwargs in ({}, {"attention_mask": mask}):
        results = []
        for implementation in ("eager", "flash_attention_2"):
            model.set_attn_implementation(implementation)
            with torch.no_grad():
                logits = model(ids, **kwargs).logits[mask.bool()]
            tokens = model.generate(ids, max_new_tokens=5, do_sample=False, **kwargs)
            results.append((logits, tokens))
        torch.testing.assert_close(results[1][0], results[0][0], rtol=1e-4, atol=1e-4)
        assert torch.equal(results[1][1], results[0][1])
