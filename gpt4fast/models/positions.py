"""Where tokens stand: rotary positions, and T5's relative ones. Learned positions are an embedding in `Stack`."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from .config import TransformerConfig

Rotary = tuple[Tensor, Tensor]  # cosines and sines, each (length, pairs of channels)


def rotary_tables(length: int, config: TransformerConfig, like: Tensor) -> list[Rotary]:
    """Each layer's cosines and sines of the rotary positions (RoFormer, Su et al. 2021), on like's device. Layers that
    turn alike share theirs.

    Made anew for every forward and always in at least float32: kept as buffers they would follow
    `.to(torch.bfloat16)`, whose 8 bits cannot tell position 257 from 256.
    """
    dtype = torch.promote_types(like.dtype, torch.float32)
    places = torch.arange(length, device=like.device, dtype=dtype)[:, None]

    def tables(base: float, frequencies: tuple[float, ...] | None = None) -> Rotary:
        if frequencies is not None:
            turns = torch.tensor(frequencies, device=like.device, dtype=dtype)
        else:
            half = torch.arange(0, config.head_dim, 2, device=like.device, dtype=dtype) / config.head_dim
            turns = base**-half
        angles = places * turns
        return angles.cos(), angles.sin()

    all_layers = tables(config.rotary_base, config.rotary_frequencies)
    if config.window_rotary_base is None or config.windows is None:
        return [all_layers] * config.num_layers
    windowed = tables(config.window_rotary_base)
    return [windowed if window else all_layers for window in config.windows]


def apply_rotary(x: Tensor, tables: Rotary) -> Tensor:
    """Turns the pairs (x[i], x[i + R/2]) of the first R channels of x (..., L, D) by each position's angles, R / 2 of
    them; the other channels pass."""
    cos, sin = tables
    half = cos.shape[-1]
    first, second, rest = x.split([half, half, x.shape[-1] - 2 * half], dim=-1)
    first, second = first.to(cos.dtype), second.to(cos.dtype)
    turned = torch.cat((first * cos - second * sin, first * sin + second * cos), dim=-1).to(x.dtype)
    return torch.cat((turned, rest), dim=-1) if rest.shape[-1] else turned


class RelativeBias(nn.Module):
    """T5's positions (Raffel et al. 2020): a learned number per head and distance, added to the scores of all layers.

    Distances are told apart one by one up to a half of the buckets (of each direction, where a query looks both ways),
    and beyond by their logarithm, up to `relative_max_distance`.
    """

    def __init__(self, config: TransformerConfig):
        super().__init__()
        self.max_distance = config.relative_max_distance
        self.bias = nn.Embedding(config.relative_buckets, config.num_heads)

    def forward(self, places: Tensor, length: int, *, is_causal: bool) -> Tensor:
        """(B, H, Lq, length) for queries at places (B, Lq) and keys from 0 to length."""
        ahead = torch.arange(length, device=places.device) - places[..., None]  # (B, Lq, length)
        buckets = self.bias.num_embeddings
        if is_causal:  # what lies ahead is not seen
            start, distance = 0, (-ahead).clamp(min=0)
        else:
            buckets //= 2
            start, distance = (ahead > 0) * buckets, ahead.abs()
        exact = buckets // 2
        # In float32, as in T5, whose rounding decides the bucket of a distance on the border of two.
        growth = (distance.clamp(min=1).float() / exact).log() / math.log(self.max_distance / exact)
        far = (exact + (growth * (buckets - exact)).long()).clamp(max=buckets - 1)
        return self.bias(start + torch.where(distance < exact, distance, far)).permute(0, 3, 1, 2)
