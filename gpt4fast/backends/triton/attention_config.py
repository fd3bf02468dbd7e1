"""Tile sizes of the Triton kernels of attention: pure functions of sizes and of the GPU's generation.

Chosen by what fits in registers and shared memory (tests/backends/triton/test_machine_code.py); half types on Hopper by
measurements (benchmarks/LOG.md).
"""

from __future__ import annotations

from torch import Tensor

KIB = 1024

# By how products are computed and by the widest row, 64, 128 or 256: (rows that stay, rows that pass, warps, at most so
# many stages). What stays is queries in the forward kernel and in that of their gradient, keys and values in that of
# theirs.
FORWARD = {
    "half": {64: (128, 64, 8, 3), 128: (128, 64, 8, 3), 256: (64, 32, 8, 3)},
    "tf32": {64: (64, 32, 4, 3), 128: (64, 32, 8, 3), 256: (32, 16, 4, 3)},
    "ieee": {64: (64, 32, 8, 3), 128: (32, 16, 4, 3), 256: (32, 16, 8, 3)},
}
BACKWARD_QUERY = {
    "half": {64: (128, 64, 8, 2), 128: (128, 32, 8, 2), 256: (64, 32, 8, 2)},
    "tf32": {64: (64, 32, 8, 2), 128: (64, 32, 8, 2), 256: (32, 16, 8, 2)},
    "ieee": {64: (64, 32, 8, 2), 128: (32, 16, 4, 2), 256: (16, 16, 4, 2)},
}
BACKWARD_KEY_VALUE = {
    "half": {64: (128, 32, 8, 2), 128: (64, 32, 8, 2), 256: (32, 32, 8, 2)},
    "tf32": {64: (64, 32, 8, 2), 128: (32, 32, 8, 2), 256: (32, 16, 8, 2)},
    "ieee": {64: (32, 32, 8, 2), 128: (32, 32, 8, 2), 256: (16, 16, 4, 2)},
}
# Half types by the generation, where it has tiles of its own. Hopper's 64 x 64 by four warps leave room for more blocks
# on a multiprocessor (H200, 4096 keys: the three kernels 1.06, 1.29 and 1.02 times as fast for rows of 128, and that of
# keys and values 1.4 for rows of 64). The sums of that kernel fill the registers, and Blackwell has tensor memory.
FORWARD_OF = {9: {128: (64, 64, 4, 3)}}
BACKWARD_QUERY_OF = {9: {128: (64, 64, 4, 2)}}
BACKWARD_KEY_VALUE_OF = {
    9: {64: (64, 64, 4, 1), 128: (64, 32, 4, 1)},
    10: {64: (128, 64, 8, 2), 128: (128, 32, 8, 2), 256: (64, 32, 8, 2)},
}


def padded(size: int) -> int:
    """The power of two, at least 16, in which a tile holds ``size`` columns."""
    return max(16, 1 << max(0, size - 1).bit_length())


def padded_values(size: int, capability: tuple[int, int]) -> int:
    """The same for rows of values. On Hopper at least 32: ptxas 12.8, which Triton 3.6 brings, loses the address of a
    tile of 16 that no asynchronous copy fetches (compute-sanitizer on an H200; the machine code shows it)."""
    return max(32 if capability[0] == 9 else 16, padded(size))


def shared_memory(capability: tuple[int, int]) -> int:
    """Bytes that one block may use."""
    if capability[0] in (9, 10):
        return 227 * KIB
    return 163 * KIB if capability in ((8, 0), (8, 7)) else 99 * KIB


def takes_descriptor(matrices: Tensor, capability: tuple[int, int]) -> bool:
    """Whether (B, H, L, D) can be fetched through a tensor descriptor: not empty, its rows and their start at whole 16
    bytes, and nothing that is read twice under several indices."""
    if capability < (9, 0) or matrices.numel() == 0 or matrices.stride(3) != 1 or matrices.data_ptr() % 16:
        return False
    return all(stride > 0 and stride * matrices.itemsize % 16 == 0 for stride in matrices.stride()[:3])


def forward_tile(
    itemsize: int, head_dim: int, value_dim: int, capability: tuple[int, int], tf32: bool = False, extras: bool = False
) -> dict[str, int]:
    """For ``forward_kernel``; ``tf32`` is for float32, ``extras`` whether there is a mask, a soft cap or dropout."""
    width = _width(head_dim, value_dim)
    block_m, block_n, warps, most = _tiles(FORWARD, FORWARD_OF, itemsize, tf32, capability, extras)[width]
    block_m = _halved(block_m, extras)
    stages = _stages(block_m * width * itemsize, block_n, block_m, width, itemsize, capability, extras)
    return {"BLOCK_M": block_m, "BLOCK_N": block_n, "num_warps": warps, "num_stages": min(most, stages)}


def backward_query_tile(
    itemsize: int, head_dim: int, value_dim: int, capability: tuple[int, int], tf32: bool = False, extras: bool = False
) -> dict[str, int]:
    """For ``backward_query_kernel``."""
    width = _width(head_dim, value_dim)
    block_m, block_n, warps, most = _tiles(BACKWARD_QUERY, BACKWARD_QUERY_OF, itemsize, tf32, capability, extras)[width]
    block_m, block_n = _halved(block_m, extras), _halved(block_n, extras)
    stages = _stages(2 * block_m * width * itemsize, block_n, block_m, width, itemsize, capability, extras)
    return {"BLOCK_M": block_m, "BLOCK_N": block_n, "num_warps": warps, "num_stages": min(most, stages)}


def backward_key_value_tile(
    itemsize: int, head_dim: int, value_dim: int, capability: tuple[int, int], tf32: bool = False, extras: bool = False
) -> dict[str, int]:
    """For ``backward_key_value_kernel``."""
    width = _width(head_dim, value_dim)
    tiles = _tiles(BACKWARD_KEY_VALUE, BACKWARD_KEY_VALUE_OF, itemsize, tf32, capability, extras)
    block_n, block_m, warps, most = tiles[width]
    block_n = _halved(block_n, extras)
    stages = _stages(2 * block_n * width * itemsize, block_m, block_n, width, itemsize, capability, extras)
    return {"BLOCK_M": block_m, "BLOCK_N": block_n, "num_warps": warps, "num_stages": min(most, stages)}


def decode_tile(
    itemsize: int, head_dim: int, value_dim: int, capability: tuple[int, int], rows: int, tf32: bool = False
) -> dict[str, int]:
    """For ``decode_kernel``, of which ``rows`` queries share a head's keys: as many keys at once as the registers of
    128 threads hold, since memory is what the kernel waits for."""
    width = _width(head_dim, value_dim)
    block_m = min(64 if itemsize == 2 else 16, padded(rows))
    block_n = max(16, (8192 if itemsize == 2 else 2048) // width)
    stages = _stages(block_m * width * itemsize, block_n, block_m, width, itemsize, capability, extras=False)
    return {"BLOCK_M": block_m, "BLOCK_N": block_n, "num_warps": 4, "num_stages": stages}


def decode_splits(programs: int, capacity: int, block_n: int, processors: int) -> int:
    """Into how many parts the keys are cut, a power of two: so many that two programs run on each multiprocessor, none
    without a tile, and no more than one program combines."""
    wanted = min(-(-2 * processors // programs), -(-capacity // block_n), 64)
    return 1 << max(0, wanted.bit_length() - 1)


def _width(head_dim: int, value_dim: int) -> int:
    return max(64, padded(head_dim), padded(value_dim))


def _tiles(
    tables: dict, by_generation: dict, itemsize: int, tf32: bool, capability: tuple[int, int], extras: bool
) -> dict[int, tuple[int, int, int, int]]:
    if itemsize == 2:
        has_room = capability[0] != 9 or not extras  # in its registers, which Hopper's own tiles fill
        return tables["half"] | (by_generation.get(capability[0], {}) if has_room else {})
    return tables["tf32" if tf32 else "ieee"]


def _halved(rows: int, extras: bool) -> int:
    """Soft cap, mask and dropout each keep a tile of scores more in registers. (Halving only what passes, three kernels
    of 14 spilled.)"""
    return max(16, rows // 2) if extras else rows


def _stages(
    staying: int, rows: int, columns: int, width: int, itemsize: int, capability: tuple[int, int], extras: bool
) -> int:
    """How many pairs of passing tiles, and tiles of the mask, fit beside the bytes that stay and a tile of scores that
    changes its layout."""
    scores = rows * columns * 4
    stage = 2 * rows * width * itemsize + (scores if extras else 0)
    return max(1, min(3, (shared_memory(capability) - staying - scores) // stage))
