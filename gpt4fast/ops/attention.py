"""Scaled dot-product attention with torch's signature, and everything a decoder, an encoder or a server adds to it."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..backends import dispatch
from .attention_arguments import (
    check_heads,
    prepare_offset,
    prepare_scale,
    prepare_slopes,
    prepare_softcap,
    prepare_window,
)
from .checks import (
    FLOAT_DTYPES,
    autocast_dtype,
    check_bool,
    check_device,
    check_dtype,
    check_index_tensor,
    check_number,
    check_tensor,
    describe,
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
        dropout_p: probability of dropping a weight, in [0, 1]; always applied, as in torch. Torch's generator gives
            one seed; which weights are dropped follows from it, from their place and from nothing else.
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
    out, lse = without_autocast(lambda: dispatch.run(dispatch.ATTENTION, impl, call), query)
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
    dims = query.dim()
    if dims < 2:
        raise ValueError(f"query must have shape (..., heads, length, head_dim), but is {describe(query)}")
    for name, tensor in (("key", key), ("value", value)):
        check_tensor(name, tensor)
        check_device(name, tensor, "query", query)
        if tensor.dim() != dims:
            raise ValueError(f"{name} must have as many dimensions as query, {dims}, but is {describe(tensor)}")
    cast = autocast_dtype(query)
    if cast is not None:
        query, key, value = query.to(cast), key.to(cast), value.to(cast)
    check_dtype("key", key, "query", query)
    check_dtype("value", value, "query", query)
    check_bool("is_causal", is_causal)
    check_bool("return_lse", return_lse)
    check_number("dropout_p", dropout_p, low=0, high=1)

    if dims == 2:
        query, key, value = (t.unsqueeze(0) for t in (query, key, value))
    *batch_shape, heads, rows, head_dim = query.shape
    *key_batch, kv_heads, columns, _ = key.shape
    *value_batch, value_heads, value_columns, _ = value.shape
    check_heads("key", key, query, kv_heads, heads)
    if value_heads != kv_heads or value_columns != columns:
        raise ValueError(f"value must have key's {kv_heads} heads and length {columns}, but is {describe(value)}")
    if not batch_shape == key_batch == value_batch:
        batch_shape = _broadcast_batch(query, key, value)
        query, key, value = (t.expand(*batch_shape, *t.shape[-3:]) for t in (query, key, value))
    batch = math.prod(batch_shape)
    if dims != 4:
        query, key, value = (t.reshape(batch, *t.shape[-3:]) for t in (query, key, value))
    if attn_mask is not None:
        attn_mask = _prepare_mask(attn_mask, query, (*batch_shape, heads, rows, columns))
    for name, bounds in (("kv_lengths", kv_lengths), ("kv_starts", kv_starts)):
        if bounds is not None:
            check_index_tensor(name, bounds, batch, "batch row", "query", query)
    call = {
        "query": query,
        "key": key,
        "value": value,
        "attn_mask": attn_mask,
        "dropout_p": float(dropout_p),
        "is_causal": is_causal,
        "scale": prepare_scale(scale, head_dim),
        "query_offset": prepare_offset(query_offset, query, batch),
        "kv_lengths": kv_lengths,
        "kv_starts": kv_starts,
        "window": prepare_window(window),
        "softcap": prepare_softcap(softcap),
        "alibi_slopes": prepare_slopes(alibi_slopes, query, batch, heads),
        "return_lse": return_lse,
    }
    return call, tuple(batch_shape)


def _broadcast_batch(query: Tensor, key: Tensor, value: Tensor) -> tuple[int, ...]:
    try:
        return tuple(torch.broadcast_shapes(query.shape[:-3], key.shape[:-3], value.shape[:-3]))
    except RuntimeError:
        raise ValueError(
            f"key and value must have query's batch dimensions {tuple(query.shape[:-3])}, or ones that broadcast to "
            f"them, but key is {describe(key)} and value is {describe(value)}"
        ) from None


def _prepare_mask(attn_mask: Tensor, query: Tensor, shape: tuple[int, ...]) -> Tensor:
    """The mask in 4 dimensions, each 1 or full."""
    check_tensor("attn_mask", attn_mask, dtypes=(torch.bool, *FLOAT_DTYPES))
    check_device("attn_mask", attn_mask, "query", query)
    sizes = attn_mask.shape
    fits = len(sizes) <= len(shape) and all(a in (1, b) for a, b in zip(reversed(sizes), reversed(shape), strict=False))
    if not fits:
        raise ValueError(
            f"attn_mask must broadcast to {shape} (batch, heads, queries, keys), but is {describe(attn_mask)}"
        )
    mask = attn_mask[(None,) * (max(len(shape), 4) - attn_mask.dim())]
    if mask.dim() > 4:  # the batch dimensions become one, of size 1 where all of them are
        if math.prod(mask.shape[:-3]) != 1:
            mask = mask.expand(*shape[:-3], *mask.shape[-3:])
        mask = mask.reshape(math.prod(mask.shape[:-3]), *mask.shape[-3:])
    return mask
