"""What the Triton kernels of attention do with a tile: its place, loads and stores, what is seen, mask and dropout.

Which keys a query may see by its place (causal, window, starts, lengths) is one interval ``lower <= j < upper``. Tiles
of keys that every query of a block sees run without a check, in a first loop; the tiles at the edges in a second; and
tiles that no query sees in neither.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .arithmetic import LOG2E, WIDEN, tanh

LOWEST = tl.constexpr(-3.4e38)  # nearly the lowest float32


@triton.jit
def dot(a, b, PRECISION: tl.constexpr):
    """a @ b in float32; a is rounded to b's dtype."""
    if WIDEN and b.dtype == tl.bfloat16:
        a, b = a.to(tl.float32), b.to(tl.float32)
    return tl.dot(a.to(b.dtype), b, input_precision=PRECISION)


@triton.jit
def place(tiles, heads):
    """This program's tile, batch row and head. Tiles in descending order: under a causal mask the last ones have the
    most to do, and so are not left to the end."""
    index = tl.program_id(0)
    pair = index // tiles
    return tiles - 1 - index % tiles, (pair // heads).to(tl.int64), (pair % heads).to(tl.int64)


@triton.jit
def sequence(Starts, batch, length):
    """The first row of a batch row among packed ones, where the next one's is Starts[batch + 1], and how many it has; 0
    and ``length`` where Starts is None."""
    if Starts is None:
        return length.to(tl.int64) * 0, length
    else:
        begin = tl.load(Starts + batch)
        return begin, (tl.load(Starts + batch + 1) - begin).to(tl.int32)


@triton.jit
def of_head(Tensor, strides, batch, head, begin):
    """Where the matrix of a head of (B, H, rows, columns) begins, at row ``begin``."""
    return Tensor + batch * strides[0] + head * strides[1] + begin * strides[2]


@triton.jit
def rows_of(Values, Starts, batch, head, heads, rows, begin):
    """Where the numbers of a head's queries begin in (B, Hq, rows), or in (Hq, rows) that hold packed sequences."""
    if Starts is None:
        return Values + (batch * heads + head) * rows
    else:
        return Values + head * rows + begin


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
def load_described(
    Descriptor, matrix, row_stride, column_stride, batch, head, begin, start, low, high, Starts,
    WIDTH: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, CHECKED: tl.constexpr,
):  # fmt: skip
    """``load`` of a head's matrix of (B, H, L, WIDTH), which has its row 0 at ``begin``; a tile that needs no check is
    fetched whole by the tensor descriptor, where there is one. Packed sequences (Starts) are one batch row."""
    if CHECKED or Descriptor is None:
        return load(matrix, row_stride, column_stride, start, low, high, WIDTH, ROWS, COLUMNS, CHECKED)
    else:
        row = begin.to(tl.int32) + start
        if Starts is not None:
            batch *= 0
        block = Descriptor.load([batch.to(tl.int32), head.to(tl.int32), row, 0])
        return tl.reshape(block, (ROWS, COLUMNS))


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
    """The keys low <= j < high that some query of the block sees, and the tiles of them: none past a sequence's end."""
    end = tl.minimum(BLOCK_M, query_length - start) - 1
    low, full_high = seen_keys(start, 0, position, first, last, left, right)
    full_low, high = seen_keys(start, end, position, first, last, left, right)
    low, high = tl.where(end >= 0, low, 0), tl.where(end >= 0, high, 0)
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
def score(products, scale, softcap):
    """In units of log 2: one multiplication for each, where nothing caps them."""
    if softcap is None:
        return products * (scale * LOG2E)
    else:
        return softcap * LOG2E * tanh(products * scale / softcap)


@triton.jit
def is_within(index, lower, upper):
    return (index >= lower) & (index < upper)


@triton.jit
def mask_scores(
    scores, row, column, start_m, start_n, visible, position, query_length, Mask, mask_strides, slope,
    CHECKED: tl.constexpr,
):  # fmt: skip
    """Scores, in units of log 2, with mask and ALiBi and -inf where invisible; and which are visible.

    row (M, 1) and column (1, N), or the two transposed, count from the tile's start. ``visible`` on entry is what the
    place says, and of no meaning where that is not checked.
    """
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
