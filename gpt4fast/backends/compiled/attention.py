"""Adapters to the compiled ``gpt4fast::attention_forward``, with its shape rule and its gradient.

The kernel computes the output and the log-sum-exp; backward recomputes the probabilities from the latter. Packed
sequences are the same op with ``cu_seqlens``: operands (1, H, total, D).
"""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from .. import native
from ..reference import attention as reference
from ..reference.attention_varlen import attention_varlen as padded_attention
from ..reference.dropout import draw_seed


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
        query, key, value, attn_mask, dropout_p, is_causal, scale, query_offset, kv_lengths, kv_starts, window,
        softcap, alibi_slopes, None, None,
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
        cu_seqlens_q, cu_seqlens_k,
    )  # fmt: skip
    return out.squeeze(0).transpose(0, 1), lse.squeeze(0).transpose(0, 1)


def _run(
    query, key, value, attn_mask, dropout_p, is_causal, scale, query_offset, kv_lengths, kv_starts, window, softcap,
    alibi_slopes, cu_seqlens_q, cu_seqlens_k,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    offset, offsets = (0, query_offset) if isinstance(query_offset, Tensor) else (query_offset, None)
    left, right = window or (-1, -1)
    inputs = (
        query, key, value, attn_mask, dropout_p, draw_seed(query) if dropout_p else None, is_causal, scale, offset,
        as_index(offsets), as_index(kv_lengths), as_index(kv_starts), left, right, softcap, as_float32(alibi_slopes),
        as_index(cu_seqlens_q), as_index(cu_seqlens_k),
        query.stride(1) >= query.stride(2),  # the result lies in memory like the query, as torch's does
    )  # fmt: skip
    if torch.compiler.is_compiling() or torch.is_inference_mode_enabled():
        return torch.ops.gpt4fast.attention_forward.default(*inputs)
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in inputs[:4]):
        return _Attention.apply(*inputs[:4], inputs[4:])
    with torch._C._AutoDispatchBelowAutograd():
        return torch.ops.gpt4fast.attention_forward.default(*inputs)


def as_index(indices: Tensor | None) -> Tensor | None:
    return None if indices is None else indices.to(torch.int64).contiguous()


def as_float32(values: Tensor | None) -> Tensor | None:
    return None if values is None else values.to(torch.float32)


def empty_results(query: Tensor, value: Tensor, heads_first: bool = False) -> tuple[Tensor, Tensor]:
    """What the ops return, uninitialised: queries first in memory, or heads."""
    batch, heads, length, _ = query.shape
    if heads_first:
        out = query.new_empty(batch, heads, length, value.shape[3])
    else:
        out = query.new_empty(batch, length, heads, value.shape[3]).transpose(1, 2)
    return out, query.new_empty(batch, heads, length, dtype=torch.float32)


def _fake_forward(query, key, value, *settings):
    return empty_results(query, value, settings[-1] is True)


def _fake_backward(grad_out, grad_lse, query, key, value, out, lse, needs_mask_grad, attn_mask, *_):
    grad_mask = query.new_empty(attn_mask.shape if needs_mask_grad else 0, dtype=torch.float32)
    return torch.empty_like(query), torch.empty_like(key), torch.empty_like(value), grad_mask


def _setup_context(ctx, inputs, output):
    ctx.set_materialize_grads(False)
    query, key, value, *settings = inputs
    tensors = [s if isinstance(s, Tensor) else None for s in settings]
    ctx.save_for_backward(query, key, value, *output, *tensors)
    ctx.settings = [None if isinstance(s, Tensor) else s for s in settings]


def _backward(ctx, grad_out, grad_lse):
    query, key, value, out, lse, *tensors = ctx.saved_tensors
    *settings, _ = [s if t is None else t for s, t in zip(ctx.settings, tensors, strict=True)]
    attn_mask = settings[0]
    if torch.is_grad_enabled():  # create_graph=True
        grads = _differentiable_backward(ctx.needs_input_grad, grad_out, grad_lse, query, key, value, *settings)
    else:
        needs_mask_grad = attn_mask is not None and ctx.needs_input_grad[3]
        grad_out = torch.zeros_like(out) if grad_out is None else grad_out
        *grads, grad_mask = torch.ops.gpt4fast.attention_backward.default(
            grad_out, grad_lse, query, key, value, out, lse, needs_mask_grad, *settings
        )
        grads.append(grad_mask.to(attn_mask.dtype) if needs_mask_grad else None)
    return *grads, *(None,) * len(settings)


def _differentiable_backward(
    needed, grad_out, grad_lse, query, key, value, attn_mask, dropout_p, seed, is_causal, scale, offset, offsets,
    kv_lengths, kv_starts, left, right, softcap, slopes, cu_seqlens_q, cu_seqlens_k,
) -> list[Tensor | None]:  # fmt: skip
    """The gradients of query, key, value and mask as functions that have gradients, from the reference."""
    # Views, since one tensor may be given in several places, each of which has a gradient of its own.
    inputs = [None if t is None else t.view_as(t) for t in (query, key, value, attn_mask)]
    attend = partial(reference.attention, dropout_seed=seed)
    settings = dropout_p, is_causal, scale, offset if offsets is None else offsets
    if cu_seqlens_q is None:
        outputs = attend(*inputs, *settings, kv_lengths, kv_starts, (left, right), softcap, slopes, True)
    else:
        packed = (t.squeeze(0).transpose(0, 1) for t in inputs[:3])
        longest = (int(cu_seqlens.diff().max()) for cu_seqlens in (cu_seqlens_q, cu_seqlens_k))
        outputs = padded_attention(
            attend, *packed, cu_seqlens_q, cu_seqlens_k, *longest, *settings, (left, right), softcap, slopes, True
        )
        outputs = [t.transpose(0, 1).unsqueeze(0) for t in outputs]
    given = [(t, g) for t, g in zip(outputs, (grad_out, grad_lse), strict=True) if g is not None and t.requires_grad]
    wanted = [t for t, is_needed in zip(inputs, needed, strict=False) if is_needed]
    outputs, grads = [t for t, _ in given], [g for _, g in given]
    grads = iter(torch.autograd.grad(outputs, wanted, grads, create_graph=True, allow_unused=True))
    return [next(grads) if is_needed else None for is_needed in needed[:4]]


class _Attention(torch.autograd.Function):
    """The derivative of the registered op without the Python that ``torch.library`` puts around each call, which
    torch.compile needs and which costs more than a small attention."""

    @staticmethod
    def forward(ctx, query, key, value, attn_mask, settings):
        inputs = query, key, value, attn_mask, *settings
        with torch._C._AutoDispatchBelowAutograd():
            output = torch.ops.gpt4fast.attention_forward.default(*inputs)
        _setup_context(ctx, inputs, output)
        return output

    @staticmethod
    def backward(ctx, grad_out, grad_lse):
        return *_backward(ctx, grad_out, grad_lse)[:4], None


native.load()
if native.cpu_library_error() is None:
    torch.library.register_fake("gpt4fast::attention_forward", _fake_forward)
    torch.library.register_fake("gpt4fast::attention_backward", _fake_backward)
    torch.library.register_autograd("gpt4fast::attention_forward", _backward, setup_context=_setup_context)
