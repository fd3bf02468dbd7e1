"""Attention of a few new tokens over a key-value cache: one step of autoregressive decoding."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ..backends import dispatch
from ..backends.reference.attention_decode import LARGEST
from .attention_arguments import can_read, check_heads, prepare_scale, prepare_slopes, prepare_softcap, prepare_window
from .checks import (
    FLOAT_DTYPES,
    INDEX_DTYPES,
    autocast_dtype,
    check_bool,
    check_device,
    check_index_tensor,
    check_like,
    check_tensor,
    describe,
    without_autocast,
)
from .repeated import RepeatedCalls, key_of


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
    key_scales: Tensor | None = None,
    value_scales: Tensor | None = None,
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
            In query's dtype, or int8 or float8_e4m3fn with ``key_scales`` and ``value_scales``.
        kv_lengths: int32 or int64 (B,). With ``key`` and ``value``: entries in the cache before this call. Without: all
            entries, the queries' own included.
        key, value: (B, Hk, Lq, D) and (B, Hk, Lq, Dv), written in place at ``kv_lengths[b]`` and after.
        block_table: int32 or int64 (B, blocks_per_row): where each row's consecutive blocks lie in a paged cache
            (PagedAttention; Kwon et al., 2023).
        rotary: (cos, sin), each (positions, rotary_dim / 2): rotary embedding (RoFormer; Su et al., 2021) of ``query``
            and ``key`` at their absolute positions; the first rotary_dim channels turn, the others pass.
        rotary_interleaved: pairs are neighbouring channels (GPT-J) instead of the two halves (GPT-NeoX, Llama).
        key_scales, value_scales: float32, the cache's shape without its last dimension: an int8 or float8 cache stands
            for ``cache * scale``. A new entry x, once rotated, gets the scale ``max|x| / 127`` of int8, or
            ``max|x| / 448`` of float8_e4m3fn (1 where x is zero), and is rounded to the nearest numbers of that dtype.
        kv_starts: int32 or int64 (B,): first visible entry of each row (left padding). Positions still count from 0.
        scale, window, softcap, alibi_slopes, return_lse, impl: as for ``attention``.

    Returns:
        (B, Hq, Lq, Dv) in query's dtype; with ``return_lse`` also the log-sum-exp (B, Hq, Lq). Under autocast the
        cache's dtype is computed in, and the result has autocast's.

    Raises:
        TypeError, ValueError: an argument has the wrong type, dtype, shape or range; the message names it. On a CPU
            this includes lengths past the cache's end, before anything is written; on a GPU, and in a compiled graph,
            the values are not read.
        RuntimeError: ``impl`` names an implementation that can't serve this call; the message says why.

    No kernel gives gradients, and the native one reads no float8: there torch or the reference computes.
    """
    tensors = (
        query, key_cache, value_cache, kv_lengths, key, value, block_table, key_scales, value_scales, kv_starts,
        alibi_slopes,
    )  # fmt: skip
    tables = rotary if type(rotary) is tuple and len(rotary) == 2 else (rotary, rotary)
    repeated = key_of((*tensors, *tables), (rotary_interleaved, scale, window, softcap, return_lse), impl)
    bound = _REPEATED.get(repeated)
    if bound is None:
        call = prepare(
            query, key_cache, value_cache, kv_lengths, key, value, block_table, rotary, rotary_interleaved, key_scales,
            value_scales, scale, kv_starts, window, softcap, alibi_slopes, return_lse,
        )  # fmt: skip
        if repeated is not None:
            bound = _REPEATED.keep(repeated, _bind(dispatch.choose(dispatch.ATTENTION_DECODE, impl, call), call))
    if bound is not None:
        out, lse = bound(*tensors, rotary)
    else:
        out, lse = without_autocast(lambda: dispatch.run(dispatch.ATTENTION_DECODE, impl, call), query)
        cast = autocast_dtype(query)
        if cast is not None:
            out = out.to(cast)
    return (out, lse) if return_lse else out


_REPEATED = RepeatedCalls()


def _bind(implementation: str, call: dict) -> Callable[..., tuple[Tensor, Tensor]]:
    """A prepared call as a function of its tensors, of whose indices the values are still checked."""
    compute = dispatch.ATTENTION_DECODE.candidates[implementation].run
    interleaved, scale, window, softcap, return_lse = (
        call[name] for name in ("rotary_interleaved", "scale", "window", "softcap", "return_lse")
    )

    def bound(
        query, key_cache, value_cache, kv_lengths, key, value, block_table, key_scales, value_scales, kv_starts,
        alibi_slopes, rotary,
    ):  # fmt: skip
        _check_indices(query, key_cache, kv_lengths, block_table, rotary, appended=key is not None)
        batch, heads = query.shape[:2]
        return compute(
            query, key_cache, value_cache, kv_lengths, key, value, block_table, rotary, interleaved, key_scales,
            value_scales, scale, kv_starts, window, softcap, prepare_slopes(alibi_slopes, query, batch, heads),
            return_lse,
        )  # fmt: skip

    return bound


def prepare(
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
    scale: float | None,
    kv_starts: Tensor | None,
    window: tuple[int, int] | None,
    softcap: float,
    alibi_slopes: Tensor | None,
    return_lse: bool,
) -> dict:
    """Check every argument, the values of indices included, and bring them to the form that implementations take."""
    check_tensor("query", query)
    if query.dim() != 4:
        raise ValueError(f"query must have shape (batch, heads, new tokens, head_dim), but is {describe(query)}")
    check_tensor("key_cache", key_cache, dtypes=(*FLOAT_DTYPES, *LARGEST))
    if (key is None) != (value is None):
        given, missing = ("key", "value") if value is None else ("value", "key")
        raise ValueError(f"{missing} must be given with {given}, but is None")
    if autocast_dtype(query) is not None and key_cache.dtype in FLOAT_DTYPES:
        query, key, value = (t.to(key_cache.dtype) if isinstance(t, Tensor) else t for t in (query, key, value))
    batch, heads, new, head_dim = query.shape
    _check_cache("key_cache", key_cache, "key_scales", key_scales, query, paged=block_table is not None)
    _check_cache("value_cache", value_cache, "value_scales", value_scales, query, paged=block_table is not None)
    check_heads("key_cache", key_cache, query, key_cache.shape[1], heads)
    if value_cache.shape[:3] != key_cache.shape[:3] or value_cache.dtype != key_cache.dtype:
        like = f"{tuple(key_cache.shape[:3])}, {key_cache.dtype}"
        raise ValueError(f"value_cache must match key_cache's {like}, but is {describe(value_cache)}")
    for name, tensor, cache in (("key", key, key_cache), ("value", value, value_cache)):
        if tensor is not None:
            check_tensor(name, tensor)
            check_like(name, tensor, "query", query)
            expected = (batch, cache.shape[1], new, cache.shape[3])
            if tensor.shape != expected:
                raise ValueError(f"{name} must have shape {expected}, but is {describe(tensor)}")
    if block_table is not None:
        _check_block_table(block_table, query)
    check_index_tensor("kv_lengths", kv_lengths, batch, "batch row", "query", query)
    if kv_starts is not None:
        check_index_tensor("kv_starts", kv_starts, batch, "batch row", "query", query)
    check_bool("rotary_interleaved", rotary_interleaved)
    check_bool("return_lse", return_lse)
    if rotary is not None:
        _check_rotary(rotary, query)
    call = {
        "query": query,
        "key_cache": key_cache,
        "value_cache": value_cache,
        "kv_lengths": kv_lengths,
        "key": key,
        "value": value,
        "block_table": block_table,
        "rotary": rotary,
        "rotary_interleaved": rotary_interleaved,
        "key_scales": key_scales,
        "value_scales": value_scales,
        "scale": prepare_scale(scale, head_dim),
        "kv_starts": kv_starts,
        "window": prepare_window(window),
        "softcap": prepare_softcap(softcap),
        "alibi_slopes": prepare_slopes(alibi_slopes, query, batch, heads),
        "return_lse": return_lse,
    }
    _check_indices(query, key_cache, kv_lengths, block_table, rotary, appended=key is not None)
    return call


def _check_indices(
    query: Tensor, key_cache: Tensor, kv_lengths: Tensor, block_table: Tensor | None, rotary, *, appended: bool
) -> None:
    """The values of lengths and block table, where they can be read."""
    batch, _, new, _ = query.shape
    capacity = key_cache.shape[2]
    if block_table is not None:
        capacity = capacity * block_table.shape[1]
        if block_table.numel() and can_read(block_table):
            low, high = (int(entry) for entry in torch.aminmax(block_table))
            if low < 0 or high >= key_cache.shape[0]:
                raise ValueError(
                    f"block_table must index key_cache's {key_cache.shape[0]} blocks, but has entries {low} to {high}"
                )
    if batch and can_read(kv_lengths):
        _check_lengths(kv_lengths.tolist(), new, capacity, appended=appended, rotary=rotary)


def _check_cache(name: str, cache: Tensor, scales_name: str, scales: Tensor | None, query: Tensor, paged: bool) -> None:
    check_tensor(name, cache, dtypes=(*FLOAT_DTYPES, *LARGEST))
    if cache.dim() != 4 or not (paged or cache.shape[0] == query.shape[0]):
        rows, length = ("blocks", "block_size") if paged else (query.shape[0], "length")
        raise ValueError(f"{name} must have shape ({rows}, heads, {length}, head_dim), but is {describe(cache)}")
    if cache.dtype not in LARGEST:
        check_like(name, cache, "query", query)
        if scales is not None:
            raise ValueError(f"{scales_name} must be None unless {name} is int8 or float8, which is {describe(cache)}")
        return
    check_device(name, cache, "query", query)
    if scales is None:
        raise ValueError(f"{scales_name} must be given with {name} in {cache.dtype}, but is None")
    check_tensor(scales_name, scales, dtypes=(torch.float32,))
    check_device(scales_name, scales, "query", query)
    if scales.shape != cache.shape[:3]:
        raise ValueError(f"{scales_name} must have shape {tuple(cache.shape[:3])}, but is {describe(scales)}")


def _check_block_table(block_table: Tensor, query: Tensor) -> None:
    check_tensor("block_table", block_table, dtypes=INDEX_DTYPES)
    check_device("block_table", block_table, "query", query)
    if block_table.dim() != 2 or block_table.shape[0] != query.shape[0]:
        raise ValueError(
            f"block_table must have shape ({query.shape[0]}, blocks per row), but is {describe(block_table)}"
        )


def _check_rotary(rotary: tuple[Tensor, Tensor], query: Tensor) -> None:
    if not isinstance(rotary, (tuple, list)) or len(rotary) != 2 or not all(isinstance(t, Tensor) for t in rotary):
        raise TypeError(f"rotary must be (cos, sin), two tensors, but is {describe(rotary)}")
    half = query.shape[-1] // 2
    for table in rotary:
        check_tensor("rotary", table)
        check_device("rotary", table, "query", query)
        if table.dim() != 2 or table.shape != rotary[0].shape or table.shape[1] > half:
            raise ValueError(
                f"rotary must be two tensors of one shape (positions, at most {half}), but has {describe(table)}"
            )


def _check_lengths(
    lengths: list[int], new: int, capacity: int, *, appended: bool, rotary: tuple[Tensor, Tensor] | None
) -> None:
    """The lengths as given: before the new tokens are appended, or with the queries' own entries in them."""
    least, stop = (0, max(lengths) + new) if appended else (new, max(lengths))
    if min(lengths) < least:
        raise ValueError(f"kv_lengths must be at least {least}, but is {lengths}")
    if stop > capacity:
        what = f" with {new} new tokens" if appended else ""
        raise ValueError(f"kv_lengths must fit the cache of {capacity} entries{what}, but is {lengths}")
    if rotary is not None and stop > rotary[0].shape[0]:
        raise ValueError(f"rotary must have tables for {stop} positions, but has {rotary[0].shape[0]}")
