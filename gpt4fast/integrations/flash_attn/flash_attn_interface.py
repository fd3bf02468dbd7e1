"""flash-attn's functions; ``gpt4fast.integrations.flash_attn`` says what they have in common."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from ... import ops
from ...backends.reference.attention_decode import append, entries, rotate
from ...ops.checks import check_tensor, describe


def flash_attn_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
) -> Tensor | tuple[Tensor, Tensor, Tensor]:
    """Attention of q (B, Lq, H, D) over k (B, Lk, Hk, D) and v (B, Lk, Hk, Dv): (B, Lq, H, Dv).

    ``softmax_lse`` is (B, H, Lq), ``S_dmask`` (B, H, Lq, Lk).
    """
    _check_layout(4, "(batch, length, heads, head_dim)", q=q, k=k, v=v)
    query, key, value = (t.transpose(1, 2) for t in (q, k, v))

    def attend(value: Tensor, dropout_p: float) -> Tensor | tuple[Tensor, Tensor]:
        return ops.attention(
            query, key, value, None, dropout_p, causal, softmax_scale, query_offset=k.shape[1] - q.shape[1],
            window=window_size, softcap=softcap, alibi_slopes=alibi_slopes, return_lse=return_attn_probs,
        )  # fmt: skip

    if not return_attn_probs:
        return _by_tokens(attend(value, dropout_p))
    S_dmask = q.new_empty(0)
    if dropout_p:
        length = k.shape[1]
        S_dmask = _signed_weights(attend, torch.eye(length).to(k).expand(*key.shape[:2], length, length), dropout_p)
    out, lse = attend(value, dropout_p)
    return _by_tokens(out), _flash_lse(lse), S_dmask


def flash_attn_kvpacked_func(q: Tensor, kv: Tensor, *args, **kwargs) -> Tensor | tuple[Tensor, Tensor, Tensor]:
    """``flash_attn_func`` with keys and values in one tensor (B, Lk, 2, Hk, D)."""
    _check_stacked("kv", kv, 5, 2)
    return flash_attn_func(q, *kv.unbind(2), *args, **kwargs)


def flash_attn_qkvpacked_func(qkv: Tensor, *args, **kwargs) -> Tensor | tuple[Tensor, Tensor, Tensor]:
    """``flash_attn_func`` with queries, keys and values in one tensor (B, L, 3, H, D)."""
    _check_stacked("qkv", qkv, 5, 3)
    return flash_attn_func(*qkv.unbind(2), *args, **kwargs)


def flash_attn_varlen_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
    block_table: Tensor | None = None,
) -> Tensor | tuple[Tensor, Tensor, Tensor]:
    """Attention within packed sequences, of q (total_q, H, D) over k (total_k, Hk, D) and v (total_k, Hk, Dv):
    (total_q, H, Dv).

    With ``block_table`` (B, blocks per sequence), k and v are caches (num_blocks, block_size, Hk, D). ``softmax_lse``
    is (H, total_q), ``S_dmask`` (B, H, max_seqlen_q, max_seqlen_k).
    """
    if block_table is not None:
        _check_layout(4, "(num_blocks, block_size, heads, head_dim) with block_table", k=k, v=v)
        block_table = _without_unused(block_table, cu_seqlens_k.diff(), k.shape[1])
        k, v = (_unpaged(t, block_table, cu_seqlens_k.diff()) for t in (k, v))
    _check_layout(3, "(tokens, heads, head_dim)", q=q, k=k, v=v)
    lengths_q, lengths_k = cu_seqlens_q.diff(), cu_seqlens_k.diff()

    def attend(value: Tensor, dropout_p: float) -> Tensor | tuple[Tensor, Tensor]:
        return ops.attention_varlen(
            q, k, value, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p, causal, softmax_scale,
            query_offset=0 if cu_seqlens_q is cu_seqlens_k else lengths_k - lengths_q, window=window_size,
            softcap=softcap, alibi_slopes=alibi_slopes, return_lse=return_attn_probs,
        )  # fmt: skip

    if not return_attn_probs:
        return attend(v, dropout_p)
    S_dmask = q.new_empty(0)
    if dropout_p:
        places = torch.cat([torch.arange(n, device=k.device) for n in lengths_k.tolist()])
        one_hot = F.one_hot(places, max_seqlen_k).to(k.dtype)[:, None].expand(-1, k.shape[1], -1)
        weights = _signed_weights(attend, one_hot, dropout_p).split(lengths_q.tolist())
        S_dmask = torch.stack([F.pad(w.transpose(0, 1), (0, 0, 0, max_seqlen_q - w.shape[0])) for w in weights])
    out, lse = attend(v, dropout_p)
    return out, _flash_lse(lse).transpose(0, 1), S_dmask


def flash_attn_varlen_kvpacked_func(q: Tensor, kv: Tensor, *args, **kwargs) -> Tensor | tuple[Tensor, Tensor, Tensor]:
    """``flash_attn_varlen_func`` with keys and values in one tensor (total_k, 2, Hk, D)."""
    _check_stacked("kv", kv, 4, 2)
    return flash_attn_varlen_func(q, *kv.unbind(1), *args, **kwargs)


def flash_attn_varlen_qkvpacked_func(
    qkv: Tensor, cu_seqlens: Tensor, max_seqlen: int, *args, **kwargs
) -> Tensor | tuple[Tensor, Tensor, Tensor]:
    """``flash_attn_varlen_func`` with queries, keys and values in one tensor (total, 3, H, D)."""
    _check_stacked("qkv", qkv, 4, 3)
    return flash_attn_varlen_func(*qkv.unbind(1), cu_seqlens, cu_seqlens, max_seqlen, max_seqlen, *args, **kwargs)


@torch.no_grad()
def flash_attn_with_kvcache(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    k: Tensor | None = None,
    v: Tensor | None = None,
    rotary_cos: Tensor | None = None,
    rotary_sin: Tensor | None = None,
    cache_seqlens: int | Tensor | None = None,
    cache_batch_idx: Tensor | None = None,
    cache_leftpad: Tensor | None = None,
    block_table: Tensor | None = None,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    rotary_interleaved: bool = True,
    alibi_slopes: Tensor | None = None,
    num_splits: int = 0,
    return_softmax_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Attention of q (B, Lq, H, D) over a cache, to which k and v (B, new, Hk, D) are first appended in place.

    The caches are (rows, length, Hk, D), of which ``cache_batch_idx`` (B,) picks the rows, or blocks (num_blocks,
    block_size, Hk, D) that ``block_table`` (B, blocks per row) puts in order. ``cache_seqlens`` counts their entries
    before the call; by default they are full. Rotary tables (positions, rotary_dim / 2) turn k by its places in the
    cache, and q by those from ``cache_seqlens`` on, or all by that one if neither causal nor windowed. No gradients.
    """
    _check_layout(4, "(batch, length, heads, head_dim)", q=q, k_cache=k_cache, v_cache=v_cache, k=k, v=v)
    if (k is None) != (v is None) or (rotary_cos is None) != (rotary_sin is None):
        raise ValueError("k and v must be given together, and so must rotary_cos and rotary_sin")
    if k is None and rotary_cos is not None:
        raise ValueError("k and v must be given with rotary_cos and rotary_sin, but are None")
    if k is not None and cache_seqlens is None:
        raise ValueError("cache_seqlens must be given with k and v, but is None")
    if cache_batch_idx is not None:
        if block_table is not None:
            raise ValueError("cache_batch_idx must be None with block_table")
        block_table = cache_batch_idx[:, None]  # each row of the cache is a block
    (batch, rows), capacity = q.shape[:2], k_cache.shape[1] * (1 if block_table is None else block_table.shape[1])
    lengths = capacity if cache_seqlens is None else cache_seqlens
    if not isinstance(lengths, Tensor):
        lengths = torch.full((batch,), lengths, dtype=torch.int32, device=q.device)
    if block_table is not None:
        block_table = _without_unused(block_table, lengths + (0 if k is None else k.shape[1]), k_cache.shape[1])
    query, keys, values = (t.transpose(1, 2) for t in (q, k_cache, v_cache))
    new, new_values = (None if t is None else t.transpose(1, 2) for t in (k, v))
    rotary = None if rotary_cos is None else (rotary_cos, rotary_sin)
    settings = {"scale": softmax_scale, "softcap": softcap, "alibi_slopes": alibi_slopes, "return_lse": True}
    settings |= {"window": window_size, "kv_starts": cache_leftpad}

    in_place = block_table is not None and q.is_cpu and int(lengths.min()) >= rows  # attention_decode copies no block
    is_step = in_place if new is None else new.shape[2] == rows
    if is_step and (causal or rows == 1):  # every query sees what is before it, as attention_decode has it
        out, lse = ops.attention_decode(
            query, keys, values, lengths, key=new, value=new_values, block_table=block_table, rotary=rotary,
            rotary_interleaved=rotary_interleaved, **settings,
        )  # fmt: skip
    else:
        if new is not None:
            if q.is_cpu and int(lengths.max()) + new.shape[2] > capacity:
                raise ValueError(f"cache_seqlens must leave room for {new.shape[2]} in {capacity}, but is {lengths}")
            positions = lengths[:, None] + torch.arange(new.shape[2], device=q.device)
            if rotary is not None:
                in_order = causal or max(window_size) >= 0
                turns = lengths[:, None] + torch.arange(rows, device=q.device) * in_order
                query = rotate(query, turns, rotary, rotary_interleaved).to(q.dtype)
                new = rotate(new, positions, rotary, rotary_interleaved)
            append(keys, None, new, positions, block_table)
            append(values, None, new_values, positions, block_table)
            lengths = lengths + positions.shape[1]
        keys, values = (entries(t, None, block_table, q.dtype) for t in (keys, values))
        out, lse = ops.attention(
            query, keys, values, is_causal=causal, query_offset=lengths - rows, kv_lengths=lengths, **settings
        )
    return (_by_tokens(out), _flash_lse(lse)) if return_softmax_lse else _by_tokens(out)


def _check_layout(dims: int, layout: str, **tensors: Tensor | None) -> None:
    for name, tensor in tensors.items():
        if tensor is not None:
            check_tensor(name, tensor)
            if tensor.dim() != dims:
                raise ValueError(f"{name} must have shape {layout}, but is {describe(tensor)}")


def _check_stacked(name: str, tensor: Tensor, dims: int, parts: int) -> None:
    check_tensor(name, tensor)
    if tensor.dim() != dims or tensor.shape[-3] != parts:
        raise ValueError(f"{name} must have {dims} dimensions (…, {parts}, heads, head_dim), but is {describe(tensor)}")


def _by_tokens(out: Tensor) -> Tensor:  # (B, L, H, D) from (B, H, L, D)
    return out.transpose(1, 2).contiguous()


def _flash_lse(lse: Tensor) -> Tensor:
    return lse.detach().masked_fill(lse == -math.inf, math.inf)


@torch.no_grad()
def _signed_weights(attend: Callable, one_hot: Tensor, dropout_p: float) -> Tensor:
    """The softmax, negative where the next ``attend`` will drop it; ``one_hot`` is a value that tells keys apart."""
    with torch.random.fork_rng(devices=[one_hot.device] if one_hot.is_cuda else []):
        dropped = attend(one_hot, dropout_p)[0] == 0
    weights, _ = attend(one_hot, 0.0)
    return torch.where(dropped, -weights, weights)


def _without_unused(block_table: Tensor, lengths: Tensor, block_size: int) -> Tensor:
    """With 0 for the -1 (or other negative number) that may stand behind a row's last block."""
    used = torch.arange(block_table.shape[1], device=lengths.device) * block_size < lengths[:, None]
    if block_table.is_cpu and (used & (block_table < 0)).any():
        raise ValueError(f"block_table must have a block for each of {lengths.tolist()} entries, but is {block_table}")
    return block_table.clamp(min=0)


def _unpaged(blocks: Tensor, block_table: Tensor, lengths: Tensor) -> Tensor:
    """Packed (total, H, D) from blocks (num_blocks, block_size, H, D)."""
    rows = blocks[block_table].flatten(1, 2)
    return rows[torch.arange(rows.shape[1], device=rows.device) < lengths[:, None]]
