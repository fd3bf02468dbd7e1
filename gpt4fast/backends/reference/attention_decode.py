"""A decoding step over a key-value cache in plain PyTorch, on any implementation of ``attention``."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from .attention import compute_dtype

# Of a cache of rounded numbers: what the largest of each entry becomes.
LARGEST = {torch.int8: 127, torch.float8_e4m3fn: 448}


def attention_decode(
    attend: Callable,
    query: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    kv_lengths: Tensor,
    key: Tensor | None,
    value: Tensor | None,
    block_table: Tensor | None,
    rotary: tuple[Tensor, Tensor] | None,
    rotary_interleaved: bool,
    key_scales: Tensor | None,
    value_scales: Tensor | None,
    scale: float,
    kv_starts: Tensor | None,
    window: tuple[int, int] | None,
    softcap: float,
    alibi_slopes: Tensor | None,
    return_lse: bool,
) -> tuple[Tensor, Tensor | None]:
    """Output (B, Hq, Lq, Dv) in query's dtype and, if asked for, the log-sum-exp (B, Hq, Lq), computed by ``attend``
    over the cache, to which the new keys and values are appended first."""
    dtype, new = query.dtype, query.shape[2]
    start = kv_lengths - new if key is None else kv_lengths
    positions = start[:, None] + torch.arange(new, device=query.device)  # (B, Lq)
    if rotary is not None:
        query = rotate(query, positions, rotary, rotary_interleaved).to(dtype)
        key = None if key is None else rotate(key, positions, rotary, rotary_interleaved)
    if key is not None:
        append(key_cache, key_scales, key, positions, block_table)
        append(value_cache, value_scales, value, positions, block_table)
    keys = entries(key_cache, key_scales, block_table, dtype)
    values = entries(value_cache, value_scales, block_table, dtype)
    out, lse = attend(
        query.to(keys.dtype), keys, values, None, 0.0, True, scale, start, start + new, kv_starts, window, softcap,
        alibi_slopes, return_lse,
    )  # fmt: skip
    return out.to(dtype), lse


def rotate(x: Tensor, positions: Tensor, rotary: tuple[Tensor, Tensor], interleaved: bool) -> Tensor:
    """Rotary embedding of (B, H, L, D) at positions (B, L), in at least the tables' dtype, float32 for half types."""
    x = x.to(torch.promote_types(compute_dtype(x.dtype), rotary[0].dtype))
    cos, sin = (table[positions].unsqueeze(1) for table in rotary)  # (B, 1, L, rotary_dim / 2)
    half = cos.shape[-1]
    turned, rest = x[..., : 2 * half], x[..., 2 * half :]
    if interleaved:
        a, b = turned[..., 0::2], turned[..., 1::2]
        turned = torch.stack((a * cos - b * sin, a * sin + b * cos), -1).flatten(-2)
    else:
        a, b = turned.chunk(2, -1)
        turned = torch.cat((a * cos - b * sin, a * sin + b * cos), -1)
    return torch.cat((turned, rest), -1)


def append(cache: Tensor, scales: Tensor | None, new: Tensor, positions: Tensor, block_table: Tensor | None) -> None:
    """Write (B, H, L, D) at each row's positions (B, L), in place; with ``scales`` rounded to the cache's dtype."""
    rows = torch.arange(positions.shape[0], device=positions.device)[:, None]
    within = positions
    if block_table is not None:
        block_size = cache.shape[2]
        rows, within = block_table[rows, positions // block_size], positions % block_size
    new = new.transpose(1, 2)
    if scales is not None:
        new, new_scales = to_scaled(new, cache.dtype)
        scales[rows, :, within] = new_scales
    cache[rows, :, within] = new.to(cache.dtype)


def to_scaled(x: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Each last dimension in a dtype of ``LARGEST``, and its float32 scale: the product of both is about ``x``."""
    x = x.float()
    scales = x.abs().amax(-1) / LARGEST[dtype]
    scales = scales.masked_fill(scales == 0, 1)
    x = x / scales.unsqueeze(-1)
    return (torch.round(x) if dtype == torch.int8 else x).to(dtype), scales


def entries(cache: Tensor, scales: Tensor | None, block_table: Tensor | None, dtype: torch.dtype) -> Tensor:
    """The cache as (B, H, L, D), its blocks in order; one with ``scales`` in the compute dtype of ``dtype``."""
    if block_table is not None:
        cache = cache[block_table].transpose(1, 2).flatten(2, 3)
        scales = None if scales is None else scales[block_table].transpose(1, 2).flatten(2, 3)
    return cache if scales is None else cache.to(compute_dtype(dtype)) * scales.unsqueeze(-1)
