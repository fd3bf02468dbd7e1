"""The arguments that the three attention ops share: each checked, and brought to the form that implementations take."""

from __future__ import annotations

import torch
from torch import Tensor

from .checks import check_device, check_finite, check_index_tensor, check_number, check_tensor, describe, is_integer


def check_heads(name: str, key: Tensor, query: Tensor, kv_heads: int, heads: int) -> None:
    if key.shape[-1] != query.shape[-1]:
        raise ValueError(f"{name} must have query's head_dim {query.shape[-1]} last, but is {describe(key)}")
    if heads != kv_heads and (kv_heads == 0 or heads % kv_heads):
        raise ValueError(f"{name} must have a number of heads that divides query's {heads}, but is {describe(key)}")


def prepare_scale(scale: float | None, head_dim: int) -> float:
    if scale is None:
        return head_dim**-0.5 if head_dim else 1.0
    check_finite("scale", scale)
    return float(scale)


def prepare_softcap(softcap: float) -> float:
    check_number("softcap", softcap, low=0, high=float("inf"), high_open=True)
    return float(softcap)


def prepare_window(window: object) -> tuple[int, int] | None:
    """(left, right), or None where both sides are open."""
    if window is None:
        return None
    if not isinstance(window, (tuple, list)) or len(window) != 2 or not all(is_integer(side) for side in window):
        raise TypeError(f"window must be None or (left, right), two ints, but is {describe(window)}")
    if min(window) < -1 or max(window) > 2**31 - 1:
        raise ValueError(f"window must have sides from -1 (unlimited) to 2^31 - 1, but is {tuple(window)}")
    return None if tuple(window) == (-1, -1) else tuple(window)


def prepare_offset(query_offset: object, query: Tensor, batch: int) -> int | Tensor:
    if isinstance(query_offset, Tensor):
        check_index_tensor("query_offset", query_offset, batch, "batch row", "query", query)
    elif not is_integer(query_offset):
        raise TypeError(
            f"query_offset must be an int or a tensor, one int per batch row, but is {describe(query_offset)}"
        )
    elif abs(query_offset) > 2**31 - 1:
        raise ValueError(f"query_offset must be within 2^31 - 1 of zero, but is {query_offset}")
    return query_offset


def prepare_slopes(alibi_slopes: Tensor | None, query: Tensor, batch: int, heads: int) -> Tensor | None:
    """(batch, heads)."""
    if alibi_slopes is None:
        return None
    check_tensor("alibi_slopes", alibi_slopes)
    check_device("alibi_slopes", alibi_slopes, "query", query)
    if tuple(alibi_slopes.shape) not in ((heads,), (batch, heads)):
        raise ValueError(
            f"alibi_slopes must have shape ({heads},) or ({batch}, {heads}), but is {describe(alibi_slopes)}"
        )
    return alibi_slopes.expand(batch, heads)


def can_read(indices: Tensor) -> bool:
    """Whether the values of an index tensor may be looked at: not where that waits for a GPU or breaks a graph."""
    return indices.is_cpu and not torch.compiler.is_compiling()
