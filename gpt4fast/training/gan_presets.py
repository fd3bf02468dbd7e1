"""Settings with which a DCGAN draws digits and a WaveGAN plays drums after about a minute on two CPU cores each."""

from __future__ import annotations

import os
from collections.abc import Callable

import torch
from torch import Tensor, nn

from gpt4fast.data import augment, load_digits, load_drums
from gpt4fast.models import (
    DCGANConfig,
    DCGANDiscriminator,
    DCGANGenerator,
    WaveGANConfig,
    WaveGANDiscriminator,
    WaveGANGenerator,
)
from gpt4fast.training.gan import train_gan

Progress = Callable[[int, int, dict], None]
DIGITS_STEPS = 2000
DRUMS_STEPS = 900
VERSIONS = 30  # of every drum hit: itself and 29 at another pitch, loudness and delay


def digits_networks() -> tuple[DCGANGenerator, DCGANDiscriminator]:
    """The tutorial's DCGAN at half its width, 32×32 grey; always with the same initial values."""
    config = DCGANConfig(channels=1, base_channels=32, stem="tutorial")
    return _same_start(lambda: (DCGANGenerator(config), DCGANDiscriminator(config)))


def drums_networks() -> tuple[WaveGANGenerator, WaveGANDiscriminator]:
    """A WaveGAN at a quarter of the paper's width, 8,192 samples; always with the same initial values."""
    config = WaveGANConfig(samples=8192, base_channels=16)
    return _same_start(lambda: (WaveGANGenerator(config), WaveGANDiscriminator(config)))


def digits_gan(
    folder: str | os.PathLike[str], progress: Progress | None = None, scale: float = 1.0
) -> tuple[DCGANGenerator, DCGANDiscriminator, list[dict[str, float]]]:
    """Trains on the handwritten digits, with checkpoints in `folder`; about 90 s of CPU time at scale 1."""
    generator, discriminator = digits_networks()
    history = train_gan(
        generator,
        discriminator,
        load_digits("train", 32).images,
        folder,
        steps=max(1, round(DIGITS_STEPS * scale)),
        batch_size=32,
        lr=1e-3,
        progress=progress,
    )
    return generator, discriminator, history


def drums_gan(
    folder: str | os.PathLike[str], progress: Progress | None = None, scale: float = 1.0
) -> tuple[WaveGANGenerator, WaveGANDiscriminator, list[dict[str, float]]]:
    """Trains on the drum hits, with checkpoints in `folder`; about 115 s of CPU time at scale 1."""
    generator, discriminator = drums_networks()
    history = train_gan(
        generator,
        discriminator,
        drum_versions(load_drums("train").waves),
        folder,
        steps=max(1, round(DRUMS_STEPS * scale)),
        batch_size=16,
        # The discriminator must stay ahead: at equal rates, or with no momentum, all hits become one.
        lr=(5e-4, 1e-3),
        betas=(0.5, 0.99),
        r1=0.2,
        r1_every=8,
        progress=progress,
    )
    return generator, discriminator, history


def drum_versions(waves: Tensor) -> Tensor:
    """Few hits (N, samples) to many: (N * VERSIONS, 1, samples), the hits themselves first."""
    source = torch.Generator().manual_seed(0)
    others = [augment(waves, generator=source) for _ in range(VERSIONS - 1)]
    return torch.cat([waves, *others]).unsqueeze(1)


def _same_start(make: Callable[[], tuple[nn.Module, nn.Module]]) -> tuple[nn.Module, nn.Module]:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return make()
