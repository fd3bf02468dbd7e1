"""Every bad call raises an error that names the argument, and leaves the process alive."""

from __future__ import annotations

import pytest
import torch

import gpt4fast

t = torch.zeros
GOOD_ATTENTION = {"query": t(2, 4, 3, 8), "key": t(2, 2, 5, 8), "value": t(2, 2, 5, 6)}
BAD_ATTENTION = [
    ("query", {"query": [1.0]}),
    ("query", {"query": t(2, 4, 3, 8, dtype=torch.int64)}),
    ("query", {"query": t(2, 4, 3, 8, dtype=torch.complex64)}),
    ("query", {"query": t(2, 4, 3, 8).to_sparse()}),
    ("query", {"query": t(8), "key": t(8), "value": t(8)}),
    ("key", {"key": None}),
    ("key", {"key": t(2, 2, 5, 9)}),
    ("key", {"key": t(2, 3, 5, 8), "value": t(2, 3, 5, 8)}),
    ("key", {"key": t(2, 0, 5, 8), "value": t(2, 0, 5, 8)}),
    ("key", {"key": t(3, 2, 5, 8)}),
    ("key", {"key": t(2, 5, 8)}),
    ("key", {"key": t(2, 2, 5, 8, dtype=torch.float64)}),
    ("key", {"key": t(2, 2, 5, 8, device="meta")}),
    ("value", {"value": t(2, 2, 4, 6)}),
    ("value", {"value": t(2, 1, 5, 6)}),
    ("value", {"value": t(2, 2, 5, 6, dtype=torch.bfloat16)}),
    ("attn_mask", {"attn_mask": t(3, 4)}),
    ("attn_mask", {"attn_mask": t(2, 4, 3, 5, dtype=torch.int32)}),
    ("attn_mask", {"attn_mask": t(1, 1, 2, 4, 3, 5)}),
    ("attn_mask", {"attn_mask": "causal"}),
    ("attn_mask", {"attn_mask": t(3, 5, device="meta")}),
    ("dropout_p", {"dropout_p": 1.5}),
    ("dropout_p", {"dropout_p": -0.1}),
    ("dropout_p", {"dropout_p": float("nan")}),
    ("dropout_p", {"dropout_p": "0.1"}),
    ("is_causal", {"is_causal": 1}),
    ("is_causal", {"is_causal": None}),
    ("scale", {"scale": float("inf")}),
    ("scale", {"scale": "big"}),
    ("query_offset", {"query_offset": 1.5}),
    ("query_offset", {"query_offset": 2**40}),
    ("query_offset", {"query_offset": torch.tensor([1, 2, 3])}),
    ("query_offset", {"query_offset": torch.tensor([1.0, 2.0])}),
    ("kv_lengths", {"kv_lengths": 5}),
    ("kv_lengths", {"kv_lengths": torch.tensor(5)}),
    ("kv_lengths", {"kv_lengths": torch.tensor([5, 5, 5])}),
    ("kv_lengths", {"kv_lengths": torch.tensor([True, False])}),
    ("kv_starts", {"kv_starts": torch.tensor([0.0, 1.0])}),
    ("window", {"window": 3}),
    ("window", {"window": (1, 2, 3)}),
    ("window", {"window": (-2, 0)}),
    ("window", {"window": (1.5, 0)}),
    ("softcap", {"softcap": -1.0}),
    ("softcap", {"softcap": float("inf")}),
    ("alibi_slopes", {"alibi_slopes": t(3)}),
    ("alibi_slopes", {"alibi_slopes": t(4, dtype=torch.int64)}),
    ("return_lse", {"return_lse": "yes"}),
    ("impl", {"impl": "cudnn"}),
    ("impl", {"impl": 3}),
]

GOOD_CONV = {"input": t(2, 4, 5, 5), "weight": t(4, 3, 2, 2)}
BAD_CONV = [
    ("input", {"input": t(4, 5)}),
    ("input", {"input": t(2, 4, 5, 5, 5)}),
    ("input", {"input": t(2, 4, 5, 5, dtype=torch.int32)}),
    ("input", {"input": t(2, 4, 0, 5)}),
    ("input", {"input": "image"}),
    ("weight", {"weight": t(4, 3, 2)}),
    ("weight", {"weight": t(5, 3, 2, 2)}),
    ("weight", {"weight": t(4, 0, 2, 2)}),
    ("weight", {"weight": t(4, 3, 2, 2, dtype=torch.float16)}),
    ("weight", {"weight": t(4, 3, 2, 2, device="meta")}),
    ("bias", {"bias": t(4)}),
    ("bias", {"bias": 1.0}),
    ("stride", {"stride": 0}),
    ("stride", {"stride": (1, 2, 3)}),
    ("stride", {"stride": 1.0}),
    ("stride", {"stride": 2**33}),
    ("padding", {"padding": -1}),
    ("padding", {"padding": 6}),
    ("padding", {"padding": "same"}),
    ("output_padding", {"output_padding": 1}),
    ("output_padding", {"output_padding": -1}),
    ("groups", {"groups": 3}),
    ("groups", {"groups": 0}),
    ("groups", {"groups": 2.0}),
    ("dilation", {"dilation": 0}),
    ("dilation", {"dilation": [True, 1]}),
    ("stride", {"stride": 2**31 - 1}),
    ("scale", {"scale": t(4)}),
    ("scale", {"scale": t(3, dtype=torch.float16)}),
    ("shift", {"shift": t(3, dtype=torch.float64)}),
    ("activation", {"activation": "swish"}),
    ("activation", {"activation": 2}),
    ("negative_slope", {"negative_slope": None}),
    ("impl", {"impl": "fast"}),
]

GOOD_VARLEN = {
    "query": t(7, 4, 8), "key": t(9, 2, 8), "value": t(9, 2, 8), "cu_seqlens_q": torch.tensor([0, 3, 7]),
    "cu_seqlens_k": torch.tensor([0, 5, 9]), "max_seqlen_q": 4, "max_seqlen_k": 5,
}  # fmt: skip
BAD_VARLEN = [
    ("query", {"query": t(1, 7, 4, 8)}),
    ("value", {"value": t(8, 2, 8)}),
    ("cu_seqlens_q", {"cu_seqlens_q": [0, 3, 7]}),
    ("cu_seqlens_q", {"cu_seqlens_q": torch.tensor([0.0, 3.0, 7.0])}),
    ("cu_seqlens_q", {"cu_seqlens_q": torch.tensor([0, 5, 3, 7])}),
    ("cu_seqlens_q", {"cu_seqlens_q": torch.tensor([1, 3, 7])}),
    ("cu_seqlens_q", {"cu_seqlens_q": torch.tensor([0, 3, 6])}),
    ("cu_seqlens_q", {"cu_seqlens_q": torch.tensor([0])}),
    ("cu_seqlens_k", {"cu_seqlens_k": torch.tensor([0, 5, 900])}),
    ("cu_seqlens_k", {"cu_seqlens_k": torch.tensor([0, 5, 9, 9])}),
    ("max_seqlen_q", {"max_seqlen_q": 3}),
    ("max_seqlen_k", {"max_seqlen_k": 5.0}),
    ("query_offset", {"query_offset": torch.tensor([1, 2, 3])}),
    ("key", {"key": t(9, 3, 8), "value": t(9, 3, 8)}),
    ("key", {"key": t(9, 2, 7)}),
    ("key", {"key": t(9, 2, 8, dtype=torch.float64)}),
    ("value", {"value": t(9, 1, 8)}),
    ("value", {"value": t(9, 2, 8, device="meta")}),
    ("cu_seqlens_q", {"cu_seqlens_q": torch.tensor([[0, 3, 7]])}),
    ("cu_seqlens_k", {"cu_seqlens_k": t(3, dtype=torch.int64, device="meta")}),
    ("max_seqlen_q", {"max_seqlen_q": -1}),
    ("dropout_p", {"dropout_p": 2}),
    ("is_causal", {"is_causal": "yes"}),
    ("scale", {"scale": float("inf")}),
    ("window", {"window": (-5, 1)}),
    ("softcap", {"softcap": float("nan")}),
    ("alibi_slopes", {"alibi_slopes": t(3, 4)}),
    ("return_lse", {"return_lse": None}),
    ("impl", {"impl": "varlen"}),
]

GOOD_DECODE = {
    "query": t(2, 4, 1, 8), "key_cache": t(2, 2, 10, 8), "value_cache": t(2, 2, 10, 8),
    "kv_lengths": torch.tensor([3, 9]), "key": t(2, 2, 1, 8), "value": t(2, 2, 1, 8),
}  # fmt: skip
BAD_DECODE = [
    ("query", {"query": t(4, 1, 8)}),
    ("key_cache", {"key_cache": t(3, 2, 10, 8)}),
    ("key_cache", {"key_cache": t(2, 2, 10, 7)}),
    ("key_cache", {"key_cache": t(2, 2, 10, 8, dtype=torch.float16)}),
    ("value_cache", {"value_cache": t(2, 2, 9, 8)}),
    ("kv_lengths", {"kv_lengths": [3, 9]}),
    ("kv_lengths", {"kv_lengths": torch.tensor([3, 10])}),
    ("kv_lengths", {"kv_lengths": torch.tensor([-1, 3])}),
    ("kv_lengths", {"kv_lengths": torch.tensor([0, 3]), "key": None, "value": None}),
    ("key", {"key": t(2, 2, 2, 8)}),
    ("key", {"key": None}),
    ("value", {"value": None}),
    ("value", {"value": t(2, 2, 1, 8, dtype=torch.float64)}),
    ("rotary", {"rotary": t(10, 4)}),
    ("rotary", {"rotary": (t(10, 5), t(10, 5))}),
    ("rotary", {"rotary": (t(9, 4), t(9, 4))}),
    ("rotary", {"rotary": (t(10, 4), t(10, 3))}),
    ("rotary_interleaved", {"rotary_interleaved": 0}),
    ("block_table", {"block_table": torch.tensor([[0, 5], [1, 0]])}),
    ("block_table", {"block_table": torch.tensor([0, 1])}),
    ("block_table", {"block_table": torch.tensor([[-1], [1]])}),
    ("block_table", {"block_table": t(2, 1)}),
    ("block_table", {"block_table": torch.tensor([[0], [1]], dtype=torch.int16)}),
    ("block_table", {"block_table": t(2, 1, dtype=torch.int64, device="meta")}),
    ("kv_starts", {"kv_starts": torch.tensor([1])}),
    ("kv_starts", {"kv_starts": [1, 2]}),
    ("kv_lengths", {"kv_lengths": torch.tensor([3, 9, 1])}),
    ("rotary", {"rotary": (t(10, 4, dtype=torch.int64), t(10, 4, dtype=torch.int64))}),
    ("rotary", {"rotary": (t(10, 4, device="meta"), t(10, 4, device="meta"))}),
    ("scale", {"scale": float("nan")}),
    ("window", {"window": (1,)}),
    ("softcap", {"softcap": -2.0}),
    ("alibi_slopes", {"alibi_slopes": t(3)}),
    ("return_lse", {"return_lse": 1}),
    ("impl", {"impl": "paged"}),
    ("key_cache", {"key_cache": t(2, 3, 10, 8), "value_cache": t(2, 3, 10, 8), "key": None, "value": None}),
    ("key_cache", {"key_cache": t(2, 2, 10, 8, dtype=torch.uint8)}),
    ("key_scales", {"key_scales": t(2, 2, 10)}),
    ("value_scales", {"value_scales": t(2, 2, 10)}),
]

GOOD_INT8 = GOOD_DECODE | {
    "key_cache": t(2, 2, 10, 8, dtype=torch.int8), "value_cache": t(2, 2, 10, 8, dtype=torch.int8),
    "key_scales": torch.ones(2, 2, 10), "value_scales": torch.ones(2, 2, 10),
}  # fmt: skip
BAD_INT8 = [
    ("key_scales", {"key_scales": None}),
    ("value_scales", {"value_scales": None}),
    ("key_scales", {"key_scales": t(2, 2, 10, 1)}),
    ("key_scales", {"key_scales": t(2, 2, 9)}),
    ("key_scales", {"key_scales": t(2, 2, 10, dtype=torch.bfloat16)}),
    ("key_scales", {"key_scales": 0.5}),
    ("value_scales", {"value_scales": t(2, 2, 10, dtype=torch.float64)}),
    ("value_scales", {"value_scales": t(2, 2, 10, device="meta")}),
    ("value_cache", {"value_cache": t(2, 2, 10, 8), "value_scales": None}),
    ("value_cache", {"value_cache": torch.zeros(2, 2, 10, 8, dtype=torch.float8_e4m3fn)}),
    ("key_cache", {"key_cache": torch.zeros(2, 2, 10, 8, dtype=torch.float8_e5m2)}),
    ("key", {"key": t(2, 2, 1, 8, dtype=torch.int8)}),
    ("query", {"query": t(2, 4, 1, 8, dtype=torch.int8)}),
]

CALLS = [
    *((gpt4fast.attention, GOOD_ATTENTION, name, bad) for name, bad in BAD_ATTENTION),
    *((gpt4fast.conv_transpose2d, GOOD_CONV, name, bad) for name, bad in BAD_CONV),
    *((gpt4fast.attention_varlen, GOOD_VARLEN, name, bad) for name, bad in BAD_VARLEN),
    *((gpt4fast.attention_decode, GOOD_DECODE, name, bad) for name, bad in BAD_DECODE),
    *((gpt4fast.attention_decode, GOOD_INT8, name, bad) for name, bad in BAD_INT8),
]
GOOD = [
    (gpt4fast.attention, GOOD_ATTENTION),
    (gpt4fast.conv_transpose2d, GOOD_CONV),
    (gpt4fast.attention_varlen, GOOD_VARLEN),
    (gpt4fast.attention_decode, GOOD_DECODE),
    (gpt4fast.attention_decode, GOOD_INT8),
]


@pytest.mark.parametrize(("op", "good"), GOOD)
def test_the_good_calls_are_good(op, good):
    assert torch.isfinite(op(**good)).all()


@pytest.mark.parametrize(
    ("op", "good", "name", "bad"), CALLS, ids=[f"{c[0].__name__}-{c[2]}-{i}" for i, c in enumerate(CALLS)]
)
def test_the_error_names_the_argument(op, good, name, bad):
    call = {**good, **bad}
    before = {name: call[name].clone() for name in CACHES if getattr(call.get(name), "is_cpu", False)}
    with pytest.raises((TypeError, ValueError), match=rf"\b{name}\b"):
        op(**call)
    assert all(torch.equal(call[name], was) for name, was in before.items())  # nothing was written


CACHES = ("key_cache", "value_cache", "key_scales", "value_scales")


@pytest.mark.parametrize("op", [gpt4fast.attention, gpt4fast.conv_transpose2d])
def test_missing_and_unknown_arguments(op):
    with pytest.raises(TypeError, match="missing"):
        op()
    with pytest.raises(TypeError, match="speed"):
        op(t(1, 1, 1, 1), t(1, 1, 1, 1), t(1, 1, 1, 1), speed="fast")
