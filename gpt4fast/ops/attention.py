"""Scaled dot-product attention with torch's signature, and everything a decoder, an encoder or a server adds to it."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..backends import dispatch
from .checks import (
    FLOAT_DTYPES,
    autocast_dtype,
    check_bool,
    check_device,
    check_finite,
    check_index_tensor,
    check_like,
    check_number,
    check_tensor,
    describe,
    is_integer,
    without_autocast,
)


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    *,
    query_offset: int | Tensor = 0,
    kv_lengths: Tensor | None = None,
    kv_starts: Tensor | None = None,
    window: tuple[int, int] | None = None,
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    return_lse: bool = False,
    impl: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """``softmax(scale * query @ key^T + mask) @ value``, fused. First and second derivatives are supported.

    Key ``j`` is visible to query ``i`` when all of these hold: causal ``j <= i + query_offset``; window, around
    ``i + query_offset``; ``kv_starts[b] <= j < kv_lengths[b]``; a boolean mask is True; a float mask is not -inf.
    The steps, in order: scale, softcap, float mask, ALiBi, softmax, dropout, value. A query that sees nothing gives
    zeros, log-sum-exp -inf and zero gradients; what no query sees never reaches the output, even if NaN.

    Args:
        query: (..., Hq, Lq, D), float16, bfloat16, float32 or float64, any strides; (Hq, Lq, D) and (Lq, D) work too.
        key: (..., Hk, Lk, D), Hq a multiple of Hk (grouped-query attention).
        value: (..., Hk, Lk, Dv).
        attn_mask: bool (True: visible) or float (added to the scores), broadcastable to (..., Hq, Lq, Lk). A float
            mask may require a gradient.
        dropout_p: probability of dropping a weight, in [0, 1]; drawn from torch's generator, always applied, as in
            torch.
        is_causal: hide keys after the query's position. Unlike torch's, it may be combined with ``attn_mask``.
        scale: factor of the scores; 1 / sqrt(D) by default.
        query_offset: position of the first query among the keys: an int, or a tensor (B,). 0 is torch's (top-left)
            causal alignment, Lk - Lq the bottom-right one.
        kv_lengths, kv_starts: int32 or int64 (B,): each row's keys are ``kv_starts[b] <= j < kv_lengths[b]``.
        window: (left, right): keys at most that far from the query's position; -1 is unlimited.
        softcap: scores become ``softcap * tanh(scores / softcap)``; 0 is off (Gemma 2).
        alibi_slopes: (Hq,) or (B, Hq): adds ``-slope * |i + query_offset - j|`` (Press et al., 2022).
        return_lse: also return the log-sum-exp of the scores (..., Hq, Lq), float32 (float64 for float64).
        impl: "auto" (default), "native", "triton", "cuda", "reference" or "torch"; see ``gpt4fast.explain``.

    Returns:
        (..., Hq, Lq, Dv) in query's dtype; with ``return_lse`` a pair.

    Raises:
        TypeError, ValueError: an argument has the wrong type, dtype, shape or range; the message names it.
        RuntimeError: ``impl`` names an implementation that can't serve this call; the message says why.

    Reference: FlashAttention-2 (Dao, 2023); softmax as in Milakov and Gimelshein, 2018. B is the product of the leading
    dimensions.
    """
    call, batch_shape = prepare(
        query, key, value, attn_mask, dropout_p, is_causal, scale, query_offset, kv_lengths, kv_starts, window, softcap,
        alibi_slopes, return_lse,
    )  # fmt: skip
    return run(call, batch_shape, query, impl)


def run(call: dict, batch_shape: tuple[int, ...], query: Tensor, impl: str | None):
    """Compute a prepared call and give the result the caller's number of dimensions."""
    out, lse = without_autocast(lambda: dispatch.run(dispatch.ATTENTION, impl, call), query)
    return_lse = call["return_lse"]
    if query.dim() != 4:
        shape = query.shape[:0] if query.dim() == 2 else (*batch_shape, out.shape[1])
        out = out.reshape(*shape, *out.shape[2:])
        lse = lse.reshape(*shape, lse.shape[2]) if return_lse else None
    return (out, lse) if return_lse else out


def prepare(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None,
    dropout_p: float,
    is_causal: bool,
    scale: float | None,
    query_offset: int | Tensor,
    kv_lengths: Tensor | None,
    kv_starts: Tensor | None,
    window: tuple[int, int] | None,
    softcap: float,
    alibi_slopes: Tensor | None,
    return_lse: bool,
) -> tuple[dict, tuple[int, ...]]:
    """Check every argument and bring them to the form that implementations take: 4-D operands, a mask of 4 dimensions
    and slopes (B, Hq). Also returned: the batch dimensions of the result."""
    check_tensor("query", query)
    for name, tensor in (("key", key), ("value", value)):
        check_tensor(name, tensor)
        check_device(name, tensor, "query", query)
        if tensor.dim() != query.dim():
            raise ValueError(f"{name} must have as many dimensions as query, {query.dim()}, but is {describe(tensor)}")
    if query.dim() < 2:
        raise ValueError(f"query must have shape (..., heads, length, head_dim), but is {describe(query)}")
    cast = autocast_dtype(query)
    if cast is not None:
        query, key, value = query.to(cast), key.to(cast), value.to(cast)
    check_like("key", key, "query", query)
    check_like("value", value, "query", query)
    check_bool("is_causal", is_causal)
    check_bool("return_lse", return_lse)
    check_number("dropout_p", dropout_p, low=0, high=1)
    check_number("softcap", softcap, low=0, high=float("inf"), high_open=True)
    if scale is not None:
        check_finite("scale", scale)
    _check_window(window)

    dims = query.dim()
    if dims == 2:
        query, key, value = (t.unsqueeze(0) for t in (query, key, value))
    _check_sizes(query, key, value)
    batch_shape = query.shape[:-3]
    if key.shape[:-3] != batch_shape or value.shape[:-3] != batch_shape:
        batch_shape = _broadcast_batch(query, key, value)
        query, key, value = (t.expand(*batch_shape, *t.shape[-3:]) for t in (query, key, value))
    batch = math.prod(batch_shape)
    mask_shape = (*batch_shape, query.shape[-3], query.shape[-2], key.shape[-2])
    if dims != 4:
        query, key, value = (t.reshape(batch, *t.shape[-3:]) for t in (query, key, value))
    call = {
        "query": query,
        "key": key,
        "value": value,
        "attn_mask": None if attn_mask is None else _prepare_mask(attn_mask, query, mask_shape),
        "dropout_p": float(dropout_p),
        "is_causal": is_causal,
        "scale": (query.shape[-1] ** -0.5 if query.shape[-1] else 1.0) if scale is None else float(scale),
        "query_offset": _prepare_offset(query_offset, query),
        "kv_lengths": kv_lengths,
        "kv_starts": kv_starts,
        "window": None if window is None or tuple(window) == (-1, -1) else tuple(window),
        "softcap": float(softcap),
        "alibi_slopes": None if alibi_slopes is None else _prepare_slopes(alibi_slopes, query),
        "return_lse": return_lse,
    }
    for name in ("kv_lengths", "kv_starts"):
        if call[name] is not None:
            check_index_tensor(name, call[name], batch, "batch row", "query", query)
    return call, tuple(batch_shape)


def _check_sizes(query: Tensor, key: Tensor, value: Tensor) -> None:
    if key.shape[-1] != query.shape[-1]:
        raise ValueError(f"key must have query's head_dim {query.shape[-1]} last, but is {describe(key)}")
    if value.shape[-3:-1] != key.shape[-3:-1]:
        heads, length = key.shape[-3:-1]
        raise ValueError(f"value must have key's {heads} heads and length {length}, but is {describe(value)}")
    heads, kv_heads = query.shape[-3], key.shape[-3]
    if heads != kv_heads and (kv_heads == 0 or heads % kv_heads):
        raise ValueError(f"key must have a number of heads that divides query's {heads}, but is {describe(key)}")


def _broadcast_batch(query: Tensor, key: Tensor, value: Tensor) -> tuple[int, ...]:
    try:
        return tuple(torch.broadcast_shapes(query.shape[:-3], key.shape[:-3], value.shape[:-3]))
    except RuntimeError:
        raise ValueError(
            f"key and value must have query's batch dimensions {tuple(query.shape[:-3])}, or ones that broadcast to "
            f"them, but key is {describe(key)} and value is {describe(value)}"
        ) from None


def _check_window(window: object) -> None:
    if window is None:
        return
    if not isinstance(window, (tuple, list)) or len(window) != 2 or not all(is_integer(side) for side in window):
        raise TypeError(f"window must be None or (left, right), two ints, but is {describe(window)}")
    if min(window) < -1 or max(window) > 2**31 - 1:
        raise ValueError(f"window must have sides from -1 (unlimited) to 2^31 - 1, but is {tuple(window)}")


def _prepare_mask(attn_mask: Tensor, query: Tensor, shape: tuple[int, ...]) -> Tensor:
    check_tensor("attn_mask", attn_mask, dtypes=(torch.bool, *FLOAT_DTYPES))
    check_device("attn_mask", attn_mask, "query", query)
    sizes = attn_mask.shape
    fits = len(sizes) <= len(shape) and all(a in (1, b) for a, b in zip(reversed(sizes), reversed(shape), strict=False))
    if not fits:
        raise ValueError(
            f"attn_mask must broadcast to {shape} (batch, heads, queries, keys), but is {describe(attn_mask)}"
        )
    if len(shape) > 4:
        return attn_mask.expand(shape).reshape(-1, *shape[-3:])
    return attn_mask[(None,) * (4 - attn_mask.dim())]


def _prepare_offset(query_offset: object, query: Tensor) -> int | Tensor:
    if isinstance(query_offset, Tensor):
        check_index_tensor("query_offset", query_offset, query.shape[0], "batch row", "query", query)
    elif not is_integer(query_offset):
        raise TypeError(
            f"query_offset must be an int or a tensor, one int per batch row, but is {describe(query_offset)}"
        )
    elif abs(query_offset) > 2**31 - 1:
        raise ValueError(f"query_offset must be within 2^31 - 1 of zero, but is {query_offset}")
    return query_offset


def _prepare_slopes(alibi_slopes: Tensor, query: Tensor) -> Tensor:
    check_tensor("alibi_slopes", alibi_slopes)
    check_device("alibi_slopes", alibi_slopes, "query", query)
    batch, heads = query.shape[:2]
    if tuple(alibi_slopes.shape) not in ((heads,), (batch, heads)):
        raise ValueError(
            f"alibi_slopes must have shape ({heads},) or ({batch}, {heads}), but is {describe(alibi_slopes)}"
        )
    return alibi_slopes.expand(batch, heads)
