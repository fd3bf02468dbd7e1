"""Adapter to the compiled ``gpt4fast::attention_decode``, with its shape rule. It has no gradient."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import native
from .attention import as_float32, as_index, empty_results


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
    left, right = window or (-1, -1)
    return torch.ops.gpt4fast.attention_decode.default(
        query, key_cache, value_cache, as_index(kv_lengths), key, value, as_index(block_table), cos, sin,
        rotary_interleaved, key_scales, value_scales, scale, as_index(kv_starts), left, right, softcap,
        as_float32(alibi_slopes),
    )  # fmt: skip


native.load()
if native.cpu_library_error() is None:
    torch.library.register_fake(
        "gpt4fast::attention_decode", lambda query, key_cache, value_cache, *_: empty_results(query, value_cache)
    )
