"""WaveGAN: sound from noise, DCGAN flattened to one dimension (Donahue, McAuley and Puckette 2019).

A 4×4 kernel with stride 2 becomes a kernel of 25 with stride 4: as many weights, and a receptive field that grows as
fast per sample. A linear layer makes the first short, wide signal; each transposed convolution makes it four times
longer and half as wide. At the paper's 16,384 samples and base_channels 64: 16×1024 → 64×512 → 256×256 → 1024×128 →
4096×64 → 16384×1.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from gpt4fast.nn import ConvTranspose1d

from .config import check_positive
from .dcgan import check_latent, init_he
from .pretrained import Pretrained

KERNEL, STRIDE = 25, 4
PADDING, OUTPUT_PADDING = 11, 1  # 4 L samples out of L, and in the discriminator L out of 4 L


@dataclass
class WaveGANConfig:
    """Sizes of both networks.

    Raises:
        ValueError: a size is not positive, or samples is not a power of four times a number from 8 to 31.
    """

    latent_dim: int = 100
    samples: int = 8192  # 512 ms at 16 kHz
    channels: int = 1
    base_channels: int = 64  # of the longest hidden signal; each step to a shorter one doubles them
    phase_shuffle: int = 2  # the discriminator's, in samples; 0 is off

    def __post_init__(self) -> None:
        for name in ("latent_dim", "samples", "channels", "base_channels"):
            check_positive(name, getattr(self, name))
        if self.num_layers < 1 or self.start * STRIDE**self.num_layers != self.samples:
            raise ValueError(
                f"samples must be a power of four (4 or more) times a number from 8 to 31, got {self.samples}"
            )
        if not 0 <= self.phase_shuffle < self.start:
            raise ValueError(f"phase_shuffle must be from 0 to {self.start - 1}, got {self.phase_shuffle}")

    @property
    def num_layers(self) -> int:
        layers, length = 0, self.samples
        while length >= 8 * STRIDE:
            layers, length = layers + 1, length // STRIDE
        return layers

    @property
    def start(self) -> int:
        """Length of the shortest signal."""
        return self.samples // STRIDE**self.num_layers

    @property
    def widths(self) -> list[int]:
        """Channels of the hidden signals, from the shortest to the longest."""
        return [self.base_channels << i for i in reversed(range(self.num_layers))]


class WaveGANGenerator(Pretrained, nn.Module):
    """Noise (B, latent_dim) to waves (B, channels, samples) in [-1, 1]."""

    model_type: ClassVar[str] = "wavegan_generator"
    config_class: ClassVar[type] = WaveGANConfig

    def __init__(self, config: WaveGANConfig):
        super().__init__()
        self.config = config
        widths = [*config.widths, config.channels]
        self.linear = nn.Linear(config.latent_dim, widths[0] * config.start)
        self.layers = nn.Sequential()
        for before, after in pairwise(widths):
            last = len(self.layers) == config.num_layers - 1
            self.layers.append(
                ConvTranspose1d(
                    before, after, KERNEL, STRIDE, PADDING, OUTPUT_PADDING, activation="tanh" if last else "relu"
                )
            )
        init_he(self)

    def forward(self, z: Tensor) -> Tensor:
        check_latent(z, self.config.latent_dim)
        return self.layers(F.relu(self.linear(z)).unflatten(1, (-1, self.config.start)))


class WaveGANDiscriminator(Pretrained, nn.Module):
    """Waves (B, channels, samples) to logits (B,), unbounded: positive says real.

    In training, the hidden signals are shifted by a few random samples (phase shuffle). A transposed convolution leaves
    a tone of its stride in all it makes, always in the same phase; a discriminator that could rely on the phase would
    learn nothing else.
    """

    model_type: ClassVar[str] = "wavegan_discriminator"
    config_class: ClassVar[type] = WaveGANConfig

    def __init__(self, config: WaveGANConfig):
        super().__init__()
        self.config = config
        widths = [*config.widths, config.channels][::-1]
        self.layers = nn.ModuleList(
            nn.Conv1d(before, after, KERNEL, STRIDE, PADDING) for before, after in pairwise(widths)
        )
        self.linear = nn.Linear(widths[-1] * config.start, 1)
        init_he(self)

    def forward(self, waves: Tensor) -> Tensor:
        if waves.dim() != 3 or waves.shape[1:] != (self.config.channels, self.config.samples):
            raise ValueError(
                f"waves must be (batch, {self.config.channels}, {self.config.samples}), got {tuple(waves.shape)}"
            )
        x = waves
        for i, layer in enumerate(self.layers):
            x = F.leaky_relu(layer(x), 0.2)
            if self.training and self.config.phase_shuffle and i < len(self.layers) - 1:
                x = phase_shuffle(x, self.config.phase_shuffle)
        return self.linear(x.flatten(1)).squeeze(1)


def phase_shuffle(x: Tensor, most: int) -> Tensor:
    """Shifts each row of x (B, C, L) by its own random number of samples, `most` at most, mirrored at the ends."""
    L = x.shape[-1]
    shift = torch.randint(-most, most + 1, (len(x), 1, 1), device=x.device)
    index = (torch.arange(L, device=x.device) + shift).abs()  # mirrored at sample 0, then at sample L - 1
    index = L - 1 - (L - 1 - index).abs()
    return x.gather(2, index.expand(x.shape))
