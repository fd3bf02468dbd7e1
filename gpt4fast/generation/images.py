"""Pictures from an image generator: a grid as PNG."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import nn

if TYPE_CHECKING:
    import numpy as np


@torch.no_grad()
def sample_images(generator: nn.Module, count: int, seed: int) -> torch.Tensor:
    """`count` images (count, channels, height, width), float32 in [-1, 1], on the CPU; a seed fixes the latents."""
    if count < 1:
        raise ValueError(f"count must be at least 1, was {count}")
    latents = torch.randn(count, generator.config.latent_dim, generator=torch.Generator().manual_seed(seed))
    return run_in_eval(generator, latents)


def run_in_eval(generator: nn.Module, latents: torch.Tensor) -> torch.Tensor:
    """Runs the generator in evaluation mode (batch norm: running statistics), restores its mode; float32 on the CPU."""
    parameter = next(generator.parameters())
    was_training = generator.training
    generator.eval()
    try:
        return generator(latents.to(parameter.device, parameter.dtype)).float().cpu()
    finally:
        generator.train(was_training)


def to_pixels(images: torch.Tensor) -> np.ndarray:
    """(n, 1 or 3, height, width) in [-1, 1], clamped, to uint8 (n, height, width, channels); ValueError for NaN."""
    if images.dim() != 4 or images.shape[1] not in (1, 3):
        raise ValueError(f"images must be (n, 1 or 3, height, width), was {tuple(images.shape)}")
    if bool(images.isnan().any()):
        raise ValueError("images must not contain NaN")
    return ((images.float().clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8).permute(0, 2, 3, 1).cpu().numpy()


def tile(images: torch.Tensor, columns: int | None = None, gap: int = 2) -> torch.Tensor:
    """(n, channels, height, width) to one picture (channels, H, W), row by row, -1 between; near square if None."""
    count, channels, height, width = images.shape
    columns = min(count, columns or int((count - 1) ** 0.5) + 1)
    rows = -(-count // columns)
    canvas = torch.full((channels, rows * (height + gap) - gap, columns * (width + gap) - gap), -1.0)
    for i, image in enumerate(images):
        top, left = i // columns * (height + gap), i % columns * (width + gap)
        canvas[:, top : top + height, left : left + width] = image
    return canvas


def save_image(image: torch.Tensor, path: str | os.PathLike, scale: int = 1) -> Path:
    """Writes one picture (1 or 3, height, width) in [-1, 1], format by suffix. `scale` repeats pixels, unsmoothed."""
    from PIL import Image

    pixels = to_pixels(image[None])[0]
    picture = Image.fromarray(pixels[..., 0] if pixels.shape[-1] == 1 else pixels)
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    picture.resize((picture.width * scale, picture.height * scale), Image.Resampling.NEAREST).save(path)
    return path


def sample_grid(
    generator: nn.Module, count: int, seed: int, path: str | os.PathLike, *, columns: int | None = None, scale: int = 2
) -> Path:
    """Draws `count` images from the generator and writes them as one grid."""
    return save_image(tile(sample_images(generator, count, seed), columns), path, scale)
