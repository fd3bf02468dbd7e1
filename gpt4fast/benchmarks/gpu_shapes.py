"""The shapes that are measured on a GPU: large enough to fill one, and the small ones of serving."""

from __future__ import annotations

import torch

from .shapes import BFLOAT16, DCGAN64, FLOAT32, AttentionCell, ConvTransposeCell, Layer


def attention_cells() -> list[AttentionCell]:
    causal = [(8, 16, 16, 512, 64), (4, 16, 16, 1024, 128), (4, 16, 16, 4096, 64), (2, 16, 16, 4096, 128)]
    full = [(16, 16, 16, 512, 64), (64, 12, 12, 197, 64)]
    cells = [AttentionCell(*shape, dtypes=BFLOAT16) for shape in (*causal, (1, 32, 8, 8192, 128))]
    cells += [AttentionCell(*shape, causal=False, dtypes=BFLOAT16) for shape in full]
    cells += [AttentionCell(4, 12, 12, 1024, 64, dtypes=FLOAT32)]
    cells += [AttentionCell(*shape, mode="training", dtypes=BFLOAT16) for shape in causal]
    decode = [(1, 12, 12, 1024, 64), (1, 32, 8, 4096, 128), (16, 32, 8, 4096, 128), (64, 32, 8, 1024, 128)]
    decode.append((1, 32, 8, 32768, 128))
    return cells + [AttentionCell(*shape, mode="decode", dtypes=BFLOAT16) for shape in decode]


def conv_transpose_cells() -> list[ConvTransposeCell]:
    cells = []

    def add(name: str, batch: int, layers, *size: int, mode: str = "forward", dtypes=BFLOAT16) -> None:
        layers = layers if isinstance(layers, tuple) else (layers,)
        cells.append(ConvTransposeCell(f"{name} b{batch}", batch, layers, size, mode, dtypes))

    add("DCGAN-64 generator", 1, DCGAN64, 1, 1)
    add("DCGAN-64 generator", 64, DCGAN64, 1, 1, dtypes=BFLOAT16 + FLOAT32)
    for layer, n in zip(DCGAN64[1:4], (4, 8, 16), strict=True):
        add(f"{layer.in_channels}→{layer.out_channels} BN ReLU, {n}²", 64, layer, n, n)
    add("last 64→3 + tanh, 32²", 64, DCGAN64[-1], 32, 32)
    add("bare 256→128, 32²", 16, Layer(256, 128), 32, 32)
    add("bare 64→32, 128²", 16, Layer(64, 32), 128, 128)
    add("pix2pix 1024→512, 8²", 16, Layer(1024, 512, norm="batch", activation="relu"), 8, 8)
    add("SAM 64→32 k2 + GELU, 128²", 4, Layer(64, 32, 2, 2, 0, None, "gelu"), 128, 128)
    add("HiFi-GAN 512→256 k16 s8, T 100", 16, Layer(512, 256, 16, 8, 4), 100)
    add("HiFi-GAN 128→64 k4, T 6400", 16, Layer(128, 64), 6400)
    add("3-D 128→64 BN ReLU, 8·16·16", 8, Layer(128, 64, norm="batch", activation="relu"), 8, 16, 16)
    add("depthwise 128, 64²", 16, Layer(128, 128, groups=128, norm="batch", activation="relu"), 64, 64)
    add("512→256 BN ReLU fwd+bwd, 4²", 64, DCGAN64[1], 4, 4, mode="training")
    add("128→64 BN ReLU fwd+bwd, 16²", 64, DCGAN64[3], 16, 16, mode="training")
    add("DCGAN-64 step", 64, DCGAN64, 1, 1, mode="step")
    return cells


def cells() -> list[tuple[AttentionCell | ConvTransposeCell, torch.dtype]]:
    """Pairs of a cell and a dtype."""
    return [(cell, dtype) for cell in (*attention_cells(), *conv_transpose_cells()) for dtype in cell.dtypes]
