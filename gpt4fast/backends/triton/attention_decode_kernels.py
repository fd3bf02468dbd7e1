"""Triton kernels of one decoding step over a key-value cache (Flash-Decoding: Dao, Haziza, Massa and Sizov, 2023).

New keys and values are appended first. Then one program attends to one part of the keys for all query heads that share
them, so that the cache is read once, and the parts are combined in a fixed order.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .arithmetic import LOG2E, tanh
from .attention_tiles import dot

LN2 = tl.constexpr(0.6931471805599453)
NEAREST = tl.constexpr(12582912.0)  # 1.5 * 2^23: float32 numbers that it is added to are rounded to integers
NEAREST_FLOAT8 = tl.constexpr(NEAREST.value / 512)  # likewise to multiples of the smallest float8_e4m3fn, 1 / 512


@triton.jit
def round_to_float8(x):
    """To the nearest numbers of float8_e4m3fn, of equals the even one, as torch does it and Triton's interpreter does
    not; what is below 2^-6 has fewer than the four significant bits of the others. |x| is at most 448."""
    bits = x.to(tl.int32, bitcast=True)
    bits = (bits + 0x7FFFF + ((bits >> 20) & 1)) & -0x100000
    return tl.where(tl.abs(x) < 1 / 64, x + NEAREST_FLOAT8 - NEAREST_FLOAT8, bits.to(tl.float32, bitcast=True))


@triton.jit
def rotate(
    x, matrix, row, column, inside, column_stride, position, positions, Cos, Sin, HALF: tl.constexpr,
    INTERLEAVED: tl.constexpr,
):  # fmt: skip
    """Rotary embedding of ``x``, float32 (rows, D), which was read from ``matrix + row`` and lies at ``position``."""
    if Cos is None:
        return x
    else:
        if INTERLEAVED:
            partner, angle, is_first = column ^ 1, column // 2, column % 2 == 0
        else:
            is_first = column < HALF
            partner, angle = tl.where(is_first, column + HALF, column - HALF), column % HALF
        position += column * 0
        turns = inside & (column < 2 * HALF) & (position >= 0) & (position < positions)
        other = tl.load(matrix + row + partner * column_stride, mask=turns, other=0.0).to(tl.float32)
        cos = tl.load(Cos + position * HALF + angle, mask=turns, other=1.0)
        sin = tl.load(Sin + position * HALF + angle, mask=turns, other=0.0)
        return x * cos + tl.where(is_first, -other, other) * sin


@triton.jit
def place_of(Table, batch, index, block_size, blocks_per_row, strides, seen):
    """Where entries ``index`` of a batch row's cache lie; strides are of rows or blocks, heads and entries."""
    if Table is None:
        return batch.to(tl.int64) * strides[0] + index.to(tl.int64) * strides[2]
    else:
        block = tl.load(Table + batch * blocks_per_row + index // block_size, mask=seen)
        return block * strides[0] + (index % block_size).to(tl.int64) * strides[2]


@triton.jit(do_not_specialize=["capacity", "positions", "block_size", "blocks_per_row"])
def append_kernel(
    New,  # (B, Hk, Lq, D)
    Cache,  # (B or blocks, Hk, entries, D)
    Scales,  # (B or blocks, Hk, entries) float32, or None
    Lengths,  # (B,) int64: entries before
    Table,  # (B, blocks_per_row) int64, contiguous, or None
    Cos, Sin,  # (positions, HALF) contiguous, float32, or None
    new_strides, cache_strides, scales_strides, heads, new, capacity, positions, block_size, blocks_per_row,
    D: tl.constexpr, BLOCK_D: tl.constexpr, HALF: tl.constexpr, INTERLEAVED: tl.constexpr,
):  # fmt: skip
    """One token of one head: (B * Hk * Lq) programs."""
    index = tl.program_id(0)
    token, head, batch = index % new, index // new % heads, index // new // heads
    position = tl.load(Lengths + batch) + token
    if (position < 0) | (position >= capacity):  # the values of lengths are not read before
        return
    column = tl.arange(0, BLOCK_D)
    inside = column < D
    matrix = New + batch.to(tl.int64) * new_strides[0] + head.to(tl.int64) * new_strides[1]
    row = token * new_strides[2]
    x = tl.load(matrix + row + column * new_strides[3], mask=inside, other=0.0).to(tl.float32)
    x = rotate(x, matrix, row, column, inside, new_strides[3], position, positions, Cos, Sin, HALF, INTERLEAVED)
    place = place_of(Table, batch, position, block_size, blocks_per_row, cache_strides, None)
    if Scales is not None:
        largest = tl.max(tl.abs(x), 0)
        if Cache.dtype.element_ty == tl.int8:
            scale = tl.where(largest == 0, 1.0, largest / 127)
            x = tl.clamp(x / scale + NEAREST - NEAREST, -127.0, 127.0)
        else:
            scale = tl.where(largest == 0, 1.0, largest / 448)
            x = round_to_float8(tl.clamp(x / scale, -448.0, 448.0))
        scale_place = place_of(Table, batch, position, block_size, blocks_per_row, scales_strides, None)
        tl.store(Scales + scale_place + head * scales_strides[1], scale)
    places = Cache + place + head.to(tl.int64) * cache_strides[1] + column * cache_strides[3]
    tl.store(places, x.to(Cache.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["added", "capacity", "positions", "block_size", "blocks_per_row", "left"])
def decode_kernel(
    Query,  # (B, Hq, Lq, D)
    KeyCache, ValueCache,  # (B or blocks, Hk, entries, D and DV)
    KeyScales, ValueScales,  # (B or blocks, Hk, entries) float32, or None
    Out,  # (B, Hq, Lq, SPLITS, DV) by its strides
    Lse,  # (B, Hq, Lq, SPLITS) contiguous, float32
    Lengths, Starts,  # (B,) int64, the second or None
    Table,  # (B, blocks_per_row) int64, contiguous, or None
    Cos, Sin,  # (positions, HALF) contiguous, float32, or None
    Slopes,  # (B, Hq) contiguous, float32, or None
    query_strides, key_strides, value_strides, key_scales_strides, value_scales_strides, out_strides,
    kv_heads, group, new, added, capacity, positions, block_size, blocks_per_row, scale, softcap, left,
    D: tl.constexpr, DV: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr, HALF: tl.constexpr,
    INTERLEAVED: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, SPLITS: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """One part of a head's keys, for BLOCK_M of the (group * Lq) queries: (parts * splits, B * Hk) programs."""
    split, part = tl.program_id(0) % SPLITS, tl.program_id(0) // SPLITS
    batch, kv_head = tl.program_id(1) // kv_heads, tl.program_id(1) % kv_heads
    row = part * BLOCK_M + tl.arange(0, BLOCK_M)
    is_row = row < group * new
    head, token = (kv_head * group + row // new).to(tl.int64), row % new
    length = tl.minimum(tl.load(Lengths + batch) + added, capacity).to(tl.int32)
    position = length - new + token
    first = length * 0
    if Starts is not None:
        first = tl.minimum(tl.maximum(tl.load(Starts + batch), 0), length).to(tl.int32)
    lower, upper = row * 0 + first, position + 1
    if left >= 0:
        lower = tl.maximum(lower, position - tl.minimum(left, capacity))
        first = tl.maximum(first, length - new - tl.minimum(left, capacity))

    column, entry = tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_N)
    query_matrix = Query + batch.to(tl.int64) * query_strides[0]
    query_row = head * query_strides[1] + token * query_strides[2]
    inside = is_row[:, None] & (column[None, :] < D)
    places = query_matrix + query_row[:, None] + column[None, :] * query_strides[3]
    query = tl.load(places, mask=inside, other=0.0)
    if Cos is not None:
        turned = rotate(
            query.to(tl.float32), query_matrix, query_row[:, None], column[None, :], inside, query_strides[3],
            position[:, None], positions, Cos, Sin, HALF, INTERLEAVED,
        )  # fmt: skip
        query = turned.to(query.dtype)
    slope = 0.0
    if Slopes is not None:
        slope = tl.load(Slopes + batch * kv_heads * group + head, mask=is_row, other=0.0)

    peak = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK_M,), tl.float32)
    out = tl.zeros((BLOCK_M, BLOCK_DV), tl.float32)
    value_column = tl.arange(0, BLOCK_DV)
    tile, tiles = first // BLOCK_N, tl.cdiv(length, BLOCK_N)
    each = tl.cdiv(tl.maximum(tiles - tile, 0), SPLITS)
    for i in range(tile + split * each, tl.minimum(tile + (split + 1) * each, tiles)):
        index = i * BLOCK_N + entry
        is_entry = (index >= first) & (index < length)
        place = place_of(Table, batch, index, block_size, blocks_per_row, key_strides, is_entry)
        key = tl.load(
            KeyCache + kv_head.to(tl.int64) * key_strides[1] + place[:, None] + column[None, :] * key_strides[3],
            mask=is_entry[:, None] & (column[None, :] < D), other=0.0,
        )  # fmt: skip
        if KeyScales is not None:
            key = key.to(tl.float32).to(query.dtype)  # the interpreter can't cast to bfloat16
        scores = dot(query, key.T, PRECISION) * scale
        if KeyScales is not None:
            place = place_of(Table, batch, index, block_size, blocks_per_row, key_scales_strides, is_entry)
            scale_places = KeyScales + place + kv_head * key_scales_strides[1]
            scores *= tl.load(scale_places, mask=is_entry, other=0.0)[None, :]
        if softcap is not None:
            scores = softcap * tanh(scores / softcap)
        scores *= LOG2E
        if Slopes is not None:
            distance = tl.abs((position[:, None] - index[None, :]).to(tl.float32))
            scores -= slope[:, None] * LOG2E * distance
        visible = (index[None, :] >= lower[:, None]) & (index[None, :] < upper[:, None])
        scores = tl.where(visible, scores, float("-inf"))
        new_peak = tl.maximum(peak, tl.max(scores, 1))
        finite = tl.where(new_peak == float("-inf"), 0.0, new_peak)
        weights = tl.exp2(scores - finite[:, None])
        shrink = tl.exp2(peak - finite)
        total = total * shrink + tl.sum(weights, 1)
        place = place_of(Table, batch, index, block_size, blocks_per_row, value_strides, is_entry)
        value = tl.load(
            ValueCache + kv_head.to(tl.int64) * value_strides[1] + place[:, None]
            + value_column[None, :] * value_strides[3],
            mask=is_entry[:, None] & (value_column[None, :] < DV), other=0.0,
        )  # fmt: skip
        if ValueScales is not None:
            value = value.to(tl.float32).to(query.dtype)
            place = place_of(Table, batch, index, block_size, blocks_per_row, value_scales_strides, is_entry)
            scales = tl.load(ValueScales + place + kv_head * value_scales_strides[1], mask=is_entry, other=0.0)
            # By the largest, so that in float16 no weight times a small scale becomes subnormal.
            largest = tl.max(scales, 0)
            largest = tl.where(largest > 0, largest, 1.0)
            out = out * shrink[:, None] + dot(weights * (scales / largest)[None, :], value, PRECISION) * largest
        else:
            out = out * shrink[:, None] + dot(weights, value, PRECISION)
        peak = new_peak

    total = tl.where(total == 0, 1.0, total)
    out /= total[:, None]
    places = Out + batch.to(tl.int64) * out_strides[0] + head * out_strides[1] + token * out_strides[2]
    places += split * out_strides[3]
    tl.store(
        places[:, None] + value_column[None, :] * out_strides[4], out.to(Out.dtype.element_ty),
        mask=is_row[:, None] & (value_column[None, :] < DV),
    )  # fmt: skip
    pair = (batch * kv_heads * group + head) * new + token
    tl.store(Lse + pair * SPLITS + split, (peak + tl.log2(total)) * LN2, mask=is_row)


@triton.jit
def combine_kernel(
    Parts,  # (B, Hq, Lq, SPLITS, DV) contiguous, float32
    PartLse,  # (B, Hq, Lq, SPLITS) contiguous, float32
    Out,  # (B, Hq, Lq, DV)
    Lse,  # (B, Hq, Lq) contiguous, float32
    out_strides, heads, new,
    DV: tl.constexpr, BLOCK_DV: tl.constexpr, SPLITS: tl.constexpr,
):  # fmt: skip
    """One query: (B * Hq * Lq) programs."""
    index = tl.program_id(0).to(tl.int64)
    token, head, batch = index % new, index // new % heads, index // new // heads
    split, column = tl.arange(0, SPLITS), tl.arange(0, BLOCK_DV)
    lse = tl.load(PartLse + index * SPLITS + split)
    peak = tl.max(lse, 0)
    weights = tl.exp2((lse - tl.where(peak == float("-inf"), 0.0, peak)) * LOG2E)
    total = tl.sum(weights, 0)
    parts = tl.load(
        Parts + (index * SPLITS + split[:, None]) * DV + column[None, :], mask=column[None, :] < DV, other=0.0
    )
    out = tl.sum(parts * weights[:, None], 0) / tl.where(total == 0, 1.0, total)
    places = Out + batch * out_strides[0] + head * out_strides[1] + token * out_strides[2] + column * out_strides[3]
    tl.store(places, out.to(Out.dtype.element_ty), mask=column < DV)
    tl.store(Lse + index, peak + tl.log2(tl.where(total == 0, 1.0, total)) * LN2)
