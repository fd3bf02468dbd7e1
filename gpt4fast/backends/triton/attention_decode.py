"""One decoding step over a key-value cache by Triton kernels. Shapes as in the reference. It has no gradient.

Run on an H200 (benchmarks/LOG.md); tested by Triton's interpreter too, and compiled for sm_80, sm_90 and sm_100.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..autograd import needs_grad
from ..compiled.attention import as_float32, as_index, empty_results
from . import attention_config as config
from . import tuning
from .attention import width_refusal
from .attention_launch import choose_tile, precision
from .availability import triton_refusal
from .device import capability_of, processors_of


def refusal(call: dict) -> str | None:
    """Why the kernels can't serve a call that ``ops.attention_decode.prepare`` made, or None."""
    query, key_cache, value_cache = call["query"], call["key_cache"], call["value_cache"]
    if needs_grad(query, call["key"], call["value"], key_cache, value_cache, call["alibi_slopes"]):
        return "the Triton kernels of attention_decode give no gradients"
    reason = width_refusal(query, value_cache) or triton_refusal(query)
    if reason is None and key_cache.dtype == torch.float8_e4m3fn and capability_of(query) < (8, 9):
        return "the Triton kernels read a float8 cache from compute capability 8.9 (Ada) on"
    return reason


def attention_decode(
    query: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    kv_lengths: Tensor,
    key: Tensor | None,
    value: Tensor | None,
    block_table: Tensor | None,
    rotary: tuple[Tensor, Tensor] | None,
    rotary_interleaved: bool,
    key_scales: Tensor | None,
    value_scales: Tensor | None,
    scale: float,
    kv_starts: Tensor | None,
    window: tuple[int, int] | None,
    softcap: float,
    alibi_slopes: Tensor | None,
    return_lse: bool,
) -> tuple[Tensor, Tensor]:
    """Output (B, Hq, Lq, Dv) in query's dtype and the log-sum-exp (B, Hq, Lq) in float32, asked for or not; the new
    keys and values are written into the cache."""
    cos, sin = (None, None) if rotary is None else (as_float32(table).contiguous() for table in rotary)
    block_table = None if block_table is None else as_index(block_table).contiguous()
    slopes = None if alibi_slopes is None else as_float32(alibi_slopes).contiguous()
    return torch.ops.gpt4fast.triton_attention_decode.default(
        query, key_cache, value_cache, as_index(kv_lengths), key, value, block_table, cos, sin, rotary_interleaved,
        key_scales, value_scales, scale, as_index(kv_starts), -1 if window is None else window[0], softcap, slopes,
    )  # fmt: skip


def _decode(
    query, key_cache, value_cache, kv_lengths, key, value, block_table, cos, sin, rotary_interleaved, key_scales,
    value_scales, scale, kv_starts, left, softcap, slopes,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    from . import attention_decode_kernels as kernels

    batch, heads, new, head_dim = query.shape
    kv_heads, value_dim = key_cache.shape[1], value_cache.shape[3]
    out, lse = empty_results(query, value_cache)
    if lse.numel() == 0:
        return out, lse
    blocks_per_row = 1 if block_table is None else block_table.shape[1]
    capacity = key_cache.shape[2] * blocks_per_row
    cache = {
        "Lengths": kv_lengths, "Table": block_table, "Cos": cos, "Sin": sin, "new": new, "capacity": capacity,
        "positions": 0 if cos is None else cos.shape[0], "block_size": key_cache.shape[2],
        "blocks_per_row": blocks_per_row, "HALF": 0 if cos is None else cos.shape[1],
        "INTERLEAVED": rotary_interleaved,
    }  # fmt: skip
    with torch.cuda.device_of(query):
        for entries, into, scales, turned in (
            (key, key_cache, key_scales, True), (value, value_cache, value_scales, False)
        ):  # fmt: skip
            if entries is not None:
                rotary = {} if turned else {"Cos": None, "Sin": None}
                width = entries.shape[3]
                kernels.append_kernel[(batch * kv_heads * new,)](
                    entries, into, scales, new_strides=entries.stride(), cache_strides=into.stride(),
                    scales_strides=_strides(scales), heads=kv_heads, D=width, BLOCK_D=config.padded(width),
                    **(cache | rotary),
                )  # fmt: skip
        rows = heads // kv_heads * new
        tile = choose_tile("decode_tile", query, value_cache, rows=rows)
        programs = -(-rows // tile["BLOCK_M"]) * batch * kv_heads
        splits = config.decode_splits(programs, capacity, tile["BLOCK_N"], processors_of(query))

        def run(tile: dict[str, int]) -> None:
            splits = tile["SPLITS"]
            partial, partial_lse = out.unsqueeze(3), lse
            if splits > 1:
                partial = lse.new_empty(*lse.shape, splits, value_dim)
                partial_lse = lse.new_empty(*lse.shape, splits)
            kernels.decode_kernel[(-(-rows // tile["BLOCK_M"]) * splits, batch * kv_heads)](
                query, key_cache, value_cache, key_scales, value_scales, partial, partial_lse, Starts=kv_starts,
                Slopes=slopes, query_strides=query.stride(), key_strides=key_cache.stride(),
                value_strides=value_cache.stride(), key_scales_strides=_strides(key_scales),
                value_scales_strides=_strides(value_scales), out_strides=partial.stride(), kv_heads=kv_heads,
                group=heads // kv_heads, added=0 if key is None else new, scale=scale, softcap=softcap or None,
                left=left, D=head_dim, DV=value_dim, BLOCK_D=config.padded(head_dim),
                BLOCK_DV=config.padded(value_dim), PRECISION=precision(), **cache, **tile,
            )  # fmt: skip
            if splits > 1:
                kernels.combine_kernel[(lse.numel(),)](
                    partial, partial_lse, out, lse, out.stride(), heads, new, DV=value_dim,
                    BLOCK_DV=config.padded(value_dim), SPLITS=splits,
                )  # fmt: skip

        # The lengths stand on the GPU: the class goes by the cache's, the times by those of the first call.
        sizes = head_dim, value_dim, *(number.bit_length() for number in (batch * kv_heads, rows, capacity))
        kinds = str(key_cache.dtype), str(query.dtype), precision()
        features = block_table is not None, cos is not None, softcap > 0, slopes is not None, left >= 0
        run(tuning.fastest("decode", (*sizes, *kinds, *features), {**tile, "SPLITS": splits}, run, query))
    return out, lse


def _strides(scales: Tensor | None) -> tuple[int, ...]:
    return (0, 0, 0) if scales is None else scales.stride()


# Opaque to torch.compile, which sees that the cache is written to.
torch.library.define(
    "gpt4fast::triton_attention_decode",
    "(Tensor query, Tensor(a!) key_cache, Tensor(b!) value_cache, Tensor kv_lengths, Tensor? key, Tensor? value, "
    "Tensor? block_table, Tensor? cos, Tensor? sin, bool rotary_interleaved, Tensor(c!)? key_scales, "
    "Tensor(d!)? value_scales, float scale, Tensor? kv_starts, SymInt window_left, float softcap, Tensor? slopes) "
    "-> (Tensor out, Tensor lse)",
)
for _device in ("cuda", "cpu"):  # the CPU's is the interpreter
    torch.library.impl("gpt4fast::triton_attention_decode", _device, _decode)
torch.library.register_fake(
    "gpt4fast::triton_attention_decode", lambda query, key_cache, value_cache, *_: empty_results(query, value_cache)
)
