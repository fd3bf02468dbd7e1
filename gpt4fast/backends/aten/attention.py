"""Attention on torch's own kernels, with what ``scaled_dot_product_attention`` lacks expressed as a mask.

Serves everything but a soft cap and the log-sum-exp. Shapes as in ``backends/reference/attention.py``.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional as F

from ..autograd import in_transform, known
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
) -> tuple[Tensor, None]:
    """Output (B, Hq, Lq, Dv); torch offers no log-sum-exp, so dispatch keeps calls with ``return_lse`` away."""
    bounded = kv_lengths is not None or kv_starts is not None or window is not None
    at_start = not isinstance(query_offset, Tensor) and query_offset == 0
    # With no more keys than queries, torch's causal flag leaves no key unseen, so torch can be called as it is.
    causal_is_torchs = not is_causal or (at_start and known(key.shape[2] <= query.shape[2]))
    if attn_mask is None and alibi_slopes is None and not bounded and causal_is_torchs:
        return _attend(query, key, value, None, dropout_p, is_causal, scale), None

    visible = reference.visible_keys(query, key, attn_mask, is_causal, query_offset, kv_lengths, kv_starts, window)
    bias = None if attn_mask is None or attn_mask.dtype == torch.bool else attn_mask.to(query.dtype)
    if alibi_slopes is not None:
        slopes = reference.alibi_bias(query, key, alibi_slopes, query_offset).to(query.dtype)
        bias = slopes if bias is None else bias + slopes
    if visible is None:
        return _attend(query, key, value, bias, dropout_p, False, scale), None

    query, key, value, sees_any = reference.hide_unseen(query, key, value, visible)
    # A row that sees nothing is let see everything (finite by now) and zeroed afterwards: no NaN, and zero gradients.
    visible = visible | ~sees_any
    mask = visible if bias is None else bias.masked_fill(~visible, -math.inf).masked_fill(~sees_any, 0)
    mask = mask.expand(-1, -1, query.shape[2], key.shape[2])
    return _attend(query, key, value, mask, dropout_p, False, scale).masked_fill(~sees_any, 0), None


def _attend(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, dropout_p: float, is_causal: bool, scale: float
) -> Tensor:
    inputs = (query, key, value, mask)
    needs_grad = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in inputs)
    # torch.compile, export and torch.func offer no second backward anyway, and torch's formula has every derivative.
    if not needs_grad or torch.compiler.is_compiling() or in_transform():
        return _sdpa(*inputs, dropout_p, is_causal, scale)
    grouped = query.shape[1] != key.shape[1]
    choice = torch._fused_sdp_choice(*inputs, dropout_p, is_causal, scale=scale, enable_gqa=grouped)
    if choice == _FORMULA or dropout_p:
        return _sdpa(*inputs, dropout_p, is_causal, scale)
    simple = query.is_cpu and not grouped and (mask is None or mask.dtype == query.dtype)
    return _TwiceDifferentiable.apply(*inputs, is_causal, scale, simple and choice == _FLASH)


_FORMULA, _FLASH = 0, 1  # of torch.nn.attention.SDPBackend


def _sdpa(query, key, value, mask, dropout_p, is_causal, scale):
    grouped = bool(query.shape[1] != key.shape[1])  # torch.jit.trace makes a tensor of it
    return F.scaled_dot_product_attention(
        query, key, value, mask, dropout_p, is_causal, scale=scale, enable_gqa=grouped
    )


class _TwiceDifferentiable(torch.autograd.Function):
    """Torch's fused kernels have no second derivative: a backward that must be differentiable runs the reference.

    Otherwise torch's own backward runs: called directly for the CPU kernel where nothing needs converting (twice as
    quick on tiny tensors), elsewhere through the graph of torch's forward.
    """

    @staticmethod
    def forward(ctx, query, key, value, mask, is_causal, scale, directly):
        ctx.settings = is_causal, scale
        if directly:
            ctx.graph = None
            out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
                query, key, value, 0.0, is_causal, attn_mask=mask, scale=scale
            )
            ctx.save_for_backward(query, key, value, mask, out, lse)
            return out
        ctx.save_for_backward(query, key, value, mask)
        with torch.enable_grad():
            inputs = [t if t is None else t.detach().requires_grad_(t.requires_grad) for t in (query, key, value, mask)]
            ctx.graph = inputs, _sdpa(*inputs, 0.0, is_causal, scale)
        return ctx.graph[1].detach()

    @staticmethod
    def backward(ctx, grad_out):
        is_causal, scale = ctx.settings
        differentiable = torch.is_grad_enabled()
        query, key, value, mask, *saved = ctx.saved_tensors
        if ctx.graph is None and not differentiable:
            grads = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
                grad_out, query, key, value, *saved, 0.0, is_causal, attn_mask=mask, scale=scale
            )
            return *grads, None, None, None, None
        if differentiable:
            # Views, since one tensor may be given in several places, each of which has a gradient of its own.
            inputs = [None if t is None else t.view_as(t) for t in (query, key, value, mask)]
            out, _ = reference.attention(*inputs, 0.0, is_causal, scale, 0, None, None, None, 0.0, None, False)
        else:
            inputs, out = ctx.graph
        wanted = [t for t, needed in zip(inputs, ctx.needs_input_grad, strict=False) if needed]
        grads = iter(torch.autograd.grad(out, wanted, grad_out, retain_graph=True, create_graph=differentiable))
        return *(next(grads) if needed else None for needed in ctx.needs_input_grad[:4]), None, None, None
