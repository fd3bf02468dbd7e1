"""Attention over packed sequences of different lengths, for training without padding."""

from __future__ import annotations

from torch import Tensor

from ..backends import dispatch
from .attention_arguments import (
    can_read,
    check_heads,
    prepare_offset,
    prepare_scale,
    prepare_slopes,
    prepare_softcap,
    prepare_window,
)
from .checks import (
    INDEX_DTYPES,
    autocast_dtype,
    check_bool,
    check_device,
    check_dtype,
    check_number,
    check_tensor,
    describe,
    is_integer,
    without_autocast,
)


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
        TypeError, ValueError: an argument has the wrong type, dtype, shape or range; the message names it. On a GPU,
            and in a compiled graph, the values of ``cu_seqlens_q`` and ``cu_seqlens_k`` are not read.
        RuntimeError: ``impl`` names an implementation that can't serve this call; the message says why.

    The native kernel reads the packed tensors as they are. Elsewhere the sequences are laid into a padded batch of
    B × max_seqlen rows, attended with their lengths, and packed again.
    """
    call = prepare(
        query, key, value, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p, is_causal, scale,
        query_offset, window, softcap, alibi_slopes, return_lse,
    )  # fmt: skip
    out, lse = without_autocast(lambda: dispatch.run(dispatch.ATTENTION_VARLEN, impl, call), query)
    return (out, lse) if return_lse else out


def prepare(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    dropout_p: float,
    is_causal: bool,
    scale: float | None,
    query_offset: int | Tensor,
    window: tuple[int, int] | None,
    softcap: float,
    alibi_slopes: Tensor | None,
    return_lse: bool,
) -> dict:
    """Check every argument and bring them to the form that implementations take: slopes (B, Hq)."""
    for name, tensor in (("query", query), ("key", key), ("value", value)):
        check_tensor(name, tensor)
        check_device(name, tensor, "query", query)
        if tensor.dim() != 3:
            raise ValueError(f"{name} must have shape (total, heads, head_dim), but is {describe(tensor)}")
    cast = autocast_dtype(query)
    if cast is not None:
        query, key, value = query.to(cast), key.to(cast), value.to(cast)
    check_dtype("key", key, "query", query)
    check_dtype("value", value, "query", query)
    (_, heads, head_dim), (total_k, kv_heads, _) = query.shape, key.shape
    check_heads("key", key, query, kv_heads, heads)
    if value.shape[:2] != (total_k, kv_heads):
        raise ValueError(f"value must have key's total length {total_k} and {kv_heads} heads, but is {describe(value)}")
    _check_seqlens("cu_seqlens_q", cu_seqlens_q, "max_seqlen_q", max_seqlen_q, query)
    _check_seqlens("cu_seqlens_k", cu_seqlens_k, "max_seqlen_k", max_seqlen_k, key)
    if cu_seqlens_k.shape != cu_seqlens_q.shape:
        raise ValueError(
            f"cu_seqlens_k must have cu_seqlens_q's shape {tuple(cu_seqlens_q.shape)}, but is {describe(cu_seqlens_k)}"
        )
    check_number("dropout_p", dropout_p, low=0, high=1)
    check_bool("is_causal", is_causal)
    check_bool("return_lse", return_lse)
    batch = cu_seqlens_q.shape[0] - 1
    return {
        "query": query,
        "key": key,
        "value": value,
        "cu_seqlens_q": cu_seqlens_q,
        "cu_seqlens_k": cu_seqlens_k,
        "max_seqlen_q": max_seqlen_q,
        "max_seqlen_k": max_seqlen_k,
        "dropout_p": float(dropout_p),
        "is_causal": is_causal,
        "scale": prepare_scale(scale, head_dim),
        "query_offset": prepare_offset(query_offset, query, batch),
        "window": prepare_window(window),
        "softcap": prepare_softcap(softcap),
        "alibi_slopes": prepare_slopes(alibi_slopes, query, batch, heads),
        "return_lse": return_lse,
    }


def _check_seqlens(name: str, cu_seqlens: Tensor, max_name: str, max_seqlen: int, packed: Tensor) -> None:
    check_tensor(name, cu_seqlens, dtypes=INDEX_DTYPES)
    check_device(name, cu_seqlens, "query", packed)
    if cu_seqlens.dim() != 1 or cu_seqlens.shape[0] < 2:
        raise ValueError(f"{name} must have shape (batch + 1,), batch at least 1, but is {describe(cu_seqlens)}")
    if not is_integer(max_seqlen):
        raise TypeError(f"{max_name} must be an int, but is {describe(max_seqlen)}")
    if max_seqlen < 0:
        raise ValueError(f"{max_name} must be at least 0, but is {max_seqlen}")
    if not can_read(cu_seqlens):
        return
    starts = cu_seqlens.tolist()
    lengths = [stop - start for start, stop in zip(starts, starts[1:], strict=False)]
    if starts[0] != 0 or starts[-1] != packed.shape[0] or min(lengths) < 0:
        raise ValueError(f"{name} must rise from 0 to the total length {packed.shape[0]}, but is {starts}")
    if max(lengths) > max_seqlen:
        raise ValueError(f"{max_name} must be at least the longest sequence, {max(lengths)}, but is {max_seqlen}")
