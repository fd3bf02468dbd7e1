"""Attention of a few new tokens over a key-value cache: one step of autoregressive decoding."""

from __future__ import annotations

import torch
from torch import Tensor

from .attention import attention
from .checks import check_bool, check_index_tensor, check_like, check_tensor, describe


def attention_decode(
    query: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    kv_lengths: Tensor,
    *,
    key: Tensor | None = None,
    value: Tensor | None = None,
    block_table: Tensor | None = None,
    rotary: tuple[Tensor, Tensor] | None = None,
    rotary_interleaved: bool = False,
    scale: float | None = None,
    kv_starts: Tensor | None = None,
    window: tuple[int, int] | None = None,
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    return_lse: bool = False,
    impl: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Append the new keys and values to the cache, rotate, and attend causally, the last query seeing the last key.

    Args:
        query: (B, Hq, Lq, D), the Lq newest tokens of each row.
        key_cache: (B, Hk, Lmax, D), or with ``block_table`` (num_blocks, Hk, block_size, D); value_cache likewise, Dv.
        kv_lengths: int32 or int64 (B,). With ``key`` and ``value``: entries in the cache before this call. Without: all
            entries, the queries' own included.
        key, value: (B, Hk, Lq, D) and (B, Hk, Lq, Dv), written in place at ``kv_lengths[b]`` and after.
        block_table: int32 or int64 (B, blocks_per_row): where each row's consecutive blocks lie in a paged cache
            (PagedAttention; Kwon et al., 2023).
        rotary: (cos, sin), each (positions, rotary_dim / 2): rotary embedding (RoFormer; Su et al., 2021) of ``query``
            and ``key`` at their absolute positions; the first rotary_dim channels turn, the others pass.
        rotary_interleaved: pairs are neighbouring channels (GPT-J) instead of the two halves (GPT-NeoX, Llama).
        kv_starts: (B,): first visible entry of each row (left padding). Positions still count from 0.
        scale, window, softcap, alibi_slopes, return_lse, impl: as for ``attention``.

    Returns:
        (B, Hq, Lq, Dv) in query's dtype; with ``return_lse`` also the log-sum-exp (B, Hq, Lq).

    Raises:
        TypeError, ValueError: an argument has the wrong type, dtype, shape or range; the message names it. On a CPU
            this includes lengths past the cache's end, before anything is written; on a GPU the values are not read.
    """
    check_tensor("query", query)
    if query.dim() != 4:
        raise ValueError(f"query must have shape (batch, heads, new tokens, head_dim), but is {describe(query)}")
    batch, _, new, head_dim = query.shape
    for name, cache in (("key_cache", key_cache), ("value_cache", value_cache)):
        check_tensor(name, cache)
        check_like(name, cache, "query", query)
        if cache.dim() != 4 or (block_table is None and cache.shape[0] != batch):
            layout = (
                f"({batch}, heads, length, head_dim)"
                if block_table is None
                else "(blocks, heads, block_size, head_dim)"
            )
            raise ValueError(f"{name} must have shape {layout}, but is {describe(cache)}")
    if value_cache.shape[:3] != key_cache.shape[:3]:
        raise ValueError(
            f"value_cache must match key_cache's {tuple(key_cache.shape[:3])}, but is {describe(value_cache)}"
        )
    if key_cache.shape[3] != head_dim:
        raise ValueError(f"key_cache must have query's head_dim {head_dim} last, but is {describe(key_cache)}")
    check_index_tensor("kv_lengths", kv_lengths, batch, "batch row", "query", query)
    if block_table is not None:
        _check_block_table(block_table, query, key_cache)
    _check_new(key, value, query, key_cache, value_cache)
    check_bool("rotary_interleaved", rotary_interleaved)

    # Where the first of the new tokens stands, and how many entries there are once they are appended.
    start = kv_lengths if key is not None else kv_lengths - new
    capacity = key_cache.shape[2] * (1 if block_table is None else block_table.shape[1])
    if not torch.compiler.is_compiling() and query.device.type == "cpu" and batch:
        _check_lengths(kv_lengths, start, new, capacity, appended=key is not None)
    positions = start[:, None] + torch.arange(new, device=query.device)  # (B, Lq)
    if rotary is not None:
        query = _rotate(query, positions, rotary, rotary_interleaved)
        key = None if key is None else _rotate(key, positions, rotary, rotary_interleaved)
    if key is not None:
        _append(key_cache, key, positions, block_table)
        _append(value_cache, value, positions, block_table)
    if block_table is not None:
        key_cache, value_cache = _gather(key_cache, block_table), _gather(value_cache, block_table)
    return attention(
        query, key_cache, value_cache, None, 0.0, True, scale, query_offset=start, kv_lengths=start + new,
        kv_starts=kv_starts, window=window, softcap=softcap, alibi_slopes=alibi_slopes, return_lse=return_lse,
        impl=impl,
    )  # fmt: skip


def _check_block_table(block_table: Tensor, query: Tensor, key_cache: Tensor) -> None:
    check_tensor("block_table", block_table, dtypes=(torch.int32, torch.int64))
    if block_table.dim() != 2 or block_table.shape[0] != query.shape[0]:
        raise ValueError(
            f"block_table must have shape ({query.shape[0]}, blocks per row), but is {describe(block_table)}"
        )
    if block_table.device != query.device:
        raise ValueError(f"block_table must be on query's device {query.device}, but is {describe(block_table)}")
    if torch.compiler.is_compiling() or query.device.type != "cpu" or block_table.numel() == 0:
        return
    low, high = int(block_table.min()), int(block_table.max())
    if low < 0 or high >= key_cache.shape[0]:
        raise ValueError(
            f"block_table must index key_cache's {key_cache.shape[0]} blocks, but has entries {low} to {high}"
        )


def _check_new(key: Tensor | None, value: Tensor | None, query: Tensor, key_cache: Tensor, value_cache: Tensor) -> None:
    if (key is None) != (value is None):
        given, missing = ("key", "value") if value is None else ("value", "key")
        raise ValueError(f"{missing} must be given with {given}, but is None")
    if key is None:
        return
    for name, tensor, cache in (("key", key, key_cache), ("value", value, value_cache)):
        check_tensor(name, tensor)
        check_like(name, tensor, "query", query)
        expected = (query.shape[0], cache.shape[1], query.shape[2], cache.shape[3])
        if tuple(tensor.shape) != expected:
            raise ValueError(f"{name} must have shape {expected}, but is {describe(tensor)}")


def _check_lengths(kv_lengths: Tensor, start: Tensor, new: int, capacity: int, appended: bool) -> None:
    low, high = int(start.min()), int(start.max()) + new
    if low < 0:
        least = 0 if appended else new
        raise ValueError(f"kv_lengths must be at least {least}, but is {kv_lengths.tolist()}")
    if high > capacity:
        what = f" with {new} new tokens" if appended else ""
        raise ValueError(f"kv_lengths must fit the cache of {capacity} entries{what}, but is {kv_lengths.tolist()}")


def _rotate(x: Tensor, positions: Tensor, rotary: tuple[Tensor, Tensor], interleaved: bool) -> Tensor:
    """Rotary embedding of (B, H, L, D) at positions (B, L), in float32 for half types."""
    if not isinstance(rotary, (tuple, list)) or len(rotary) != 2 or not all(isinstance(t, Tensor) for t in rotary):
        raise TypeError(f"rotary must be (cos, sin), two tensors, but is {describe(rotary)}")
    for table in rotary:
        check_tensor("rotary", table)
        if (
            table.dim() != 2
            or table.shape != rotary[0].shape
            or 2 * table.shape[1] > x.shape[-1]
            or table.device != x.device
        ):
            limit = f"(positions, at most {x.shape[-1] // 2}), on {x.device}"
            raise ValueError(f"rotary must be two tensors of one shape {limit}, but has {describe(table)}")
    if not torch.compiler.is_compiling() and x.device.type == "cpu" and positions.numel():
        needed = int(positions.max()) + 1
        if needed > rotary[0].shape[0]:
            raise ValueError(f"rotary must have tables for {needed} positions, but has {rotary[0].shape[0]}")
    cos, sin = (table[positions].unsqueeze(1) for table in rotary)  # (B, 1, L, rotary_dim / 2)
    half = cos.shape[-1]
    turned, rest = x[..., : 2 * half].to(torch.promote_types(x.dtype, cos.dtype)), x[..., 2 * half :]
    if interleaved:
        a, b = turned[..., 0::2], turned[..., 1::2]
        turned = torch.stack((a * cos - b * sin, a * sin + b * cos), -1).flatten(-2)
    else:
        a, b = turned.chunk(2, -1)
        turned = torch.cat((a * cos - b * sin, a * sin + b * cos), -1)
    return torch.cat((turned.to(x.dtype), rest), -1)


def _append(cache: Tensor, new: Tensor, positions: Tensor, block_table: Tensor | None) -> None:
    """Write (B, H, L, D) at each row's positions (B, L), in place."""
    rows = torch.arange(positions.shape[0], device=positions.device)[:, None]
    within = positions
    if block_table is not None:
        block_size = cache.shape[2]
        rows, within = block_table[rows, positions // block_size], positions % block_size
    cache[rows, :, within] = new.transpose(1, 2)


def _gather(cache: Tensor, block_table: Tensor) -> Tensor:
    """(num_blocks, H, block_size, D) -> (B, H, blocks_per_row * block_size, D)."""
    return cache[block_table].transpose(1, 2).flatten(2, 3)
