"""Rotary positions of transformers' configurations: their base, and the frequencies of a stretched context.

Every scaling is in the end one number of radians per position for each pair of channels, which is what our
configuration holds. transformers writes `rope_parameters`; before version 5 it wrote `rope_theta` and `rope_scaling`.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from .fields import Fields


def read_rotary(fields: Fields, head_dim: int, default_base: float = 10000.0) -> tuple[dict[str, Any], float]:
    """The fields of our configuration, and the factor that the scaling puts on queries and on keys (YaRN)."""
    parameters = fields.get("rope_parameters", None) or fields.get("rope_scaling", None) or {}
    return parse_rotary(fields, parameters, fields.number("rope_theta", None) or default_base, head_dim)


def parse_rotary(
    fields: Fields, parameters: dict[str, Any], base: float, head_dim: int
) -> tuple[dict[str, Any], float]:
    """As `read_rotary`, of one such dictionary, whose own rope_theta comes before `base`."""
    length = fields.get("max_position_embeddings", None)
    rotary = Fields({"original_max_position_embeddings": length} | parameters, f"{fields.where}, rope_parameters")
    rotary.only(partial_rotary_factor=1.0)
    base = float(rotary.number("rope_theta", None) or base)
    kind = rotary.get("rope_type", rotary.get("type", "default"))
    if kind not in _SCALINGS:
        raise rotary.refusal("rope_type", kind, " or ".join(map(repr, _SCALINGS)))
    ours: dict[str, Any] = {"positions": "rotary", "rotary_base": base}
    if _SCALINGS[kind] is None:
        return ours, 1.0
    # In float32, as transformers: other roundings would be as good, but its logits are what ours are held against.
    plain = 1.0 / base ** (torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim)
    try:
        frequencies, factor = _SCALINGS[kind](plain, rotary, base)
    except KeyError as error:
        raise ValueError(f"{rotary.where}: rope_type {kind!r} needs {error}, which is missing") from None
    except (TypeError, ArithmeticError, ValueError, RuntimeError) as error:
        raise ValueError(f"{rotary.where}: {parameters!r} has a value that makes no frequencies: {error}") from error
    return ours | {"rotary_frequencies": tuple(frequencies.tolist())}, factor


def _linear(plain: Tensor, rotary: Fields, base: float) -> tuple[Tensor, float]:
    """Positions count slower by a factor (Chen et al. 2023)."""
    return plain / rotary.values["factor"], 1.0


def _llama3(plain: Tensor, rotary: Fields, base: float) -> tuple[Tensor, float]:
    """Llama 3.1: long waves are stretched, short ones are not, and between them it is both by degrees."""
    factor, low, high, length = (
        rotary.values[name]
        for name in ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")
    )
    waves = 2 * math.pi / plain
    smooth = ((length / waves - low) / (high - low)).clamp(0, 1)
    return (1 - smooth) * plain / factor + smooth * plain, 1.0


def _yarn(plain: Tensor, rotary: Fields, base: float) -> tuple[Tensor, float]:
    """YaRN (Peng et al. 2023): as Llama's by the number of turns within the first context, and larger scores."""
    factor, length = rotary.values["factor"], rotary.values["original_max_position_embeddings"]
    rotary.only(mscale=None, mscale_all_dim=None)
    size = 2 * len(plain)

    def channel(turns: float) -> float:  # whose wave turns so often
        return size * math.log(length / (turns * 2 * math.pi)) / (2 * math.log(base))

    low, high = channel(rotary.get("beta_fast", None) or 32), channel(rotary.get("beta_slow", None) or 1)
    if rotary.get("truncate", True):
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, size - 1)
    high += 0.001 if low == high else 0
    stretched = ((torch.arange(len(plain)) - low) / (high - low)).clamp(0, 1)
    attention = rotary.get("attention_factor", None)
    if attention is None:
        attention = 0.1 * math.log(factor) + 1 if factor > 1 else 1.0
    return plain / factor * stretched + plain * (1 - stretched), attention


def _factors(plain: Tensor, rotary: Fields, base: float) -> tuple[Tensor, float]:
    """GGUF's rope_freqs: the scaling of each pair, worked out when the file was made."""
    return plain / torch.tensor(rotary.values["factors"], dtype=torch.float32), 1.0


_SCALINGS = {"default": None, "linear": _linear, "llama3": _llama3, "yarn": _yarn, "factors": _factors}
