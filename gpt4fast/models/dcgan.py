"""DCGAN: images from noise by transposed convolutions, and the convolutions that judge them (Radford et al. 2016).

Two stems, that is, two ways for the noise to reach the first transposed convolution:

    "standard"  as it is: 100 → 256 → 128 → 64 → 3 to 32×32, 100 → 512 → 256 → 128 → 64 → 3 to 64×64
    "tutorial"  through linear layers first, 100 → 256 → 512 → 784 → 100, as in the tutorial (docs/tutorial.md)

Every transposed convolution has a 4×4 kernel. The first turns a 1×1 image into 4×4; each of the others, with stride 2
and padding 1, doubles it. Batch norm and activation belong to the layer, so that inference runs each as one kernel.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import pairwise
from typing import ClassVar

from torch import Tensor, nn

from gpt4fast.nn import ConvTranspose2d

from .config import check_choice, check_positive
from .pretrained import Pretrained

STEM_WIDTHS = (256, 512, 784)
CONVOLUTIONS = (nn.Conv1d, nn.Conv2d)
TRANSPOSED_CONVOLUTIONS = (nn.ConvTranspose1d, nn.ConvTranspose2d)


@dataclass
class DCGANConfig:
    """Sizes of both networks, so that one configuration describes a pair that fits.

    Raises:
        ValueError: a size is not positive, image_size is not a power of two from 8 on, or a choice is unknown.
    """

    latent_dim: int = 100
    image_size: int = 32  # a power of two, at least 8
    channels: int = 3  # of the image
    base_channels: int = 64  # of the largest hidden image; each halving of the size doubles them
    stem: str = "tutorial"  # "tutorial", "standard"
    generator_norm: str | None = "batch"  # "batch", None
    # Batch norm in the discriminator, as in the paper, makes an image's logit depend on the others of its batch, which
    # a gradient penalty (R1) must not have. So none is the default.
    discriminator_norm: str | None = None  # "batch", None

    def __post_init__(self) -> None:
        for name in ("latent_dim", "image_size", "channels", "base_channels"):
            check_positive(name, getattr(self, name))
        if self.image_size < 8 or self.image_size & (self.image_size - 1):
            raise ValueError(f"image_size must be a power of two, at least 8, got {self.image_size}")
        check_choice("stem", self.stem, ("tutorial", "standard"))
        check_choice("generator_norm", self.generator_norm, ("batch", None))
        check_choice("discriminator_norm", self.discriminator_norm, ("batch", None))

    @property
    def widths(self) -> list[int]:
        """Channels of the hidden images, from the 4×4 to the half-size one: 256, 128, 64 for 32×32."""
        doublings = self.image_size.bit_length() - 4
        return [self.base_channels << i for i in reversed(range(doublings + 1))]


class DCGANGenerator(Pretrained, nn.Module):
    """Noise (B, latent_dim) to images (B, channels, image_size, image_size) in [-1, 1]."""

    model_type: ClassVar[str] = "dcgan_generator"
    config_class: ClassVar[type] = DCGANConfig

    def __init__(self, config: DCGANConfig):
        super().__init__()
        self.config = config
        widths, norm = config.widths, config.generator_norm
        bias = norm is None  # batch norm takes any bias out again
        self.stem = nn.Sequential()
        if config.stem == "tutorial":
            # Without batch norm the linear layers learn to ignore the noise, and all images become one.
            for before, after in pairwise([config.latent_dim, *STEM_WIDTHS, config.latent_dim]):
                norms = [] if norm is None else [nn.BatchNorm1d(after)]
                self.stem.extend([nn.Linear(before, after, bias=bias), *norms, nn.ReLU()])
        self.layers = nn.Sequential(
            ConvTranspose2d(config.latent_dim, widths[0], 4, bias=bias, norm=norm, activation="relu")
        )
        for before, after in pairwise(widths):
            self.layers.append(
                ConvTranspose2d(before, after, 4, stride=2, padding=1, bias=bias, norm=norm, activation="relu")
            )
        self.layers.append(ConvTranspose2d(widths[-1], config.channels, 4, stride=2, padding=1, activation="tanh"))
        init_he(self)
        # From a 1×1 image each output meets one number of its kernel, not sixteen.
        nn.init.normal_(self.layers[0].weight, std=(2 / config.latent_dim) ** 0.5)

    def forward(self, z: Tensor) -> Tensor:
        check_latent(z, self.config.latent_dim)
        return self.layers(self.stem(z)[:, :, None, None])


class DCGANDiscriminator(Pretrained, nn.Module):
    """Images (B, channels, image_size, image_size) to unbounded logits (B,): positive says real. Losses take logits."""

    model_type: ClassVar[str] = "dcgan_discriminator"
    config_class: ClassVar[type] = DCGANConfig

    def __init__(self, config: DCGANConfig):
        super().__init__()
        self.config = config
        widths, norm = config.widths[::-1], config.discriminator_norm
        self.layers = nn.Sequential(nn.Conv2d(config.channels, widths[0], 4, stride=2, padding=1), nn.LeakyReLU(0.2))
        for before, after in pairwise(widths):
            self.layers.append(nn.Conv2d(before, after, 4, stride=2, padding=1, bias=norm is None))
            if norm == "batch":
                self.layers.append(nn.BatchNorm2d(after))
            self.layers.append(nn.LeakyReLU(0.2))
        self.layers.append(nn.Conv2d(widths[-1], 1, 4))
        init_he(self)

    def forward(self, images: Tensor) -> Tensor:
        size = (self.config.channels, self.config.image_size, self.config.image_size)
        if images.dim() != 4 or images.shape[1:] != size:
            raise ValueError(f"images must be (batch, {', '.join(map(str, size))}), got {tuple(images.shape)}")
        return self.layers(images).flatten()


def check_latent(z: Tensor, latent_dim: int) -> None:
    if z.dim() != 2 or z.shape[1] != latent_dim:
        raise ValueError(f"z must be (batch, {latent_dim}), got {tuple(z.shape)}")
    if not z.is_floating_point():
        raise TypeError(f"z must be floating point, got {z.dtype}")


def init_he(model: nn.Module) -> None:
    """He's initial values (2015): every layer passes on the variance that it gets.

    The DCGAN paper's N(0, 0.02) relies on a batch norm behind every layer; without one the discriminator's logits begin
    a thousand times too small. TensorFlow's default, the WaveGAN paper's, fades a hundredfold in five layers.
    """
    layers = [m for m in model.modules() if isinstance(m, (nn.Linear, *CONVOLUTIONS, *TRANSPOSED_CONVOLUTIONS))]
    for layer in layers:
        if isinstance(layer, TRANSPOSED_CONVOLUTIONS):  # with a stride, each output meets a share of the kernel only
            terms = layer.weight[:, 0].numel() / math.prod(layer.stride)
        else:
            terms = layer.weight[0].numel()
        nn.init.normal_(layer.weight, std=((1 if layer is layers[-1] else 2) / terms) ** 0.5)
        if layer.bias is not None:
            nn.init.zeros_(layer.bias)
