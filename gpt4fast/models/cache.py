"""The key-value cache: what a decoder remembers, so that each new token costs one token's work."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..backends.reference.attention_decode import LARGEST, append, entries
from .config import TransformerConfig, check_choice, check_positive
from .inputs import Padding
from .positions import rotary_tables


@dataclass
class LayerCache:
    """One layer's view of the cache, as `gpt4fast.attention_decode` takes it."""

    key: Tensor  # (B, Hk, used, D)
    value: Tensor  # (B, Hk, used, D)
    lengths: Tensor  # (B,) int64, rows filled before this call
    starts: Tensor | None  # (B,) int64, left padding
    key_scales: Tensor | None  # (B, Hk, used) float32, of an int8 or float8 cache
    value_scales: Tensor | None

    def append(self, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Stores new entries (B, Hk, L, D) behind each row's last, and returns all of them in key's dtype."""
        places = self.lengths[:, None] + torch.arange(key.shape[2], device=key.device)
        for cache, scales, new in ((self.key, self.key_scales, key), (self.value, self.value_scales, value)):
            append(cache, scales, new, places, None)
        keys = entries(self.key, self.key_scales, None, key.dtype)
        values = entries(self.value, self.value_scales, None, key.dtype)
        return keys.to(key.dtype), values.to(key.dtype)


class KeyValueCache:
    """Room for max_length tokens per row, allocated once.

    A forward with the cache appends its tokens and attends to all before them; call after call (a prompt, a chunk, one
    token) the results equal one forward of the whole. Rows may have different lengths:

    - a prompt padded on the left keeps the rows level; the padding is never attended to (`starts`);
    - a prompt or chunk padded on the right advances each row by its real tokens only (`lengths`), and the next call
      overwrites the padding.

    With ``dtype=torch.int8`` the entries take a quarter of float32's memory and half of bfloat16's: each is rounded to
    1/127 of its largest number. With ``torch.float8_e4m3fn`` they take as little, and numbers are rounded to four
    significant bits.

    Rotary angles are those of the place in the cache. Left padding shifts a row's queries and keys alike, which rotary
    attention does not see; learned positions count from `starts`.
    """

    def __init__(
        self, config: TransformerConfig, batch: int, max_length: int, like: Tensor, dtype: torch.dtype | None = None
    ):
        check_positive("batch", batch)
        check_positive("max_length", max_length)
        if config.positions == "learned" and max_length > config.max_length:
            raise ValueError(
                f"max_length is {max_length}, more than the {config.max_length} learned positions of the model"
            )
        check_choice("dtype", dtype, (None, like.dtype, *LARGEST))
        shape = (config.num_layers, batch, config.num_kv_heads, max_length, config.head_dim)
        self.key = torch.zeros(shape, device=like.device, dtype=dtype or like.dtype)
        self.value = torch.zeros_like(self.key)
        self.scales: tuple[Tensor, Tensor] | None = None  # of the keys and values of such a cache, one per entry
        if dtype in LARGEST:
            self.scales = tuple(torch.ones(shape[:-1], device=like.device, dtype=torch.float32) for _ in range(2))
        self.lengths = torch.zeros(batch, device=like.device, dtype=torch.int64)
        self.starts: Tensor | None = None
        self.rotary = rotary_tables(max_length, config, like) if config.positions == "rotary" else None
        self.used = 0  # the longest row, known to the host, so that nobody has to ask the device
        # A decoder's cross-attention keys and values, per layer, and the encoder's padding: made at the first step,
        # then reused.
        self.cross: list[tuple[Tensor, Tensor]] | None = None
        self.cross_padding: Padding | None = None

    @property
    def batch(self) -> int:
        return self.key.shape[1]

    @property
    def max_length(self) -> int:
        return self.key.shape[3]

    def prepare(self, ids: Tensor, padding: Padding | None) -> None:
        """Checks that a chunk of token ids (B, L) fits, and notes the left padding of the first."""
        if ids.shape[0] != self.batch:
            raise ValueError(f"input_ids has {ids.shape[0]} rows, the cache was made for {self.batch}")
        if self.used + ids.shape[1] > self.max_length:
            raise ValueError(
                f"the cache holds {self.used} tokens of at most {self.max_length}; {ids.shape[1]} more do not fit"
            )
        if padding is None:
            return
        if self.used == 0:
            self.starts = padding.starts
        elif ids.device.type == "cpu" and bool(padding.starts.any()):
            raise ValueError(
                "attention_mask pads on the left of a later chunk; only the first chunk may be padded on the left"
            )

    def positions(self, length: int) -> Tensor:
        """Positions (B, length) of the next tokens, counted from each row's first real token; padding counts as 0."""
        starts = self.lengths if self.starts is None else self.lengths - self.starts
        return (starts[:, None] + torch.arange(length, device=starts.device)).clamp(min=0)

    def layer(self, index: int, length: int) -> LayerCache:
        """The view that a chunk of the given length reads and writes: no longer than needed, whatever was allocated."""
        stop = self.used + length
        key, value, *scales = (t[index, :, :, :stop] for t in (self.key, self.value, *(self.scales or ())))
        return LayerCache(key, value, self.lengths, self.starts, *(scales or (None, None)))

    def advance(self, length: int, padding: Padding | None) -> None:
        """Counts a chunk in, once all layers have stored it."""
        self.lengths = self.lengths + (length if padding is None else padding.lengths)
        self.used += length
