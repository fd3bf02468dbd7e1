"""Triton kernels of attention and its gradients: FlashAttention-2 (Dao, 2023).

Scores are never stored. The forward kernel keeps the running maximum and sum of each query's softmax (Milakov and
Gimelshein, 2018) and saves their log-sum-exp, from which the backward kernels compute the probabilities again: one
adds up the gradients of keys and values, one those of queries, each in a fixed order and without atomics.

Keys and values of the forward kernel can be fetched by pointers or, whole tiles of them, through tensor descriptors
(TMA). It is not warp-specialised: with ``tl.range(…, warp_specialize=True)`` Triton 3.9 compiles the same code for
sm_90 with 8 warps, and stops at errors of its own with 4 (NVGPUWarpSpecialization) and for sm_100
(TritonGPUHoistTMEMAlloc).

What the kernels do with a tile, and which tiles they visit, stands in ``attention_tiles``.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .arithmetic import LOG2E
from .attention_tiles import (
    batch_row,
    dot,
    is_within,
    keep,
    load,
    load_described,
    mask_scores,
    of_head,
    place,
    rows_of,
    score,
    seeing_queries,
    seen_keys,
    sequence,
    store,
    tile_number,
    tiles_of_keys,
    tiles_of_queries,
)

LN2 = tl.constexpr(0.6931471805599453)
# Numbers that change from call to call: no kernel of its own for 1 or for a multiple of 16.
VARYING = ["rows", "query_length", "key_length", "offset", "left", "right", "last_dropped"]


@triton.jit(do_not_specialize=VARYING)
def forward_kernel(
    Query,  # (B, Hq, Lq, D)
    Key,  # (B, Hk, Lk, D)
    Value,  # (B, Hk, Lk, DV)
    Out,  # (B, Hq, Lq, DV)
    Lse,  # (B, Hq, Lq) contiguous, float32
    Mask,  # (B, Hq, Lq, Lk) uint8 or float, or None
    Slopes,  # (B, Hq) contiguous, float32, or None
    Offsets, Starts, Lengths,  # (B,) int64, each or None
    Seed,  # (1,) int64, or None
    QueryStarts, KeyStarts,  # (B + 1,) int64 of packed sequences, with B strides of 0; or None
    KeyDescriptor, ValueDescriptor,  # tensor descriptors of Key and Value in tiles of BLOCK_N, or None
    query_strides, key_strides, value_strides, out_strides, mask_strides,
    heads, group, rows, query_length, key_length, scale, softcap, offset, left, right, last_dropped, keep_scale,
    D: tl.constexpr, DV: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One block of queries: (B * Hq * ceil(Lq / BLOCK_M)) programs. Lengths are those of the longest sequence."""
    tile, batch, head = place(tl.cdiv(query_length, BLOCK_M), heads)
    start_m = tile * BLOCK_M
    query_begin, query_length = sequence(QueryStarts, batch, query_length)
    key_begin, key_length = sequence(KeyStarts, batch, key_length)
    row, column = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_N)
    position, first, last = batch_row(batch, Offsets, Starts, Lengths, offset, key_length)
    lower, upper = seen_keys(start_m, row, position, first, last, left, right)
    low, high, begin, full, full_end, end = tiles_of_keys(
        start_m, position, first, last, left, right, query_length, BLOCK_M, BLOCK_N
    )
    query_matrix = of_head(Query, query_strides, batch, head, query_begin)
    key_matrix = of_head(Key, key_strides, batch, head // group, key_begin)
    value_matrix = of_head(Value, value_strides, batch, head // group, key_begin)
    mask_matrix, slope = Mask, Slopes  # None stays None, which no function of Triton 3.6 may return
    if Mask is not None:
        mask_matrix = of_head(Mask, mask_strides, batch, head, query_begin)
    if Slopes is not None:
        slope = tl.load(Slopes + batch * heads + head)

    query = load(query_matrix, query_strides[2], query_strides[3], start_m, 0, query_length, D, BLOCK_M, BLOCK_D, True)
    peak = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK_M,), tl.float32)
    out = tl.zeros((BLOCK_M, BLOCK_DV), tl.float32)
    for CHECKED in tl.static_range(2):
        for i in range(full - begin + end - full_end if CHECKED else full_end - full):
            start_n = tile_number(i, begin, full, full_end, CHECKED) * BLOCK_N
            key = load_described(
                KeyDescriptor, key_matrix, key_strides[2], key_strides[3], batch, head // group, key_begin, start_n,
                low, high, KeyStarts, D, BLOCK_N, BLOCK_D, CHECKED,
            )  # fmt: skip
            scores = score(dot(query, key.T, PRECISION), scale, softcap)
            visible = is_within(start_n + column[None, :], lower[:, None], upper[:, None])
            scores, visible = mask_scores(
                scores, row[:, None], column[None, :], start_m, start_n, visible, position, query_length, mask_matrix,
                mask_strides, slope, CHECKED,
            )  # fmt: skip
            new_peak = tl.maximum(peak, tl.max(scores, 1))
            finite = tl.where(new_peak == float("-inf"), 0.0, new_peak)
            weights = tl.exp2(scores - finite[:, None])
            shrink = tl.exp2(peak - finite)
            total = total * shrink + tl.sum(weights, 1)
            if Seed is not None:
                kept = keep(Seed, last_dropped, batch, head, start_m + row[:, None], start_n + column[None, :])
                weights = tl.where(kept, weights, 0.0)
            value = load_described(
                ValueDescriptor, value_matrix, value_strides[2], value_strides[3], batch, head // group, key_begin,
                start_n, low, high, KeyStarts, DV, BLOCK_N, BLOCK_DV, CHECKED,
            )  # fmt: skip
            if Mask is not None:  # 0 * NaN: what the mask hides from all queries of the block must not be multiplied
                seen = tl.max(visible.to(tl.int32), 0)
                value = tl.where(seen[:, None] != 0, value, 0.0)
            out = out * shrink[:, None] + dot(weights, value, PRECISION)
            peak = new_peak

    total = tl.where(total == 0, 1.0, total)
    out /= total[:, None]
    if Seed is not None:
        out *= keep_scale
    out_matrix = of_head(Out, out_strides, batch, head, query_begin)
    store(out_matrix, out_strides[2], out_strides[3], start_m, query_length, out, DV, BLOCK_M, BLOCK_DV)
    places = rows_of(Lse, QueryStarts, batch, head, heads, rows, query_begin) + start_m + row
    tl.store(places, (peak + tl.log2(total)) * LN2, mask=start_m + row < query_length)


@triton.jit(do_not_specialize=["query_length"])
def delta_kernel(
    GradOut, Out,  # (B, Hq, Lq, DV)
    GradLse,  # (B, Hq, Lq) contiguous, or None
    Delta,  # (B, Hq, Lq) contiguous, float32
    grad_out_strides, out_strides, heads, query_length,
    DV: tl.constexpr, BLOCK_DV: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    """What every key's part of a query's gradient has in common: sum(grad_out * out) - grad_lse."""
    tile, batch, head = place(tl.cdiv(query_length, BLOCK_M), heads)
    start = tile * BLOCK_M
    row = start + tl.arange(0, BLOCK_M)
    grad_matrix = of_head(GradOut, grad_out_strides, batch, head, 0)
    out_matrix = of_head(Out, out_strides, batch, head, 0)
    grad = load(
        grad_matrix, grad_out_strides[2], grad_out_strides[3], start, 0, query_length, DV, BLOCK_M, BLOCK_DV, True
    )
    out = load(out_matrix, out_strides[2], out_strides[3], start, 0, query_length, DV, BLOCK_M, BLOCK_DV, True)
    delta = tl.sum(grad.to(tl.float32) * out.to(tl.float32), 1)
    place_of_row = (batch * heads + head) * query_length + row
    if GradLse is not None:
        delta -= tl.load(GradLse + place_of_row, mask=row < query_length, other=0.0).to(tl.float32)
    tl.store(Delta + place_of_row, delta, mask=row < query_length)


@triton.jit
def load_rows(values, start, query_length, other, BLOCK_M: tl.constexpr):
    """A block of a head's numbers, float32."""
    row = start + tl.arange(0, BLOCK_M)
    return tl.load(values + row, mask=row < query_length, other=other)


@triton.jit
def load_lse(values, start, query_length, BLOCK_M: tl.constexpr):
    """In units of log 2; +inf for a query that sees nothing or is none, so that its probabilities are zero."""
    lse = load_rows(values, start, query_length, float("-inf"), BLOCK_M)
    return tl.where(lse == float("-inf"), float("inf"), lse * LOG2E)


@triton.jit(do_not_specialize=VARYING)
def backward_query_kernel(
    GradOut,  # (B, Hq, Lq, DV)
    Query, Key, Value,
    Lse, Delta,  # (B, Hq, Lq) contiguous, float32
    GradQuery,  # like Query
    GradMask,  # (B, Hq, Lq, Lk) contiguous, float32 and zero; or None
    Mask, Slopes, Offsets, Starts, Lengths, Seed, QueryStarts, KeyStarts,
    grad_out_strides, query_strides, key_strides, value_strides, grad_query_strides, mask_strides,
    heads, group, rows, query_length, key_length, scale, softcap, offset, left, right, last_dropped, keep_scale,
    D: tl.constexpr, DV: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """The gradient of one block of queries, and of their rows of the mask: as many programs as forward_kernel's."""
    tile, batch, head = place(tl.cdiv(query_length, BLOCK_M), heads)
    start_m = tile * BLOCK_M
    query_begin, query_length = sequence(QueryStarts, batch, query_length)
    key_begin, key_length = sequence(KeyStarts, batch, key_length)
    row, column = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_N)
    position, first, last = batch_row(batch, Offsets, Starts, Lengths, offset, key_length)
    lower, upper = seen_keys(start_m, row, position, first, last, left, right)
    low, high, begin, full, full_end, end = tiles_of_keys(
        start_m, position, first, last, left, right, query_length, BLOCK_M, BLOCK_N
    )
    pair = batch * heads + head
    query_matrix = of_head(Query, query_strides, batch, head, query_begin)
    grad_out_matrix = of_head(GradOut, grad_out_strides, batch, head, query_begin)
    key_matrix = of_head(Key, key_strides, batch, head // group, key_begin)
    value_matrix = of_head(Value, value_strides, batch, head // group, key_begin)
    mask_matrix, slope = Mask, Slopes  # None stays None, which no function of Triton 3.6 may return
    if Mask is not None:
        mask_matrix = of_head(Mask, mask_strides, batch, head, query_begin)
    if Slopes is not None:
        slope = tl.load(Slopes + pair)

    query = load(query_matrix, query_strides[2], query_strides[3], start_m, 0, query_length, D, BLOCK_M, BLOCK_D, True)
    grad_out = load(
        grad_out_matrix, grad_out_strides[2], grad_out_strides[3], start_m, 0, query_length, DV, BLOCK_M, BLOCK_DV, True
    )
    lse = load_lse(rows_of(Lse, QueryStarts, batch, head, heads, rows, query_begin), start_m, query_length, BLOCK_M)
    deltas = rows_of(Delta, QueryStarts, batch, head, heads, rows, query_begin)
    delta = load_rows(deltas, start_m, query_length, 0.0, BLOCK_M)
    grad_query = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    for CHECKED in tl.static_range(2):
        for i in range(full - begin + end - full_end if CHECKED else full_end - full):
            start_n = tile_number(i, begin, full, full_end, CHECKED) * BLOCK_N
            key = load(key_matrix, key_strides[2], key_strides[3], start_n, low, high, D, BLOCK_N, BLOCK_D, CHECKED)
            value = load(
                value_matrix, value_strides[2], value_strides[3], start_n, low, high, DV, BLOCK_N, BLOCK_DV, CHECKED
            )
            scores = score(dot(query, key.T, PRECISION), scale, softcap)
            if softcap is not None:
                capped = scores / (softcap * LOG2E)
            visible = is_within(start_n + column[None, :], lower[:, None], upper[:, None])
            scores, visible = mask_scores(
                scores, row[:, None], column[None, :], start_m, start_n, visible, position, query_length, mask_matrix,
                mask_strides, slope, CHECKED,
            )  # fmt: skip
            weights = tl.exp2(scores - lse[:, None])
            grad_weights = dot(grad_out, value.T, PRECISION)
            if Seed is not None:
                kept = keep(Seed, last_dropped, batch, head, start_m + row[:, None], start_n + column[None, :])
                grad_weights = tl.where(kept, grad_weights * keep_scale, 0.0)
            grad_scores = weights * (grad_weights - delta[:, None])
            if CHECKED or Mask is not None:  # 0 * NaN, where an unseen value is NaN
                grad_scores = tl.where(visible, grad_scores, 0.0)
            if GradMask is not None:
                places = GradMask + (pair * query_length + start_m + row[:, None]) * key_length
                inside = visible & (start_m + row[:, None] < query_length)
                tl.store(places + start_n + column[None, :], grad_scores, mask=inside)
            if softcap is not None:
                grad_scores *= 1 - capped * capped
            if Mask is not None:
                seen = tl.max(visible.to(tl.int32), 0)
                key = tl.where(seen[:, None] != 0, key, 0.0)
            grad_query += dot(grad_scores, key, PRECISION)

    grad_query_matrix = of_head(GradQuery, grad_query_strides, batch, head, query_begin)
    store(
        grad_query_matrix, grad_query_strides[2], grad_query_strides[3], start_m, query_length, grad_query * scale,
        D, BLOCK_M, BLOCK_D,
    )  # fmt: skip


@triton.jit(do_not_specialize=VARYING)
def backward_key_value_kernel(
    GradOut,  # (B, Hq, Lq, DV)
    Query, Key, Value,
    Lse, Delta,  # (B, Hq, Lq) contiguous, float32
    GradKey, GradValue,  # like Key and Value
    Mask, Slopes, Offsets, Starts, Lengths, Seed, QueryStarts, KeyStarts,
    grad_out_strides, query_strides, key_strides, value_strides, grad_key_strides, grad_value_strides, mask_strides,
    heads, group, rows, query_length, key_length, scale, softcap, offset, left, right, last_dropped, keep_scale,
    D: tl.constexpr, DV: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """The gradients of one tile of keys and values, over all query heads that share them: (B * Hk * ceil(Lk / BLOCK_N))
    programs. Scores are transposed, (keys, queries), so that they multiply from the left as they are."""
    tile, batch, key_head = place(tl.cdiv(key_length, BLOCK_N), heads // group)
    start_n = tile * BLOCK_N
    query_begin, query_length = sequence(QueryStarts, batch, query_length)
    key_begin, key_length = sequence(KeyStarts, batch, key_length)
    row, column = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_N)
    position, first, last = batch_row(batch, Offsets, Starts, Lengths, offset, key_length)
    lower, upper = seeing_queries(start_n, column, position, first, last, left, right, query_length)
    low, high, begin, full, full_end, end = tiles_of_queries(
        start_n, position, first, last, left, right, query_length, BLOCK_M, BLOCK_N
    )
    key_matrix = of_head(Key, key_strides, batch, key_head, key_begin)
    value_matrix = of_head(Value, value_strides, batch, key_head, key_begin)
    key = load(key_matrix, key_strides[2], key_strides[3], start_n, 0, key_length, D, BLOCK_N, BLOCK_D, True)
    value = load(value_matrix, value_strides[2], value_strides[3], start_n, 0, key_length, DV, BLOCK_N, BLOCK_DV, True)
    grad_key = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
    grad_value = tl.zeros((BLOCK_N, BLOCK_DV), tl.float32)
    for CHECKED in tl.static_range(2):
        count = full - begin + end - full_end if CHECKED else full_end - full
        for i in range(group * count):  # one loop, so that the loads of the next head are ahead of its turn too
            head = key_head * group + i // count
            pair = batch * heads + head
            query_matrix = of_head(Query, query_strides, batch, head, query_begin)
            grad_out_matrix = of_head(GradOut, grad_out_strides, batch, head, query_begin)
            mask_matrix, slope = Mask, Slopes  # None stays None, which no function of Triton 3.6 may return
            if Mask is not None:
                mask_matrix = of_head(Mask, mask_strides, batch, head, query_begin)
            if Slopes is not None:
                slope = tl.load(Slopes + pair)
            start_m = tile_number(i % count, begin, full, full_end, CHECKED) * BLOCK_M
            query = load(
                query_matrix, query_strides[2], query_strides[3], start_m, low, high, D, BLOCK_M, BLOCK_D, CHECKED
            )
            grad_out = load(
                grad_out_matrix, grad_out_strides[2], grad_out_strides[3], start_m, low, high, DV, BLOCK_M,
                BLOCK_DV, CHECKED,
            )  # fmt: skip
            sums = rows_of(Lse, QueryStarts, batch, head, heads, rows, query_begin)
            lse = load_lse(sums, start_m, query_length, BLOCK_M)
            deltas = rows_of(Delta, QueryStarts, batch, head, heads, rows, query_begin)
            delta = load_rows(deltas, start_m, query_length, 0.0, BLOCK_M)
            scores = score(dot(key, query.T, PRECISION), scale, softcap)
            if softcap is not None:
                capped = scores / (softcap * LOG2E)
            visible = is_within(start_m + row[None, :], lower[:, None], upper[:, None])
            scores, visible = mask_scores(
                scores, row[None, :], column[:, None], start_m, start_n, visible, position, query_length,
                mask_matrix, mask_strides, slope, CHECKED,
            )  # fmt: skip
            weights = tl.exp2(scores - lse[None, :])
            grad_weights = dot(value, grad_out.T, PRECISION)
            dropped = weights
            if Seed is not None:
                kept = keep(Seed, last_dropped, batch, head, start_m + row[None, :], start_n + column[:, None])
                dropped = tl.where(kept, weights, 0.0)
                grad_weights = tl.where(kept, grad_weights * keep_scale, 0.0)
            grad_value += dot(dropped, grad_out, PRECISION)
            grad_scores = weights * (grad_weights - delta[None, :])
            if CHECKED or Mask is not None:
                grad_scores = tl.where(visible, grad_scores, 0.0)
            if softcap is not None:
                grad_scores *= 1 - capped * capped
            if Mask is not None:  # a query that sees nothing may be NaN
                query = tl.where(lse[:, None] != float("inf"), query, 0.0)
            grad_key += dot(grad_scores, query, PRECISION)

    if Seed is not None:
        grad_value *= keep_scale
    grad_key_matrix = of_head(GradKey, grad_key_strides, batch, key_head, key_begin)
    grad_value_matrix = of_head(GradValue, grad_value_strides, batch, key_head, key_begin)
    store(
        grad_key_matrix, grad_key_strides[2], grad_key_strides[3], start_n, key_length, grad_key * scale,
        D, BLOCK_N, BLOCK_D,
    )  # fmt: skip
    store(
        grad_value_matrix, grad_value_strides[2], grad_value_strides[3], start_n, key_length, grad_value,
        DV, BLOCK_N, BLOCK_DV,
    )  # fmt: skip
