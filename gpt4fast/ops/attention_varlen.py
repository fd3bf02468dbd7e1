"""Attention over packed sequences of different lengths, for training without padding."""

from __future__ import annotations

import torch
from torch import Tensor

from .attention import attention
from .checks import INDEX_DTYPES, check_device, check_tensor, describe, is_integer


def attention_varlen(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    *,
    query_offset: int | Tensor = 0,
    window: tuple[int, int] | None = None,
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    return_lse: bool = False,
    impl: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """``attention`` within each of B sequences that lie one after another in packed tensors.

    Args:
        query: (total_q, Hq, D); key: (total_k, Hk, D); value: (total_k, Hk, Dv). Dtypes as for ``attention``.
        cu_seqlens_q, cu_seqlens_k: int32 or int64 (B + 1,): sequence b is rows ``cu_seqlens[b]`` to
            ``cu_seqlens[b + 1]``. They start at 0, never decrease, and end at total_q and total_k.
        max_seqlen_q, max_seqlen_k: the longest sequence's length, or more.
        query_offset: int or (B,). Positions count from each sequence's start; flash-attn's causal alignment (bottom
            right) is ``query_offset=(cu_seqlens_k.diff() - cu_seqlens_q.diff())``.
        dropout_p, is_causal, scale, window, softcap, alibi_slopes, return_lse, impl: as for ``attention``.

    Returns:
        (total_q, Hq, Dv); with ``return_lse`` also the log-sum-exp, (total_q, Hq).

    Raises:
        TypeError, ValueError: an argument has the wrong type, dtype, shape or range; the message names it.

    The sequences are gathered into a padded batch of B × max_seqlen rows, attended with their lengths, and packed
    again.
    """
    for name, tensor in (("query", query), ("key", key), ("value", value)):
        check_tensor(name, tensor)
        if tensor.dim() != 3:
            raise ValueError(f"{name} must have shape (total, heads, head_dim), but is {describe(tensor)}")
    if value.shape[0] != key.shape[0]:
        raise ValueError(f"value must have key's total length {key.shape[0]} first, but is {describe(value)}")
    _check_seqlens("cu_seqlens_q", cu_seqlens_q, "max_seqlen_q", max_seqlen_q, query)
    _check_seqlens("cu_seqlens_k", cu_seqlens_k, "max_seqlen_k", max_seqlen_k, key)
    if cu_seqlens_k.shape != cu_seqlens_q.shape:
        raise ValueError(
            f"cu_seqlens_k must have cu_seqlens_q's shape {tuple(cu_seqlens_q.shape)}, but is {describe(cu_seqlens_k)}"
        )

    padded = [
        _pad(query, cu_seqlens_q, max_seqlen_q),
        _pad(key, cu_seqlens_k, max_seqlen_k),
        _pad(value, cu_seqlens_k, max_seqlen_k),
    ]
    result = attention(
        *padded, None, dropout_p, is_causal, scale, query_offset=query_offset, kv_lengths=cu_seqlens_k.diff(),
        window=window, softcap=softcap, alibi_slopes=alibi_slopes, return_lse=return_lse, impl=impl,
    )  # fmt: skip
    rows = torch.arange(query.shape[0], device=query.device)
    sequence = torch.searchsorted(cu_seqlens_q[1:].contiguous(), rows.to(cu_seqlens_q.dtype), right=True)
    within = rows - cu_seqlens_q[sequence]
    if not return_lse:
        return result[sequence, :, within]
    return result[0][sequence, :, within], result[1][sequence, :, within]


def _check_seqlens(name: str, cu_seqlens: Tensor, max_name: str, max_seqlen: int, packed: Tensor) -> None:
    check_tensor(name, cu_seqlens, dtypes=INDEX_DTYPES)
    check_device(name, cu_seqlens, "query", packed)
    if cu_seqlens.dim() != 1 or cu_seqlens.shape[0] < 2:
        raise ValueError(f"{name} must have shape (batch + 1,), batch at least 1, but is {describe(cu_seqlens)}")
    if not is_integer(max_seqlen):
        raise TypeError(f"{max_name} must be an int, but is {describe(max_seqlen)}")
    if max_seqlen < 0:
        raise ValueError(f"{max_name} must be at least 0, but is {max_seqlen}")
    if torch.compiler.is_compiling() or packed.device.type != "cpu":
        return  # reading the values would break the graph, or wait for the GPU
    lengths = cu_seqlens.diff()
    if cu_seqlens[0] != 0 or cu_seqlens[-1] != packed.shape[0] or (lengths < 0).any():
        raise ValueError(f"{name} must rise from 0 to the total length {packed.shape[0]}, but is {cu_seqlens.tolist()}")
    if lengths.max() > max_seqlen:
        raise ValueError(f"{max_name} must be at least the longest sequence, {int(lengths.max())}, but is {max_seqlen}")


def _pad(packed: Tensor, cu_seqlens: Tensor, length: int) -> Tensor:
    """(total, H, D) -> (B, H, length, D). Rows past a sequence's end repeat its last one; kv_lengths hides them."""
    if packed.shape[0] == 0:
        return packed.new_zeros(cu_seqlens.shape[0] - 1, packed.shape[1], length, packed.shape[2])
    index = torch.arange(length, device=packed.device) + cu_seqlens[:-1, None]
    last = (cu_seqlens[1:, None] - 1).clamp(min=0)
    return packed[torch.minimum(index, last)].transpose(1, 2)
