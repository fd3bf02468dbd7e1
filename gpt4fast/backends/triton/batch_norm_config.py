"""Tile sizes of the Triton kernels of batch norm: pure functions of sizes."""

from __future__ import annotations

from .conv_transpose_config import power_of_two

ELEMENTS = 2048  # of a tile: 16 a thread, in accesses of 16 bytes


def tile(pixels: int, channels: int, channels_last: bool) -> dict[str, int]:
    """For every kernel but ``combine_kernel``: BLOCK_M pixels and BLOCK_N channels, neighbours in memory together."""
    block_n = power_of_two(channels, 1, 64) if channels_last else 1
    return {"BLOCK_M": power_of_two(pixels, 1, ELEMENTS // block_n), "BLOCK_N": block_n, "num_warps": 4}
