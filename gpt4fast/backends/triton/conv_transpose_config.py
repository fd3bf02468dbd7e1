"""Tile sizes of the Triton kernels of transposed convolution: pure functions of sizes and of the GPU's generation.

Chosen by what fits in registers and shared memory (tests/backends/triton/test_conv_transpose_compiled.py); not yet by
measurements.
"""

from __future__ import annotations

WARP = 32


def ceil_div(a: int, b: int) -> int:
    return -(-a // b)


def power_of_two(size: int, low: int, high: int) -> int:
    """The smallest power of two that holds ``size``, within bounds that are powers of two."""
    return min(high, max(low, 1 << max(0, size - 1).bit_length()))


def convolution_tile(
    pixels: int,
    outputs: int,
    channels: int,
    copies: int,
    itemsize: int,
    tensor_cores: bool,
    capability: tuple[int, int],
    processors: int,
) -> dict[str, int]:
    """For ``convolution_kernel``: ``copies`` products (pixels, taps x channels) x (taps x channels, outputs), one for
    each phase and group."""
    large = 128 if tensor_cores else 64
    block_m, block_n = power_of_two(pixels, 16, large), power_of_two(outputs, 16, large)
    # Smaller tiles while there are not enough for every multiprocessor; Hopper's instruction needs 64 rows.
    while block_m > 64 and ceil_div(pixels, block_m) * ceil_div(outputs, block_n) * copies < processors:
        block_m //= 2
    return _with_depth(block_m, block_n, channels, itemsize, tensor_cores, capability)


def weight_gradient_tile(
    channels: int, outputs: int, pixels: int, itemsize: int, tensor_cores: bool, capability: tuple[int, int]
) -> dict[str, int]:
    """For ``weight_gradient_kernel``: products (channels, pixels) x (pixels, outputs), one per tap and group."""
    block_m = power_of_two(channels, 16, 128 if tensor_cores else 64)
    block_n = power_of_two(outputs, 16, 128 if itemsize == 2 else 64)  # float32 spills registers on Ampere with 128
    return _with_depth(block_m, block_n, pixels, itemsize, tensor_cores, capability)


def _with_depth(
    block_m: int, block_n: int, depth: int, itemsize: int, tensor_cores: bool, capability: tuple[int, int]
) -> dict[str, int]:
    # Of shared memory, Hopper and the Blackwell of data centres have 227 KiB a block, Ampere 163, smaller GPUs 99.
    roomy = capability[0] in (9, 10)
    deepest = (128 if roomy else 64) // itemsize if tensor_cores else 16
    block_k = power_of_two(depth, 16, deepest)
    stage = (block_m + block_n) * block_k * itemsize
    return {
        "BLOCK_M": block_m,
        "BLOCK_N": block_n,
        "BLOCK_K": block_k,
        "num_warps": 8 if block_m * block_n >= 128 * 128 else 4,
        "num_stages": min(4, (192 if roomy else 96) * 1024 // stage),
    }


def depthwise_tile(pixels: int, channels: int, channels_last: bool) -> dict[str, int]:
    """For either kernel, with one input and one output channel per group: neighbours in memory are read together."""
    block_n = power_of_two(channels, 1, WARP) if channels_last else 1
    block_m = power_of_two(pixels, 1, 512 // block_n)
    return {"BLOCK_M": block_m, "BLOCK_N": block_n, "BLOCK_K": 1, "num_warps": 4, "num_stages": 2}


def pixels_per_program(pixels: int, block: int, tiles: int, processors: int) -> int:
    """How many pixels one program of ``weight_gradient_kernel`` adds up: a multiple of ``block``, such that ``tiles``
    programs per part occupy the GPU about twice, and that a part is worth its share of the second sum."""
    blocks = ceil_div(pixels, block)
    parts = max(1, min(ceil_div(2 * processors, tiles), blocks // 4))
    return max(1, ceil_div(blocks, parts)) * block
