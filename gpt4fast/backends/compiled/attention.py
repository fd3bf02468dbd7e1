"""Adapter to the compiled ``gpt4fast::attention_forward``, with its shape rule and its gradient.

The kernel computes the output and the log-sum-exp; backward recomputes the probabilities from the latter.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .. import native
from ..reference import attention as reference


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
    per_row = isinstance(query_offset, Tensor)
    left, right = window or (-1, -1)
    if attn_mask is not None:
        attn_mask = attn_mask.expand(query.shape[0], query.shape[1], query.shape[2], key.shape[2])
    lengths, starts, offsets = (
        None if t is None else t.to(torch.int64).contiguous()
        for t in (kv_lengths, kv_starts, query_offset if per_row else None)
    )
    return torch.ops.gpt4fast.attention_forward(
        query, key, value, attn_mask, is_causal, scale, 0 if per_row else query_offset, offsets, lengths, starts,
        left, right, softcap, None if alibi_slopes is None else alibi_slopes.float(),
    )  # fmt: skip


def _fake(query, key, value, *_):
    out = query.new_empty(*query.shape[:3], value.shape[3])
    return out, query.new_empty(query.shape[:3], dtype=torch.float32)


def _setup_context(ctx, inputs, output):
    query, key, value, attn_mask, is_causal, scale, offset, offsets, lengths, starts, left, right, softcap, slopes = (
        inputs
    )
    ctx.save_for_backward(query, key, value, *output, attn_mask, offsets, lengths, starts, slopes)
    ctx.settings = is_causal, scale, offset, (left, right), softcap


def _backward(ctx, grad_out, grad_lse):
    query, key, value, out, lse, attn_mask, offsets, lengths, starts, slopes = ctx.saved_tensors
    is_causal, scale, offset, window, softcap = ctx.settings
    grad_query, grad_key, grad_value, grad_mask = reference.attention_backward(
        grad_out, grad_lse, query, key, value, out, lse, attn_mask, 0.0, None, is_causal, scale,
        offset if offsets is None else offsets, lengths, starts, window, softcap, slopes,
    )  # fmt: skip
    needs_mask = attn_mask is not None and attn_mask.dtype != torch.bool and ctx.needs_input_grad[3]
    return grad_query, grad_key, grad_value, grad_mask if needs_mask else None, *(None,) * 10


native.load()
if native.cpu_library_error() is None:
    torch.library.register_fake("gpt4fast::attention_forward", _fake)
    torch.library.register_autograd("gpt4fast::attention_forward", _backward, setup_context=_setup_context)
