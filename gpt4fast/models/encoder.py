"""Encoder: a transformer that reads a whole text at once, with a masked-language-model head.

After BERT (Devlin et al. 2019). Our own are pre-norm and without segment embeddings, BERT's and RoBERTa's weights bring
theirs; the head is BERT's (dense, GELU, norm, then the token embedding again). Read with `is_causal=True`, the same
weights predict the next token, so one model can be pre-trained on both objectives.

With `mel_bins` it reads sound instead, as Whisper does (Radford et al. 2022).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .config import TransformerConfig, check_choice
from .inputs import Padding, check_features, check_labels, check_token_ids, check_token_types
from .layers import Stack, init_weights, make_norm, token_loss
from .pretrained import Pretrained, later


@dataclass
class EncoderConfig(TransformerConfig):
    """As TransformerConfig; the defaults are the sizes of BERT base, 110 million parameters."""

    vocab_size: int = 30522
    max_length: int = 512
    head: bool = later(True)  # False: hidden states only
    token_types: int = later(0)  # kinds of token, whose embeddings are added (BERT's two segments); 0: none
    mel_bins: int = later(0)  # channels of a spectrogram that is read instead of token ids; 0: ids

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("token_types", "mel_bins"):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < 0:
                raise ValueError(f"{name} must be an int, 0 or more, got {value!r}")
        if self.mel_bins and self.head:
            raise ValueError("head must be False with mel_bins: sound has no tokens to fill in")


class EncoderOutput(NamedTuple):
    logits: Tensor | None  # (B, L, vocab_size); None without a head
    hidden: Tensor  # (B, L, embed_dim)
    loss: Tensor | None  # scalar


class AudioEmbedding(nn.Module):
    """Whisper's: two convolutions over a spectrogram (B, mel_bins, frames), to (B, frames / 2, embed_dim)."""

    def __init__(self, config: EncoderConfig):
        super().__init__()
        self.conv1 = nn.Conv1d(config.mel_bins, config.embed_dim, 3, padding=1)
        self.conv2 = nn.Conv1d(config.embed_dim, config.embed_dim, 3, stride=2, padding=1)

    def forward(self, features: Tensor) -> Tensor:
        return F.gelu(self.conv2(F.gelu(self.conv1(features)))).transpose(1, 2)


class Encoder(Pretrained, nn.Module):
    """Bidirectional transformer with a head that fills in masked tokens.

    forward(input_ids, labels=None, *, attention_mask=None, token_type_ids=None, is_causal=False):
        input_ids: (B, L) int64 or int32; with `mel_bins` a spectrogram (B, mel_bins, frames), two frames a position.
        labels: (B, L), the token that each position should name; -100 is ignored. Nothing is shifted.
        attention_mask: (B, L) bool or integer, true at real tokens, one run per row. Sound has none.
        token_type_ids: (B, L), below `token_types`; all 0 where they are None.
        is_causal: each token sees only those before it, for the next-token objective. The logits are then a GPT's, the
            token embedding alone, so that a decoder made from these weights begins as the same language model.

    `encode(input_ids, ...)` stops before the head and returns the hidden states alone; `embed(input_ids, ...)` makes
    one vector of each row.
    """

    model_type: ClassVar[str] = "encoder"
    config_class: ClassVar[type] = EncoderConfig

    def __init__(self, config: EncoderConfig):
        super().__init__()
        self.config = config
        self.stack = Stack(
            config, embedding=AudioEmbedding(config) if config.mel_bins else None, token_types=config.token_types
        )
        if config.head:
            self.transform = nn.Linear(config.embed_dim, config.embed_dim, bias=config.bias)
            self.transform_norm = make_norm(config)
            self.head = nn.Linear(config.embed_dim, config.vocab_size)
        init_weights(self, num_residuals=2 * config.num_layers)
        if config.head and config.tie_embeddings:
            self.head.weight = self.stack.tokens.weight

    def encode(
        self,
        input_ids: Tensor,
        *,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        is_causal: bool = False,
    ) -> Tensor:
        """Hidden states (B, L, embed_dim)."""
        if self.config.mel_bins:
            check_features(input_ids, self.config.mel_bins, self.config.max_length)
            if attention_mask is not None:
                raise ValueError("attention_mask must be None for sound, whose silence is read like the rest")
        else:
            check_token_ids("input_ids", input_ids, self.config)
        check_token_types(token_type_ids, input_ids, self.config.token_types)
        padding = Padding.from_mask(attention_mask, input_ids)
        return self.stack(input_ids, padding, is_causal=is_causal, token_type_ids=token_type_ids)

    def embed(
        self,
        input_ids: Tensor,
        *,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        pooling: str = "mean",
    ) -> Tensor:
        """Vectors (B, embed_dim) of length 1, whose dot products say how near texts are, in models trained to that end:
        the mean of each row's hidden states (MiniLM, E5), or with ``pooling="first"`` its first token's (BGE)."""
        check_choice("pooling", pooling, ("mean", "first"))
        hidden = self.encode(input_ids, attention_mask=attention_mask, token_type_ids=token_type_ids)
        if attention_mask is None:
            pooled = hidden.mean(1) if pooling == "mean" else hidden[:, 0]
        else:
            real = attention_mask.to(torch.bool)
            if pooling == "first":
                real = real & (real.cumsum(1) == 1)
            # What stands at padding may be anything, NaN included.
            pooled = hidden.masked_fill(~real[..., None], 0).sum(1)  # the length of the sum is divided by below
        return F.normalize(pooled, dim=-1)

    def forward(
        self,
        input_ids: Tensor,
        labels: Tensor | None = None,
        *,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        is_causal: bool = False,
    ) -> EncoderOutput:
        hidden = self.encode(
            input_ids, attention_mask=attention_mask, token_type_ids=token_type_ids, is_causal=is_causal
        )
        if not self.config.head:
            if labels is not None:
                raise ValueError("labels must be None: the model has no head")
            return EncoderOutput(None, hidden, None)
        if is_causal:
            logits = F.linear(hidden, self.head.weight)
        else:
            logits = self.head(self.transform_norm(F.gelu(self.transform(hidden))))
        if labels is None:
            return EncoderOutput(logits, hidden, None)
        check_labels(labels, input_ids, self.config)
        return EncoderOutput(logits, hidden, token_loss(logits, labels))
