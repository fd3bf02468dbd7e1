"""How close to float64 a result must be, and calls of each op, at the sizes of real models."""

from __future__ import annotations

import torch
from torch import Tensor

DEVICE = "cuda"


def error(result: Tensor, exact: Tensor) -> float:
    """Norm of the difference, relative to that of ``exact``."""
    return ((result.double() - exact).norm() / exact.norm()).item()


def assert_as_exact(ours: Tensor, theirs: Tensor, exact: Tensor, roundings: float | None = None) -> None:
    """At most twice torch's error in the same dtype, and so many roundings: by default the half of one in half types,
    and in float32 the eight that a sum of 2000 products in turn may come to."""
    if roundings is None:
        roundings = 8 if ours.dtype == torch.float32 else 0.5
    assert ours.dtype == theirs.dtype and ours.shape == exact.shape
    assert error(ours, exact) <= 2 * error(theirs, exact) + roundings * torch.finfo(ours.dtype).eps


def normal(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, device=DEVICE, dtype=dtype)


def heads(batch, query_heads, kv_heads, rows, columns, dim, dtype) -> list[Tensor]:
    """Query, key and value."""
    shapes = (query_heads, rows), (kv_heads, columns), (kv_heads, columns)
    return [normal(batch, *shape, dim, dtype=dtype) for shape in shapes]


def decoding_step(
    dtype, batch=8, query_heads=32, kv_heads=8, new=1, dim=128, capacity=2048, block=None, int8=False, float8=False
) -> dict[str, Tensor]:
    """Tensors of ``attention_decode`` that appends. Rows differ in length, what no row holds is NaN, and the blocks of
    a paged cache are shuffled."""
    lengths = torch.randint(0, capacity - new + 1, (batch,), device=DEVICE)
    lengths[0], lengths[-1] = capacity - new, 0
    call = {"query": normal(batch, query_heads, new, dim, dtype=dtype), "kv_lengths": lengths}
    unseen = torch.arange(capacity, device=DEVICE) >= lengths[:, None]
    if block is not None:
        table = torch.randperm(batch * capacity // block, device=DEVICE).view(batch, -1)
        call["block_table"] = table
    for name in ("key", "value"):
        cache = normal(batch, kv_heads, capacity, dim)
        scales = torch.rand(batch, kv_heads, capacity, device=DEVICE) / 30
        hidden = unseen[:, None]
        if int8 or float8:
            cache = (cache * 40).round().clamp(-127, 127).to(torch.int8 if int8 else torch.float8_e4m3fn)
            scales.masked_fill_(hidden, float("nan"))
        else:
            cache = cache.to(dtype).masked_fill_(hidden[..., None], float("nan"))
        if block is not None:
            cache, scales = (_in_blocks(t, table, block) for t in (cache, scales))
        call[f"{name}_cache"] = cache
        if int8 or float8:
            call[f"{name}_scales"] = scales
        call[name] = normal(batch, kv_heads, new, dim, dtype=dtype)
    return call


def _in_blocks(cache: Tensor, table: Tensor, block: int) -> Tensor:
    """(B, H, L, ...) as blocks (B * L / block, H, block, ...), row b's at ``table[b]``."""
    blocks = cache.unflatten(2, (-1, block)).transpose(1, 2).flatten(0, 1)
    shuffled = torch.empty_like(blocks)
    shuffled[table.flatten()] = blocks
    return shuffled


def rotary_tables(positions: int, dim: int) -> tuple[Tensor, Tensor]:
    frequencies = 10000.0 ** (-torch.arange(0, dim, 2, device=DEVICE) / dim)
    angles = torch.arange(positions, device=DEVICE)[:, None] * frequencies
    return angles.cos(), angles.sin()
