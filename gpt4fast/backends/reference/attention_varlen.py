"""Attention over packed sequences by way of a padded batch, on any implementation of ``attention``.

Packed tensors are (total, H, …), padded ones (B, H, length, …).
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


def attention_varlen(
    attend: Callable,
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
) -> tuple[Tensor, Tensor | None]:
    """Output (total_q, Hq, Dv) and, if asked for, the log-sum-exp (total_q, Hq), computed by ``attend``."""
    place_q, place_k = places(cu_seqlens_q, query.shape[0]), places(cu_seqlens_k, key.shape[0])
    batch = cu_seqlens_q.shape[0] - 1
    out, lse = attend(
        pad(query, place_q, batch, max_seqlen_q), pad(key, place_k, batch, max_seqlen_k),
        pad(value, place_k, batch, max_seqlen_k), None, dropout_p, is_causal, scale, query_offset,
        cu_seqlens_k.diff(), None, window, softcap, alibi_slopes, return_lse,
    )  # fmt: skip
    return pack(out, place_q), pack(lse, place_q) if return_lse else None


def places(cu_seqlens: Tensor, total: int) -> tuple[Tensor, Tensor]:
    """Of each packed row, the number of its sequence and its place in it."""
    rows = torch.arange(total, device=cu_seqlens.device, dtype=cu_seqlens.dtype)
    sequence = torch.searchsorted(cu_seqlens[1:].contiguous(), rows, right=True)
    return sequence, rows - cu_seqlens[sequence]


def pad(packed: Tensor, place: tuple[Tensor, Tensor], batch: int, length: int) -> Tensor:
    """Packed to padded, with zeros after the end of each sequence."""
    zeros = packed.new_zeros(batch, length, *packed.shape[1:])
    return zeros.index_put(place, packed).transpose(1, 2)


def pack(padded: Tensor, place: tuple[Tensor, Tensor]) -> Tensor:
    return padded.transpose(1, 2)[place]
