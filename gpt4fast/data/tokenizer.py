"""Byte-level byte-pair encoding: a thin wrapper over Hugging Face's `tokenizers` that speaks torch tensors.

Byte-level (Radford et al. 2019): every byte is in the base alphabet, so any text decodes back to itself.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    import tokenizers

#: In order of their ids. `<generated>` marks a sequence written by a model, where a real one starts with `<bos>`.
SPECIAL_TOKENS = ("<pad>", "<bos>", "<eos>", "<mask>", "<gap>", "<generated>")
SMALLEST_VOCABULARY = 256 + len(SPECIAL_TOKENS)


class Tokenizer:
    """Text to int64 token ids and back. Make one with `Tokenizer.train` or `Tokenizer.load`."""

    def __init__(self, backend: tokenizers.Tokenizer):
        for expected, token in enumerate(SPECIAL_TOKENS):
            if backend.token_to_id(token) != expected:
                raise ValueError(f"backend must have {token} as id {expected}, has {backend.token_to_id(token)}")
        # "<mask>" in a user's text is six characters, not the special token.
        backend.encode_special_tokens = True
        self.backend = backend
        self.pad_id, self.bos_id, self.eos_id, self.mask_id, self.gap_id, self.generated_id = range(len(SPECIAL_TOKENS))

    @classmethod
    def train(cls, texts: str | Iterable[str], vocab_size: int = 1024) -> Tokenizer:
        """Learns at most `vocab_size` tokens (at least 262: bytes and special tokens) from one text or several."""
        from tokenizers import Tokenizer as Backend
        from tokenizers import decoders, models, pre_tokenizers, trainers

        if vocab_size < SMALLEST_VOCABULARY:
            raise ValueError(f"vocab_size must be at least {SMALLEST_VOCABULARY}, was {vocab_size}")
        backend = Backend(models.BPE())
        backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        backend.decoder = decoders.ByteLevel()
        trainer = trainers.BpeTrainer(
            vocab_size=vocab_size,
            min_frequency=2,
            special_tokens=list(SPECIAL_TOKENS),
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        )
        backend.train_from_iterator([texts] if isinstance(texts, str) else texts, trainer)
        return cls(backend)

    @classmethod
    def load(cls, path: str | os.PathLike) -> Tokenizer:
        """Reads what `save` wrote. FileNotFoundError where there is no such file."""
        from tokenizers import Tokenizer as Backend

        return cls(Backend.from_str(Path(path).read_text(encoding="utf-8")))

    def save(self, path: str | os.PathLike) -> None:
        """Writes one JSON file in the format of `tokenizers`; a crash half-way leaves the old file whole."""
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(path.name + ".tmp")
        temporary.write_text(self.backend.to_str(), encoding="utf-8")
        os.replace(temporary, path)

    @property
    def vocab_size(self) -> int:
        return self.backend.get_vocab_size()

    @property
    def special_count(self) -> int:
        """Ids below this are special tokens."""
        return len(SPECIAL_TOKENS)

    def encode(self, text: str, *, bos: bool = False, eos: bool = False) -> torch.Tensor:
        """Token ids (length,), int64, optionally between `<bos>` and `<eos>`."""
        ids = self.backend.encode(text).ids
        return torch.tensor([self.bos_id] * bos + ids + [self.eos_id] * eos, dtype=torch.long)

    def encode_batch(self, texts: Sequence[str], *, bos: bool = False) -> tuple[torch.Tensor, torch.Tensor]:
        """Left-padded ids (batch, longest), int64, and the attention mask of that shape, True at real tokens."""
        rows = [self.encode(text, bos=bos) for text in texts]
        longest = max((len(row) for row in rows), default=0)
        ids = torch.full((len(rows), longest), self.pad_id)
        mask = torch.zeros(len(rows), longest, dtype=torch.bool)
        for i, row in enumerate(rows):
            ids[i, longest - len(row) :] = row
            mask[i, longest - len(row) :] = True
        return ids, mask

    def decode(self, ids: torch.Tensor | Sequence[int]) -> str:
        """The text of ids (length,), special tokens left out. Bytes that are no UTF-8 become U+FFFD."""
        ids = ids.tolist() if isinstance(ids, torch.Tensor) else list(ids)
        return self.backend.decode(ids, skip_special_tokens=True)
