"""Moving pictures: a walk through the latent space of an image generator, as a GIF that loops without a seam."""

from __future__ import annotations

import os
from pathlib import Path

import torch
from torch import nn

from gpt4fast.generation.images import run_in_eval, tile, to_pixels


def interpolate_latents(anchors: torch.Tensor, steps: int) -> torch.Tensor:
    """A closed walk through `anchors` (n, …, latent), `steps` frames from each to the next: (n · steps, …, latent).

    Spherical interpolation (White 2016) keeps the length that normal latents have; a straight line would pass near
    zero, where the generator was never trained. Frame i · steps is anchor i itself.
    """
    if anchors.dim() < 2 or len(anchors) < 2:
        raise ValueError(f"anchors must be (n ≥ 2, …, latent), was {tuple(anchors.shape)}")
    if steps < 1:
        raise ValueError(f"steps must be at least 1, was {steps}")
    start, end = anchors, anchors.roll(-1, 0)
    cosine = torch.nn.functional.cosine_similarity(start, end, dim=-1).clamp(-1, 1)
    angle = cosine.arccos().unsqueeze(-1)
    fractions = torch.arange(steps).div(steps).reshape(steps, *[1] * anchors.dim())
    sine = angle.sin()
    walk = torch.where(
        sine > 1e-4,
        (((1 - fractions) * angle).sin() * start + (fractions * angle).sin() * end) / sine.clamp_min(1e-4),
        start + fractions * (end - start),
    )
    return walk.transpose(0, 1).flatten(0, 1)


@torch.no_grad()
def latent_walk(
    generator: nn.Module,
    path: str | os.PathLike,
    *,
    seed: int,
    anchors: int = 6,
    steps: int = 12,
    pictures: int = 16,
    frames_per_second: int = 12,
    scale: int = 2,
) -> Path:
    """Writes a GIF of anchors · steps frames, each a grid of `pictures` images that change into each other."""
    from PIL import Image

    ends = torch.randn(anchors, pictures, generator.config.latent_dim, generator=torch.Generator().manual_seed(seed))
    frames = []
    for latents in interpolate_latents(ends, steps):
        pixels = to_pixels(tile(run_in_eval(generator, latents))[None])[0]
        picture = Image.fromarray(pixels[..., 0] if pixels.shape[-1] == 1 else pixels)
        size = (picture.width * scale, picture.height * scale)
        frames.append(picture.resize(size, Image.Resampling.NEAREST))
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    frames[0].save(path, save_all=True, append_images=frames[1:], duration=round(1000 / frames_per_second), loop=0)
    return path
