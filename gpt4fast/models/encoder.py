"""Encoder: a transformer that reads a whole text at once, with a masked-language-model head.

After BERT (Devlin et al. 2019), with pre-norm blocks and without segment embeddings: the head is BERT's (dense, GELU,
norm, then the token embedding again). Read with `is_causal=True`, the same weights predict the next token, so one model
can be pre-trained on both objectives.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, NamedTuple

from torch import Tensor, nn
from torch.nn import functional as F

from .layers import (
    Padding,
    Stack,
    TransformerConfig,
    check_labels,
    check_token_ids,
    init_weights,
    make_norm,
    token_loss,
)
from .pretrained import Pretrained


@dataclass
class EncoderConfig(TransformerConfig):
    """As TransformerConfig; the defaults are the sizes of BERT base, 110 million parameters."""

    vocab_size: int = 30522
    max_length: int = 512


class EncoderOutput(NamedTuple):
    logits: Tensor  # (B, L, vocab_size)
    hidden: Tensor  # (B, L, embed_dim)
    loss: Tensor | None  # scalar


class Encoder(Pretrained, nn.Module):
    """Bidirectional transformer with a head that fills in masked tokens.

    forward(input_ids, labels=None, *, attention_mask=None, is_causal=False):
        input_ids: (B, L) int64 or int32.
        labels: (B, L), the token that each position should name; -100 is ignored. Nothing is shifted.
        attention_mask: (B, L) bool or integer, true at real tokens, one run per row.
        is_causal: each token sees only those before it, for the next-token objective. The logits are then a GPT's, the
            token embedding alone, so that a decoder made from these weights begins as the same language model.

    `encode(input_ids, attention_mask=...)` stops before the head and returns the hidden states alone.
    """

    model_type: ClassVar[str] = "encoder"
    config_class: ClassVar[type] = EncoderConfig

    def __init__(self, config: EncoderConfig):
        super().__init__()
        self.config = config
        self.stack = Stack(config)
        self.transform = nn.Linear(config.embed_dim, config.embed_dim, bias=config.bias)
        self.transform_norm = make_norm(config)
        self.head = nn.Linear(config.embed_dim, config.vocab_size)
        init_weights(self, num_residuals=2 * config.num_layers)
        if config.tie_embeddings:
            self.head.weight = self.stack.tokens.weight

    def encode(self, input_ids: Tensor, *, attention_mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
        """Hidden states (B, L, embed_dim)."""
        check_token_ids("input_ids", input_ids, self.config)
        return self.stack(input_ids, Padding.from_mask(attention_mask, input_ids), is_causal=is_causal)

    def forward(
        self,
        input_ids: Tensor,
        labels: Tensor | None = None,
        *,
        attention_mask: Tensor | None = None,
        is_causal: bool = False,
    ) -> EncoderOutput:
        hidden = self.encode(input_ids, attention_mask=attention_mask, is_causal=is_causal)
        if is_causal:
            logits = F.linear(hidden, self.head.weight)
        else:
            logits = self.head(self.transform_norm(F.gelu(self.transform(hidden))))
        if labels is None:
            return EncoderOutput(logits, hidden, None)
        check_labels(labels, input_ids, self.config)
        return EncoderOutput(logits, hidden, token_loss(logits, labels))
