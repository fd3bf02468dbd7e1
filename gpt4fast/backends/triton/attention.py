"""Attention by Triton kernels, with its gradients: FlashAttention-2 (Dao, 2023). Shapes as in the reference.

Run on an H200 (benchmarks/LOG.md); tested by Triton's interpreter too, and compiled for sm_80, sm_90 and sm_100.
Triton itself is imported at the first launch.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..autograd import needs_grad
from ..compiled import attention as compiled
from ..reference.dropout import draw_seed
from .attention_launch import launch, launch_delta
from .availability import triton_refusal

WIDEST = 256


def width_refusal(query: Tensor, value: Tensor) -> str | None:
    """Why a head is too wide for the kernels, or None."""
    for name, width in (("head_dim", query.shape[-1]), ("value's head_dim", value.shape[-1])):
        if width > WIDEST:
            return f"the Triton kernel takes a {name} of at most {WIDEST}, and this one is {width}"
    return None


def refusal(call: dict) -> str | None:
    """Why the kernels can't serve a call that ``prepare`` of ``attention`` or ``attention_varlen`` made, or None."""
    query, value, mask, slopes = call["query"], call["value"], call.get("attn_mask"), call["alibi_slopes"]
    reason = triton_refusal(query)
    if reason is not None:
        return reason
    reason = width_refusal(query, value)
    if reason is not None:
        return reason
    if mask is not None and mask.dtype == torch.float64:
        return "the Triton kernel takes no float64 mask"
    if slopes is not None and needs_grad(slopes):
        return "the Triton kernel gives alibi_slopes no gradient"
    return None


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None,
    dropout_p: float,
    is_causal: bool,
    scale: float,
    query_offset: int | Tensor,
    kv_lengths: Tensor | None,
    kv_starts: Tensor | None,
    window: tuple[int, int] | None,
    softcap: float,
    alibi_slopes: Tensor | None,
    return_lse: bool,
) -> tuple[Tensor, Tensor]:
    """Output (B, Hq, Lq, Dv) in query's dtype and the log-sum-exp (B, Hq, Lq) in float32, asked for or not."""
    return _run(
        query, key, value, attn_mask, dropout_p, is_causal, scale, query_offset, kv_lengths, kv_starts, window, softcap,
        alibi_slopes, None, None, 0, 0,
    )  # fmt: skip


def attention_varlen(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    dropout_p: float,
    is_causal: bool,
    scale: float,
    query_offset: int | Tensor,
    window: tuple[int, int] | None,
    softcap: float,
    alibi_slopes: Tensor | None,
    return_lse: bool,
) -> tuple[Tensor, Tensor]:
    """Output (total_q, Hq, Dv) in query's dtype and the log-sum-exp (total_q, Hq) in float32, asked for or not."""
    query, key, value = (t.transpose(0, 1).unsqueeze(0) for t in (query, key, value))
    out, lse = _run(
        query, key, value, None, dropout_p, is_causal, scale, query_offset, None, None, window, softcap, alibi_slopes,
        cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k,
    )  # fmt: skip
    return out.squeeze(0).transpose(0, 1), lse.squeeze(0).transpose(0, 1)


def _run(
    query, key, value, attn_mask, dropout_p, is_causal, scale, query_offset, kv_lengths, kv_starts, window, softcap,
    alibi_slopes, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    offset, offsets = (0, query_offset) if isinstance(query_offset, Tensor) else (query_offset, None)
    left, right = window or (-1, -1)
    inputs = (
        query, key, value, attn_mask, dropout_p, draw_seed(query) if dropout_p else None, is_causal, scale, offset,
        compiled.as_index(offsets), compiled.as_index(kv_lengths), compiled.as_index(kv_starts), left, right, softcap,
        compiled.as_float32(alibi_slopes), compiled.as_index(cu_seqlens_q), compiled.as_index(cu_seqlens_k),
        max_seqlen_q, max_seqlen_k,
        query.stride(1) >= query.stride(2),  # the result lies in memory like the query, as torch's does
    )  # fmt: skip
    if torch.compiler.is_compiling() or torch.is_inference_mode_enabled():
        return torch.ops.gpt4fast.triton_attention_forward.default(*inputs)
    if needs_grad(*inputs[:4]):
        return _Attention.apply(*inputs[:4], inputs[4:])
    with torch._C._AutoDispatchBelowAutograd():
        return torch.ops.gpt4fast.triton_attention_forward.default(*inputs)


def _forward(query, key, value, *settings) -> tuple[Tensor, Tensor]:
    *settings, heads_first = settings
    out, lse = compiled.empty_results(query, value, heads_first)
    launch(
        "forward", query, key, value, settings,
        {"Query": query, "Key": key, "Value": value, "Out": out}, {"Lse": lse},
    )  # fmt: skip
    return out, lse


def _backward(
    grad_out, grad_lse, query, key, value, out, lse, needs_mask_grad, *settings
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    attn_mask = settings[0]
    batch, heads, rows, _ = query.shape
    delta = torch.empty_like(lse)
    launch_delta(grad_out, out, None if grad_lse is None else grad_lse.contiguous(), delta)
    inputs = {"GradOut": grad_out, "Query": query, "Key": key, "Value": value}
    sums = {"Lse": lse, "Delta": delta}

    grad_query, grad_key, grad_value = (torch.empty_like(t) for t in (query, key, value))
    # Of the scores' size, whatever the mask's: its dimensions of 1 are summed afterwards, in a fixed order.
    grad_scores = lse.new_zeros(batch, heads, rows, key.shape[2]) if needs_mask_grad else None
    launch(
        "backward_query", query, key, value, settings,
        inputs | {"GradQuery": grad_query}, sums | {"GradMask": grad_scores},
    )  # fmt: skip
    launch(
        "backward_key_value", query, key, value, settings,
        inputs | {"GradKey": grad_key, "GradValue": grad_value}, sums,
    )  # fmt: skip
    grad_mask = grad_scores.sum_to_size(attn_mask.shape) if needs_mask_grad else lse.new_empty(0)
    return grad_query, grad_key, grad_value, grad_mask


# Autograd, and torch.compile, to which the launches are opaque


def _fake_forward(query, key, value, *settings):
    return compiled.empty_results(query, value, settings[-1])


def _fake_backward(grad_out, grad_lse, query, key, value, out, lse, needs_mask_grad, attn_mask, *_):
    grad_mask = query.new_empty(attn_mask.shape if needs_mask_grad else 0, dtype=torch.float32)
    return torch.empty_like(query), torch.empty_like(key), torch.empty_like(value), grad_mask


def _differentiate(ctx, grad_out, grad_lse):
    query, key, value, out, lse, *tensors = ctx.saved_tensors
    *settings, _ = [s if t is None else t for s, t in zip(ctx.settings, tensors, strict=True)]
    attn_mask = settings[0]
    if torch.is_grad_enabled():  # create_graph=True
        grads = compiled._differentiable_backward(
            ctx.needs_input_grad, grad_out, grad_lse, query, key, value, *settings[:-2]
        )
    else:
        needs_mask_grad = attn_mask is not None and ctx.needs_input_grad[3]
        grad_out = torch.zeros_like(out) if grad_out is None else grad_out
        *grads, grad_mask = torch.ops.gpt4fast.triton_attention_backward.default(
            grad_out, grad_lse, query, key, value, out, lse, needs_mask_grad, *settings
        )
        grads.append(grad_mask.to(attn_mask.dtype) if needs_mask_grad else None)
    return *grads, *(None,) * len(settings)


class _Attention(torch.autograd.Function):
    """The derivative of the registered op without the Python that ``torch.library`` puts around each call."""

    @staticmethod
    def forward(ctx, query, key, value, attn_mask, settings):
        inputs = query, key, value, attn_mask, *settings
        with torch._C._AutoDispatchBelowAutograd():
            output = torch.ops.gpt4fast.triton_attention_forward.default(*inputs)
        compiled._setup_context(ctx, inputs, output)
        return output

    @staticmethod
    def backward(ctx, grad_out, grad_lse):
        return *_differentiate(ctx, grad_out, grad_lse)[:4], None


_SETTINGS = (
    "Tensor? attn_mask, float dropout_p, Tensor? dropout_seed, bool is_causal, float scale, SymInt query_offset, "
    "Tensor? query_offsets, Tensor? kv_lengths, Tensor? kv_starts, SymInt window_left, SymInt window_right, "
    "float softcap, Tensor? alibi_slopes, Tensor? cu_seqlens_q, Tensor? cu_seqlens_k, SymInt max_seqlen_q, "
    "SymInt max_seqlen_k"
)
torch.library.define(
    "gpt4fast::triton_attention_forward",
    f"(Tensor query, Tensor key, Tensor value, {_SETTINGS}, bool heads_first) -> (Tensor out, Tensor lse)",
)
torch.library.define(
    "gpt4fast::triton_attention_backward",
    "(Tensor grad_out, Tensor? grad_lse, Tensor query, Tensor key, Tensor value, Tensor out, Tensor lse, "
    f"bool needs_mask_grad, {_SETTINGS}) -> (Tensor grad_query, Tensor grad_key, Tensor grad_value, Tensor grad_mask)",
)
for _device in ("cuda", "cpu"):  # the CPU's is the interpreter
    torch.library.impl("gpt4fast::triton_attention_forward", _device, _forward)
    torch.library.impl("gpt4fast::triton_attention_backward", _device, _backward)
torch.library.register_fake("gpt4fast::triton_attention_forward", _fake_forward)
torch.library.register_fake("gpt4fast::triton_attention_backward", _fake_backward)
torch.library.register_autograd(
    "gpt4fast::triton_attention_forward", _differentiate, setup_context=compiled._setup_context
)
