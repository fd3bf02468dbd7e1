"""Triton kernels of attention and its gradients: FlashAttention-2 (Dao, 2023).

Scores are never stored. The forward kernel keeps the running maximum and sum of each query's softmax (Milakov and
Gimelshein, 2018) and saves their log-sum-exp, from which the backward kernels compute the probabilities again: one
adds up the gradients of keys and values, one those of queries, each in a fixed order and without atomics.

Which keys a query may see by its place (causal, window, starts, lengths) is one interval ``lower <= j < upper``. Tiles
of keys that every query of a block sees run without a check, in a first loop; the tiles at the edges in a second; and
tiles that no query sees in neither.
"""

from __future__ import annotations

import triton
import triton.language as tl
from triton import knobs

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)
LOWEST = tl.constexpr(-3.4e38)  # nearly the lowest float32

# The interpreter keeps bfloat16 as integers, and its product would multiply those.
WIDEN = tl.constexpr(knobs.runtime.interpret)

# Numbers that change from call to call: no kernel of its own for 1 or for a multiple of 16.
VARYING = ["query_length", "key_length", "offset", "left", "right", "last_dropped"]


@triton.jit
def dot(a, b, PRECISION: tl.constexpr):
    """a @ b in float32; a is rounded to b's dtype."""
    if WIDEN and b.dtype == tl.bfloat16:
        a, b = a.to(tl.float32), b.to(tl.float32)
    return tl.dot(a.to(b.dtype), b, input_precision=PRECISION)


@triton.jit
def tanh(x):
    far = 1 - 2 / (1 + tl.exp2(x * (2 * LOG2E)))
    # Near zero 1 - 2 / 2 would cancel: the series of tanh(x) / x.
    s = x * x
    near = 1 + s * (-1 / 3 + s * (2 / 15 + s * (-17 / 315 + s * (62 / 2835))))
    return tl.where(s < 0.0625, x * near, far)


@triton.jit
def place(tiles, heads):
    """This program's tile, batch row and head. Tiles in descending order: under a causal mask the last ones have the
    most to do, and so are not left to the end."""
    index = tl.program_id(0)
    pair = index // tiles
    return tiles - 1 - index % tiles, (pair // heads).to(tl.int64), (pair % heads).to(tl.int64)


@triton.jit
def pointers(matrix, row_stride, column_stride, start, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """(ROWS, COLUMNS), from row ``start``. Only the start needs 64 bits."""
    rows, columns = tl.arange(0, ROWS)[:, None], tl.arange(0, COLUMNS)[None, :]
    return matrix + start.to(tl.int64) * row_stride + rows * row_stride + columns * column_stride


@triton.jit
def load(
    matrix, row_stride, column_stride, start, low, high,
    WIDTH: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, CHECKED: tl.constexpr,
):  # fmt: skip
    """ROWS rows of (L, WIDTH) from row ``start``: zeros beyond the width and, if checked, outside low <= row < high."""
    places = pointers(matrix, row_stride, column_stride, start, ROWS, COLUMNS)
    row, column = start + tl.arange(0, ROWS)[:, None], tl.arange(0, COLUMNS)[None, :]
    if CHECKED and WIDTH < COLUMNS:
        return tl.load(places, mask=(row >= low) & (row < high) & (column < WIDTH), other=0.0)
    elif CHECKED:
        return tl.load(places, mask=(row >= low) & (row < high), other=0.0)
    elif WIDTH < COLUMNS:
        return tl.load(places, mask=column < WIDTH, other=0.0)
    else:
        return tl.load(places)


@triton.jit
def store(
    matrix, row_stride, column_stride, start, high, block,
    WIDTH: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    row, column = start + tl.arange(0, ROWS)[:, None], tl.arange(0, COLUMNS)[None, :]
    places = pointers(matrix, row_stride, column_stride, start, ROWS, COLUMNS)
    tl.store(places, block.to(matrix.dtype.element_ty), mask=(row < high) & (column < WIDTH))


@triton.jit
def batch_row(batch, Offsets, Starts, Lengths, offset, key_length):
    """The position of the first query, in 64 bits since it may near 2^31; and first and last + 1 of the keys."""
    position = offset.to(tl.int64)
    if Offsets is not None:
        position = tl.load(Offsets + batch)
    first, last = key_length * 0, key_length
    if Starts is not None:
        first = tl.minimum(tl.maximum(tl.load(Starts + batch), 0), key_length).to(tl.int32)
    if Lengths is not None:
        last = tl.minimum(tl.maximum(tl.load(Lengths + batch), 0), key_length).to(tl.int32)
    return position, first, last


@triton.jit
def narrow(number):
    """To 32 bits, with room for the indices of a tile to be added. Whatever is so far off is beyond all keys."""
    limit = 2**31 - 2**16
    return tl.minimum(tl.maximum(number, -limit), limit).to(tl.int32)


@triton.jit
def seen_keys(start, row, position, first, last, left, right):
    """The keys that query ``start + row`` sees by its place: lower <= j < upper."""
    here = start + position
    lower = tl.where(left >= 0, tl.maximum(narrow(here - left) + row, first), first)
    upper = tl.where(right >= 0, tl.minimum(narrow(here + right + 1) + row, last), last)
    return lower, upper


@triton.jit
def seeing_queries(start, column, position, first, last, left, right, query_length):
    """The queries that see key ``start + column`` by its place: lower <= i < upper."""
    there = start - position
    lower = tl.where(right >= 0, tl.maximum(narrow(there - right) + column, 0), 0)
    upper = tl.where(left >= 0, tl.minimum(narrow(there + left + 1) + column, query_length), query_length)
    return lower, tl.where((start + column >= first) & (start + column < last), upper, 0)


@triton.jit
def split_tiles(low, high, full_low, full_high, BLOCK: tl.constexpr):
    """The tiles begin … end that cover low <= j < high, and full … full_end among them that lie within the other
    range."""
    begin = low // BLOCK
    end = tl.maximum(tl.cdiv(high, BLOCK), begin)
    full = tl.minimum(tl.maximum(tl.cdiv(full_low, BLOCK), begin), end)
    full_end = tl.minimum(tl.maximum(full_high // BLOCK, full), end)
    return begin, full, full_end, end


@triton.jit
def tiles_of_keys(
    start, position, first, last, left, right, query_length, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr
):
    """The keys low <= j < high that some query of the block sees, and the tiles of them."""
    end = tl.minimum(BLOCK_M, query_length - start) - 1
    low, full_high = seen_keys(start, 0, position, first, last, left, right)
    full_low, high = seen_keys(start, end, position, first, last, left, right)
    begin, full, full_end, end = split_tiles(low, high, full_low, full_high, BLOCK_N)
    return low, high, begin, full, full_end, end


@triton.jit
def tiles_of_queries(
    start, position, first, last, left, right, query_length, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr
):
    """The queries low <= i < high that see some key of the tile, and the blocks of them."""
    first_here, last_here = tl.maximum(first, start), tl.minimum(last, start + BLOCK_N) - 1
    low, _ = seeing_queries(first_here, 0, position, first, last, left, right, query_length)
    _, high = seeing_queries(last_here, 0, position, first, last, left, right, query_length)
    high = tl.where(first_here <= last_here, high, 0)
    full_low, _ = seeing_queries(start, BLOCK_N - 1, position, first, last, left, right, query_length)
    _, full_high = seeing_queries(start, 0, position, first, last, left, right, query_length)
    full_high = tl.where(start + BLOCK_N <= last, full_high, 0)
    begin, full, full_end, end = split_tiles(low, high, full_low, full_high, BLOCK_M)
    return low, high, begin, full, full_end, end


@triton.jit
def tile_number(i, begin, full, full_end, CHECKED: tl.constexpr):
    """The tile of step ``i``: of those in full … full_end or, if checked, of those before and after."""
    if CHECKED:
        tile = begin + i
        return tl.where(tile < full, tile, tile + (full_end - full))
    else:
        return full + i


@triton.jit
def is_within(index, lower, upper):
    return (index >= lower) & (index < upper)


@triton.jit
def mask_scores(
    scores, row, column, start_m, start_n, visible, position, query_length, Mask, mask_strides, slope,
    CHECKED: tl.constexpr,
):  # fmt: skip
    """Scores with mask and ALiBi, in units of log 2 and -inf where invisible; and which are visible.

    row (M, 1) and column (1, N), or the two transposed, count from the tile's start. ``visible`` on entry is what the
    place says, and of no meaning where that is not checked.
    """
    scores *= LOG2E
    if slope is not None:
        # In float32, exact up to 2^24; beyond, the error is relative to the distance.
        distance = tl.abs((position + start_m - start_n).to(tl.float32) + row.to(tl.float32) - column.to(tl.float32))
        scores -= slope * LOG2E * distance
    if Mask is not None:
        places = Mask + start_m.to(tl.int64) * mask_strides[2] + start_n.to(tl.int64) * mask_strides[3]
        places += row * mask_strides[2] + column * mask_strides[3]
        inside = start_m + row < query_length
        if CHECKED:
            inside &= visible
        if Mask.dtype.element_ty == tl.uint8:
            visible = tl.load(places, mask=inside, other=0) != 0
        else:
            bias = tl.load(places, mask=inside, other=float("-inf")).to(tl.float32)
            visible = bias != float("-inf")
            bias *= LOG2E  # which must not overflow: models mask with the lowest float32, and -inf is another thing
            scores += tl.where(bias < LOWEST, LOWEST, bias)
    if CHECKED or Mask is not None:
        scores = tl.where(visible, scores, float("-inf"))
    return scores, visible


@triton.jit
def keep(Seed, last_dropped, batch, head, row, column):
    """Which weights dropout keeps: the choice of backends/reference/dropout.py, of which one evaluation gives four
    keys. Here each key evaluates its own and uses a quarter, whatever the layout of the tile."""
    words = tl.philox(tl.load(Seed), column // 64 * 16 + column % 16, row, head.to(tl.int32), batch.to(tl.int32))
    word = column % 64 // 16
    low = tl.where(word == 0, words[0], words[1])
    high = tl.where(word == 2, words[2], words[3])
    return tl.where(word < 2, low, high) > last_dropped.to(tl.uint32)


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
    query_strides, key_strides, value_strides, out_strides, mask_strides,
    heads, group, query_length, key_length, scale, softcap, offset, left, right, last_dropped, keep_scale,
    D: tl.constexpr, DV: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One block of queries: (B * Hq * ceil(Lq / BLOCK_M)) programs."""
    tile, batch, head = place(tl.cdiv(query_length, BLOCK_M), heads)
    start_m = tile * BLOCK_M
    row, column = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_N)
    position, first, last = batch_row(batch, Offsets, Starts, Lengths, offset, key_length)
    lower, upper = seen_keys(start_m, row, position, first, last, left, right)
    low, high, begin, full, full_end, end = tiles_of_keys(
        start_m, position, first, last, left, right, query_length, BLOCK_M, BLOCK_N
    )
    query_matrix = Query + batch * query_strides[0] + head * query_strides[1]
    key_matrix = Key + batch * key_strides[0] + head // group * key_strides[1]
    value_matrix = Value + batch * value_strides[0] + head // group * value_strides[1]
    mask_matrix = None
    if Mask is not None:
        mask_matrix = Mask + batch * mask_strides[0] + head * mask_strides[1]
    slope = None
    if Slopes is not None:
        slope = tl.load(Slopes + batch * heads + head)

    query = load(query_matrix, query_strides[2], query_strides[3], start_m, 0, query_length, D, BLOCK_M, BLOCK_D, True)
    peak = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK_M,), tl.float32)
    out = tl.zeros((BLOCK_M, BLOCK_DV), tl.float32)
    for CHECKED in tl.static_range(2):
        for i in range(full - begin + end - full_end if CHECKED else full_end - full):
            start_n = tile_number(i, begin, full, full_end, CHECKED) * BLOCK_N
            key = load(key_matrix, key_strides[2], key_strides[3], start_n, low, high, D, BLOCK_N, BLOCK_D, CHECKED)
            scores = dot(query, key.T, PRECISION) * scale
            if softcap is not None:
                scores = softcap * tanh(scores / softcap)
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
            value = load(
                value_matrix, value_strides[2], value_strides[3], start_n, low, high, DV, BLOCK_N, BLOCK_DV, CHECKED
            )
            if Mask is not None:  # 0 * NaN: what the mask hides from all queries of the block must not be multiplied
                seen = tl.max(visible.to(tl.int32), 0)
                value = tl.where(seen[:, None] != 0, value, 0.0)
            out = out * shrink[:, None] + dot(weights, value, PRECISION)
            peak = new_peak

    total = tl.where(total == 0, 1.0, total)
    out /= total[:, None]
    if Seed is not None:
        out *= keep_scale
    out_matrix = Out + batch * out_strides[0] + head * out_strides[1]
    store(out_matrix, out_strides[2], out_strides[3], start_m, query_length, out, DV, BLOCK_M, BLOCK_DV)
    lse = (peak + tl.log2(total)) * LN2
    tl.store(Lse + (batch * heads + head) * query_length + start_m + row, lse, mask=start_m + row < query_length)


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
    grad_matrix = GradOut + batch * grad_out_strides[0] + head * grad_out_strides[1]
    out_matrix = Out + batch * out_strides[0] + head * out_strides[1]
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
def load_rows(Values, pair, start, query_length, other, BLOCK_M: tl.constexpr):
    """A block of (B, Hq, Lq), float32."""
    row = start + tl.arange(0, BLOCK_M)
    return tl.load(Values + pair * query_length + row, mask=row < query_length, other=other)


@triton.jit
def load_lse(Lse, pair, start, query_length, BLOCK_M: tl.constexpr):
    """In units of log 2; +inf for a query that sees nothing or is none, so that its probabilities are zero."""
    lse = load_rows(Lse, pair, start, query_length, float("-inf"), BLOCK_M)
    return tl.where(lse == float("-inf"), float("inf"), lse * LOG2E)


@triton.jit(do_not_specialize=VARYING)
def backward_query_kernel(
    GradOut,  # (B, Hq, Lq, DV)
    Query, Key, Value,
    Lse, Delta,  # (B, Hq, Lq) contiguous, float32
    GradQuery,  # like Query
    GradMask,  # (B, Hq, Lq, Lk) contiguous, float32 and zero; or None
    Mask, Slopes, Offsets, Starts, Lengths, Seed,
    grad_out_strides, query_strides, key_strides, value_strides, grad_query_strides, mask_strides,
    heads, group, query_length, key_length, scale, softcap, offset, left, right, last_dropped, keep_scale,
    D: tl.constexpr, DV: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """The gradient of one block of queries, and of their rows of the mask: as many programs as forward_kernel's."""
    tile, batch, head = place(tl.cdiv(query_length, BLOCK_M), heads)
    start_m = tile * BLOCK_M
    row, column = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_N)
    position, first, last = batch_row(batch, Offsets, Starts, Lengths, offset, key_length)
    lower, upper = seen_keys(start_m, row, position, first, last, left, right)
    low, high, begin, full, full_end, end = tiles_of_keys(
        start_m, position, first, last, left, right, query_length, BLOCK_M, BLOCK_N
    )
    pair = batch * heads + head
    query_matrix = Query + batch * query_strides[0] + head * query_strides[1]
    grad_out_matrix = GradOut + batch * grad_out_strides[0] + head * grad_out_strides[1]
    key_matrix = Key + batch * key_strides[0] + head // group * key_strides[1]
    value_matrix = Value + batch * value_strides[0] + head // group * value_strides[1]
    mask_matrix = None
    if Mask is not None:
        mask_matrix = Mask + batch * mask_strides[0] + head * mask_strides[1]
    slope = None
    if Slopes is not None:
        slope = tl.load(Slopes + pair)

    query = load(query_matrix, query_strides[2], query_strides[3], start_m, 0, query_length, D, BLOCK_M, BLOCK_D, True)
    grad_out = load(
        grad_out_matrix, grad_out_strides[2], grad_out_strides[3], start_m, 0, query_length, DV, BLOCK_M, BLOCK_DV, True
    )
    lse = load_lse(Lse, pair, start_m, query_length, BLOCK_M)
    delta = load_rows(Delta, pair, start_m, query_length, 0.0, BLOCK_M)
    grad_query = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    for CHECKED in tl.static_range(2):
        for i in range(full - begin + end - full_end if CHECKED else full_end - full):
            start_n = tile_number(i, begin, full, full_end, CHECKED) * BLOCK_N
            key = load(key_matrix, key_strides[2], key_strides[3], start_n, low, high, D, BLOCK_N, BLOCK_D, CHECKED)
            value = load(
                value_matrix, value_strides[2], value_strides[3], start_n, low, high, DV, BLOCK_N, BLOCK_DV, CHECKED
            )
            scores = dot(query, key.T, PRECISION) * scale
            if softcap is not None:
                capped = tanh(scores / softcap)
                scores = softcap * capped
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

    grad_query_matrix = GradQuery + batch * grad_query_strides[0] + head * grad_query_strides[1]
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
    Mask, Slopes, Offsets, Starts, Lengths, Seed,
    grad_out_strides, query_strides, key_strides, value_strides, grad_key_strides, grad_value_strides, mask_strides,
    heads, group, query_length, key_length, scale, softcap, offset, left, right, last_dropped, keep_scale,
    D: tl.constexpr, DV: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """The gradients of one tile of keys and values, over all query heads that share them: (B * Hk * ceil(Lk / BLOCK_N))
    programs. Scores are transposed, (keys, queries), so that they multiply from the left as they are."""
    tile, batch, key_head = place(tl.cdiv(key_length, BLOCK_N), heads // group)
    start_n = tile * BLOCK_N
    row, column = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_N)
    position, first, last = batch_row(batch, Offsets, Starts, Lengths, offset, key_length)
    lower, upper = seeing_queries(start_n, column, position, first, last, left, right, query_length)
    low, high, begin, full, full_end, end = tiles_of_queries(
        start_n, position, first, last, left, right, query_length, BLOCK_M, BLOCK_N
    )
    key_matrix = Key + batch * key_strides[0] + key_head * key_strides[1]
    value_matrix = Value + batch * value_strides[0] + key_head * value_strides[1]
    key = load(key_matrix, key_strides[2], key_strides[3], start_n, 0, key_length, D, BLOCK_N, BLOCK_D, True)
    value = load(value_matrix, value_strides[2], value_strides[3], start_n, 0, key_length, DV, BLOCK_N, BLOCK_DV, True)
    grad_key = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
    grad_value = tl.zeros((BLOCK_N, BLOCK_DV), tl.float32)
    for CHECKED in tl.static_range(2):
        count = full - begin + end - full_end if CHECKED else full_end - full
        for i in range(group * count):  # one loop, so that the loads of the next head are ahead of its turn too
            head = key_head * group + i // count
            pair = batch * heads + head
            query_matrix = Query + batch * query_strides[0] + head * query_strides[1]
            grad_out_matrix = GradOut + batch * grad_out_strides[0] + head * grad_out_strides[1]
            mask_matrix = None
            if Mask is not None:
                mask_matrix = Mask + batch * mask_strides[0] + head * mask_strides[1]
            slope = None
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
            lse = load_lse(Lse, pair, start_m, query_length, BLOCK_M)
            delta = load_rows(Delta, pair, start_m, query_length, 0.0, BLOCK_M)
            scores = dot(key, query.T, PRECISION) * scale
            if softcap is not None:
                capped = tanh(scores / softcap)
                scores = softcap * capped
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
    grad_key_matrix = GradKey + batch * grad_key_strides[0] + key_head * grad_key_strides[1]
    grad_value_matrix = GradValue + batch * grad_value_strides[0] + key_head * grad_value_strides[1]
    store(
        grad_key_matrix, grad_key_strides[2], grad_key_strides[3], start_n, key_length, grad_key * scale,
        D, BLOCK_N, BLOCK_D,
    )  # fmt: skip
    store(
        grad_value_matrix, grad_value_strides[2], grad_value_strides[3], start_n, key_length, grad_value,
        DV, BLOCK_N, BLOCK_DV,
    )  # fmt: skip
