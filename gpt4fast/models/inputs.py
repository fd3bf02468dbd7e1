"""What a transformer is given: token ids, labels and padding. A wrong one is named; nothing here waits for a GPU.

Attention never sees a padding mask. A row of padded tokens is a run of real ones, and a run is two numbers, where it
starts and where it ends: `gpt4fast.attention` takes them as `kv_starts` and `kv_lengths` and skips the rest, where a
mask would be read for every score.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .config import TransformerConfig

IGNORED_LABEL = -100  # torch's own ignore_index


def check_token_ids(name: str, ids: Tensor, config: TransformerConfig) -> None:
    """Raises unless ids is (B, L) int64 or int32 with every value in the vocabulary, and L at most max_length where
    positions have an end."""
    _check_integer_tensor(name, ids)
    if ids.dim() != 2:
        raise ValueError(f"{name} must be (batch, length), got shape {tuple(ids.shape)}")
    if ids.shape[1] > config.max_length and config.positions != "relative":
        raise ValueError(f"{name} has length {ids.shape[1]}, more than max_length = {config.max_length} of the model")
    _check_values(name, ids, config.vocab_size, "the vocabulary")


def check_token_types(types: Tensor | None, ids: Tensor, count: int) -> None:
    """Raises unless types is None, or has the shape of ids and every value below count."""
    if types is None:
        return
    if not count:
        raise ValueError("token_type_ids must be None: the model has token_types = 0")
    _check_integer_tensor("token_type_ids", types)
    if types.shape != ids.shape:
        raise ValueError(f"token_type_ids must have input_ids' shape {tuple(ids.shape)}, got {tuple(types.shape)}")
    _check_values("token_type_ids", types, count, "token_types")


def check_features(features: Tensor, mel_bins: int, max_length: int) -> None:
    """Raises unless features are floating-point (B, mel_bins, frames), two frames at most for a position."""
    if not isinstance(features, Tensor) or not features.is_floating_point():
        got = features.dtype if isinstance(features, Tensor) else type(features).__name__
        raise TypeError(f"input_ids must be floating-point features of audio, got {got}")
    if features.dim() != 3 or features.shape[1] != mel_bins or not 0 < features.shape[2] <= 2 * max_length:
        raise ValueError(
            f"input_ids must be features (batch, {mel_bins}, 1 to {2 * max_length} frames), got {tuple(features.shape)}"
        )


def check_labels(labels: Tensor, ids: Tensor, config: TransformerConfig, ids_name: str = "input_ids") -> None:
    """Raises unless labels has the shape of ids, and every value is in the vocabulary or -100."""
    _check_integer_tensor("labels", labels)
    if labels.shape != ids.shape:
        raise ValueError(f"labels must have the shape of {ids_name}, {tuple(ids.shape)}, got {tuple(labels.shape)}")
    _check_values("labels", labels, config.vocab_size, "the vocabulary", ignored=True)


def _check_integer_tensor(name: str, ids: Tensor) -> None:
    if not isinstance(ids, Tensor):
        raise TypeError(f"{name} must be a tensor, got {type(ids).__name__}")
    if ids.dtype not in (torch.int64, torch.int32):
        raise TypeError(f"{name} must be int64 or int32, got {ids.dtype}")


def _check_values(name: str, ids: Tensor, count: int, where: str, *, ignored: bool = False) -> None:
    """Looks at values on the CPU only: a GPU would have to be waited for, and torch's embedding asserts there."""
    if ids.device.type != "cpu" or torch.compiler.is_compiling():
        return
    seen = ids[ids != IGNORED_LABEL] if ignored else ids
    if seen.numel() == 0:
        return
    low, high = (int(value) for value in torch.aminmax(seen))
    if low < 0 or high >= count:
        wrong = low if low < 0 else high
        also = ", nor -100" if ignored else ""
        raise ValueError(f"{name} holds {wrong}, which is not in {where} (0 to {count - 1}){also}")


@dataclass
class Padding:
    """Which tokens of each row are real: those from starts to lengths, both (B,) int64."""

    starts: Tensor
    lengths: Tensor

    @classmethod
    def from_mask(cls, attention_mask: Tensor | None, ids: Tensor, name: str = "attention_mask") -> Padding | None:
        """From a (B, L) bool or integer mask, true at real tokens, which must be one unbroken run in each row."""
        if attention_mask is None:
            return None
        if attention_mask.shape != ids.shape:
            raise ValueError(
                f"{name} must have the shape of the token ids, {tuple(ids.shape)}, got {tuple(attention_mask.shape)}"
            )
        if attention_mask.is_floating_point() or attention_mask.is_complex():
            raise TypeError(f"{name} must be bool or integer, true at real tokens, got {attention_mask.dtype}")
        real = attention_mask.to(torch.bool)
        count = real.sum(1)
        first = real.to(torch.uint8).argmax(1)
        # A run of `count` from `first` on covers every real token exactly when no real token lies outside it.
        index = torch.arange(real.shape[1], device=real.device)
        inside = (index >= first[:, None]) & (index < (first + count)[:, None])
        message = f"{name} must mark one unbroken run of real tokens per row"
        if real.device.type == "cpu" and not torch.compiler.is_compiling():
            if not torch.equal(inside, real):
                raise ValueError(message)
        else:  # asserts on the device, without waiting for it
            torch._assert_async((inside == real).all(), message)
        return cls(first, first + count)
