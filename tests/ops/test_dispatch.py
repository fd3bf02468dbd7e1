"""Which implementation runs, and what is said about the others."""

from __future__ import annotations

import pytest
import torch
from oracles import available

import gpt4fast
from gpt4fast.backends import dispatch, preferences
from gpt4fast.ops.attention import prepare


def qkv(dtype=torch.float32):
    return [torch.randn(1, 2, 3, 8, dtype=dtype) for _ in range(3)]


def packed():
    """The arguments of ``attention_varlen`` for two sequences."""
    starts = torch.tensor([0, 2, 5])
    return [torch.randn(5, 2, 8) for _ in range(3)], (starts, starts, 3, 3)


def cached():
    """The arguments of ``attention_decode`` for two rows."""
    return torch.randn(2, 4, 1, 8), torch.randn(2, 2, 10, 8), torch.randn(2, 2, 10, 8), torch.tensor([3, 7])


@pytest.fixture
def runs(monkeypatch, every_call_dispatched):
    """Records the implementations that really compute."""
    seen = []
    for op in (
        dispatch.ATTENTION, dispatch.ATTENTION_VARLEN, dispatch.ATTENTION_DECODE, dispatch.CONV_TRANSPOSE
    ):  # fmt: skip
        for name, candidate in list(op.candidates.items()):

            def run(*args, _run=candidate.run, _name=name, **kwargs):
                seen.append(_name)
                return _run(*args, **kwargs)

            monkeypatch.setitem(op.candidates, name, dispatch.Candidate(run, candidate.refusal))
    return seen


@pytest.mark.parametrize("impl", ["reference", "torch", "native"])
def test_argument_and_environment_choose(impl, runs, monkeypatch):
    if not available(impl):
        pytest.skip("not built")
    gpt4fast.attention(*qkv(), impl=impl)
    monkeypatch.setenv("GPT4FAST_IMPL", impl)
    gpt4fast.attention(*qkv())
    gpt4fast.conv_transpose1d(torch.randn(1, 2, 3), torch.randn(2, 2, 2))
    operands, starts = packed()
    gpt4fast.attention_varlen(*operands, *starts)
    gpt4fast.attention_decode(*cached())
    assert runs == [impl] * 5
    gpt4fast.attention(*qkv(), impl="reference")  # the argument goes first
    assert runs[-1] == "reference"


def test_explain_tells_what_auto_runs(runs):
    for kwargs in ({}, {"softcap": 2.0}, {"return_lse": True}, {"is_causal": True, "window": (2, 0)}):
        explanation = gpt4fast.explain(gpt4fast.attention, *qkv(), **kwargs)
        gpt4fast.attention(*qkv(), **kwargs)
        assert explanation.implementation == runs[-1]
        assert set(explanation.reasons) == set(dispatch.IMPLEMENTATIONS) - {runs[-1]} and all(
            explanation.reasons.values()
        )
    for requires_grad in (False, True):
        operands, starts = packed()
        operands = [t.requires_grad_(requires_grad) for t in operands]
        query, *caches = cached()
        query = query.requires_grad_(requires_grad)
        for op, arguments in (
            (gpt4fast.attention_varlen, (*operands, *starts)),
            ("attention_decode", (query, *caches)),
        ):
            explanation = gpt4fast.explain(op, *arguments)
            getattr(gpt4fast, explanation.op)(*arguments)
            assert explanation.implementation == runs[-1]
            assert set(explanation.reasons) == set(dispatch.IMPLEMENTATIONS) - {runs[-1]}
    assert "softcap" in gpt4fast.explain("attention", *qkv(), softcap=2.0).reasons["torch"]
    assert "log-sum-exp" in str(gpt4fast.explain("attention", *qkv(), return_lse=True))
    assert (
        gpt4fast.explain(
            "conv_transpose2d", torch.randn(1, 2, 3, 3), torch.randn(2, 2, 2, 2), impl="reference"
        ).implementation
        == "reference"
    )


@pytest.mark.parametrize(
    ("impl", "kwargs", "reason"),
    [
        ("torch", {"softcap": 1.0}, "softcap"),
        ("triton", {"attn_mask": torch.zeros(3, 3, dtype=torch.float64)}, "float64 mask|not installed"),
        ("cuda", {}, "CUDA"),
        ("native", {"attn_mask": torch.zeros(3, 3, dtype=torch.float64)}, "float64 mask"),
        ("native", {"alibi_slopes": torch.ones(2, requires_grad=True)}, "alibi_slopes"),
    ],
)
def test_an_explicit_request_that_cannot_be_met_raises(impl, kwargs, reason):
    with pytest.raises(RuntimeError, match=reason):
        gpt4fast.attention(*qkv(), **kwargs, impl=impl)


def test_native_refuses_float64():
    with pytest.raises(RuntimeError, match="native"):
        gpt4fast.attention(*qkv(torch.float64), impl="native")


def test_native_refuses_gradients_of_decoding(needs_native):
    query, *caches = cached()
    with pytest.raises(RuntimeError, match="gradient"):
        gpt4fast.attention_decode(query.requires_grad_(), *caches, impl="native")
    with torch.no_grad():
        gpt4fast.attention_decode(query, *caches, impl="native")


def test_listeners_hear_of_every_call(needs_native):
    input, weight = torch.randn(1, 4, 5, 5), torch.randn(4, 6, 3, 3)
    heard = []
    with (
        pytest.raises(KeyError),
        dispatch.listening(lambda op, implementation: heard.append((op.name, implementation))),
    ):
        for _ in range(2):  # the second was seen before
            gpt4fast.conv_transpose2d(input, weight, impl="native")
        gpt4fast.attention(*qkv(), impl="reference")
        gpt4fast.explain(gpt4fast.attention, *qkv())
        raise KeyError
    gpt4fast.conv_transpose2d(input, weight, impl="native")
    assert heard == [("conv_transpose", "native")] * 2 + [("attention", "reference")]


def test_cuda_kernels_refuse_what_they_cannot_serve():
    """On a machine without a GPU too, a refusal names what is in the way."""
    query, *caches = cached()
    with pytest.raises(RuntimeError, match="gradient"):
        gpt4fast.attention_decode(query.clone().requires_grad_(), *caches, impl="cuda")
    wide = torch.randn(1, 1, 1, 257), *torch.randn(2, 1, 1, 4, 257), torch.tensor([2])
    with pytest.raises(RuntimeError, match="257"):
        gpt4fast.attention_decode(*wide, impl="cuda")
    with pytest.raises(RuntimeError, match="float64 mask"):
        gpt4fast.attention(*qkv(), attn_mask=torch.zeros(3, 3, dtype=torch.float64), impl="cuda")
    with pytest.raises(RuntimeError, match="alibi_slopes no gradient"):
        gpt4fast.attention(*qkv(), alibi_slopes=torch.ones(2, requires_grad=True), impl="cuda")
    for width, reason in ((257, "at most 256 numbers, and these have 257"), (256, "CUDA")):  # trained or not
        for trains in (False, True):
            wide = torch.randn(1, 1, 4, width, requires_grad=trains)
            with pytest.raises(RuntimeError, match=reason):
                gpt4fast.attention(wide, wide, wide, impl="cuda")
    for options in ({"attn_mask": torch.zeros(3, 3)}, {"dropout_p": 0.5}):  # nothing is in the way but the machine
        with pytest.raises(RuntimeError, match="CUDA"):
            gpt4fast.attention(*(t.requires_grad_() for t in qkv()), **options, impl="cuda")
    with pytest.raises(RuntimeError, match="CUDA"):
        gpt4fast.attention_decode(query, *caches, impl="cuda")
    with pytest.raises(RuntimeError, match="CUDA"):
        gpt4fast.conv_transpose1d(torch.randn(1, 8, 4), torch.randn(8, 8, 4), impl="cuda")


def test_unknown_names(monkeypatch):
    with pytest.raises(ValueError, match="impl must be one of auto"):
        gpt4fast.attention(*qkv(), impl="fast")
    monkeypatch.setenv("GPT4FAST_IMPL", "quick")
    with pytest.raises(ValueError, match="GPT4FAST_IMPL"):
        gpt4fast.attention(*qkv())
    with pytest.raises(ValueError, match="op_or_model"):
        gpt4fast.explain("matmul", torch.ones(1))


@pytest.mark.parametrize("impl", [None, "reference"])
def test_function_transforms(impl):
    """Native kernels have no rules for torch.func, and a tangent must not get lost: auto goes elsewhere."""
    query, key, value = qkv()

    def loss(query):
        return gpt4fast.attention(query, key, value, impl=impl).square().sum()

    leaf = query.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(loss(leaf), leaf)
    torch.testing.assert_close(torch.func.grad(loss)(query), gradient)
    torch.testing.assert_close(torch.func.jvp(loss, (query,), (key,))[1], (gradient * key).sum())
    stacked = torch.stack([query, key])
    torch.testing.assert_close(torch.func.vmap(loss)(stacked), torch.stack([loss(q) for q in stacked]))


def test_what_auto_prefers_on_a_gpu():
    """On tensors of no device, which are as little on a CPU as a GPU's."""
    query, keys = (torch.empty(2, heads, 40, 64, device="meta", dtype=torch.bfloat16) for heads in (4, 2))
    lengths = torch.empty(2, device="meta", dtype=torch.int64)

    def attention(**options):
        options = {"dropout_p": 0.0, "is_causal": True, "scale": None, "query_offset": 0, "softcap": 0.0} | options
        names = "attn_mask dropout_p is_causal scale query_offset kv_lengths kv_starts window softcap alibi_slopes"
        arguments = [options.get(name) for name in names.split()]
        call, _ = prepare(query, keys, keys, *arguments, options.get("return_lse", False))
        return preferences.attention(call)

    assert attention()[0] == "torch" and attention(is_causal=False, query_offset=3)[0] == "torch"
    for options in ({"window": (3, 0)}, {"kv_lengths": lengths}, {"softcap": 2.0}, {"query_offset": 3}):
        assert attention(**options) == ("cuda", "triton", "torch", "reference")
    trained, mask = query.clone().requires_grad_(), torch.empty(40, 40, device="meta", dtype=torch.bool)
    for options in ({"attn_mask": mask}, {"dropout_p": 0.1, "window": (3, 0)}):  # in which cuda was not measured
        assert attention(**options) == ("triton", "torch", "cuda", "reference")
    packed = {"query": query, "key": keys, "value": keys, "dropout_p": 0.0}
    cached = {"query": query, "key": None, "value": None, "key_cache": keys}
    for call in (packed, cached):
        assert preferences.packed_or_cached_attention(call) == ("cuda", "triton", "torch", "reference")
    assert preferences.packed_or_cached_attention(packed | {"query": trained})[:2] == ("triton", "torch")
    float8 = cached | {"key_cache": keys.to(torch.float8_e4m3fn)}
    assert preferences.packed_or_cached_attention(float8)[:2] == ("triton", "cuda")

    def convolution(outputs=128, groups=1, dtype=torch.bfloat16, **options):
        input = torch.empty(2, 128, 8, 8, device="meta", dtype=dtype)
        weight = torch.empty(128, outputs, 4, 4, device="meta", dtype=dtype, requires_grad=options.pop("trains", False))
        names = ("bias", "scale", "shift", "activation")
        call = {"input": input, "weight": weight, "groups": groups} | dict.fromkeys(names) | options
        return preferences.conv_transpose(call)[0]

    assert convolution() == convolution(activation="relu", dtype=torch.float32) == "torch"
    assert convolution(activation="relu") == convolution(outputs=64) == convolution(1, groups=128) == "triton"
    assert convolution(activation="relu", trains=True) == "torch"
