"""Attention in plain PyTorch: the definition that every other implementation is tested against.

Shapes, throughout: query (B, Hq, Lq, D), key (B, Hk, Lk, D), value (B, Hk, Lk, Dv), with Hq a multiple of Hk.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from . import dropout


def query_positions(query: Tensor, query_offset: int | Tensor) -> Tensor:
    """The absolute position of each query, ``i + query_offset``: (1 or B, 1, Lq, 1)."""
    rows = torch.arange(query.shape[2], device=query.device).view(1, 1, -1, 1)
    return rows + (query_offset.view(-1, 1, 1, 1) if isinstance(query_offset, Tensor) else query_offset)


def visible_keys(
    query: Tensor,
    key: Tensor,
    attn_mask: Tensor | None,
    is_causal: bool,
    query_offset: int | Tensor,
    kv_lengths: Tensor | None,
    kv_starts: Tensor | None,
    window: tuple[int, int] | None,
) -> Tensor | None:
    """Which key each query may see: bool, broadcastable to (B, Hq, Lq, Lk); None when every query sees every key.

    A float mask hides what it sets to -inf.
    """
    position = query_positions(query, query_offset)
    keys = torch.arange(key.shape[2], device=query.device).view(1, 1, 1, -1)
    conditions = []
    if is_causal:
        conditions.append(keys <= position)
    if window is not None:
        left, right = window
        if left >= 0:
            conditions.append(keys >= position - left)
        if right >= 0:
            conditions.append(keys <= position + right)
    if kv_starts is not None:
        conditions.append(keys >= kv_starts.view(-1, 1, 1, 1))
    if kv_lengths is not None:
        conditions.append(keys < kv_lengths.view(-1, 1, 1, 1))
    if attn_mask is not None:
        conditions.append(attn_mask if attn_mask.dtype == torch.bool else attn_mask != -math.inf)
    visible = None
    for condition in conditions:
        visible = condition if visible is None else visible & condition
    return visible


def hide_unseen(query: Tensor, key: Tensor, value: Tensor, visible: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Zero the queries that see no key and the keys and values that no query of their group sees.

    Without this, a NaN in a masked-out place would reach the output or a gradient as ``0 * NaN``. Also returned is
    ``sees_any``, (…, Lq, 1): whether each query sees a key at all.
    """
    sees_any = visible.any(-1, keepdim=True)
    seen = visible.any(-2).unsqueeze(-1)  # (1 or B, 1 or Hq, Lk, 1)
    heads = key.shape[1]
    if seen.shape[1] not in (1, heads):  # several query heads share a key head: any of them may see it
        seen = seen.unflatten(1, (heads, -1)).any(2)
    return query.masked_fill(~sees_any, 0), key.masked_fill(~seen, 0), value.masked_fill(~seen, 0), sees_any


def alibi_bias(query: Tensor, key: Tensor, alibi_slopes: Tensor, query_offset: int | Tensor) -> Tensor:
    """``-slope * |i + query_offset - j|``, (B, Hq, Lq, Lk), for slopes (B, Hq). Press et al., 2022."""
    keys = torch.arange(key.shape[2], device=query.device).view(1, 1, 1, -1)
    distance = (query_positions(query, query_offset) - keys).abs()
    return -alibi_slopes[:, :, None, None] * distance


def expand_heads(tensor: Tensor, heads: int) -> Tensor:
    """(B, Hk, L, D) -> (B, Hq, L, D): each key/value head serves Hq / Hk neighbouring query heads."""
    return tensor if tensor.shape[1] == heads else tensor.repeat_interleave(heads // tensor.shape[1], dim=1)


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """Half types are computed in float32 and rounded once, at the end."""
    return torch.float32 if dtype in (torch.float16, torch.bfloat16) else dtype


def attention_scores(
    query: Tensor,
    key: Tensor,
    attn_mask: Tensor | None,
    scale: float,
    query_offset: int | Tensor,
    softcap: float,
    alibi_slopes: Tensor | None,
    visible: Tensor | None,
) -> Tensor:
    """Scores before softmax, (B, Hq, Lq, Lk), -inf where invisible."""
    scores = (query @ key.transpose(-2, -1)) * scale
    if softcap:
        scores = softcap * torch.tanh(scores / softcap)
    if attn_mask is not None and attn_mask.dtype != torch.bool:
        scores = scores + attn_mask.to(scores.dtype)
    if alibi_slopes is not None:
        scores = scores + alibi_bias(query, key, alibi_slopes.to(scores.dtype), query_offset)
    if visible is not None:
        scores = scores.masked_fill(~visible, -math.inf)
    return scores


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
    dropout_seed: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Output (B, Hq, Lq, Dv) in query's dtype, and the log-sum-exp of the scores (B, Hq, Lq) in the compute dtype, or
    None if not asked for. The seed of the dropout comes from torch's generator where it is not given."""
    dtype = query.dtype
    visible = visible_keys(query, key, attn_mask, is_causal, query_offset, kv_lengths, kv_starts, window)
    query, key, value = (t.to(compute_dtype(dtype)) for t in (query, key, value))
    if visible is not None:
        query, key, value, _ = hide_unseen(query, key, value, visible)
    key, value = expand_heads(key, query.shape[1]), expand_heads(value, query.shape[1])
    scores = attention_scores(query, key, attn_mask, scale, query_offset, softcap, alibi_slopes, visible)

    if scores.shape[-1] == 0:  # no keys at all
        return (scores @ value).to(dtype), scores.new_full(scores.shape[:-1], -math.inf)
    # The maximum only keeps exp in range; the result does not depend on it, so no gradient goes through it.
    peak = scores.detach().amax(-1, keepdim=True)
    peak = peak.masked_fill(peak == -math.inf, 0)
    weights = (scores - peak).exp()
    total = weights.sum(-1, keepdim=True)
    sees_nothing = total == 0
    total = total.masked_fill(sees_nothing, 1)
    probabilities = weights / total
    if dropout_p:
        seed = dropout.draw_seed(query) if dropout_seed is None else dropout_seed
        kept = dropout.keep_mask(seed, tuple(probabilities.shape), dropout_p)
        probabilities = (probabilities * kept) / (1 - dropout_p if dropout_p < 1 else 1)
    lse = (total.log() + peak).masked_fill(sees_nothing, -math.inf).squeeze(-1) if return_lse else None
    return (probabilities @ value).to(dtype), lse
