"""The pieces that every transformer here is made of, in the order in which a token meets them.

A block is attention and a perceptron, each added to the residual stream. By default it is pre-norm, x + f(norm(x)), so
the stream is never normalised on its way and a fresh model trains without a warm-up; others' models have their norms
elsewhere (`TransformerConfig.norm_placement`).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .attention import CrossAttention, SelfAttention
from .config import MLPS, TransformerConfig
from .inputs import IGNORED_LABEL, Padding
from .positions import RelativeBias, Rotary, rotary_tables

if TYPE_CHECKING:
    from .cache import KeyValueCache, LayerCache


def make_norm(config: TransformerConfig) -> nn.Module:
    if config.norm == "rms":
        return nn.RMSNorm(config.embed_dim, eps=config.norm_eps)
    return nn.LayerNorm(config.embed_dim, eps=config.norm_eps, bias=config.bias)


class MLP(nn.Module):
    """The perceptron of a block. Where it is gated (GLU, Shazeer 2020), gate and input come from one matrix product."""

    def __init__(self, config: TransformerConfig):
        super().__init__()
        self.activation, self.gated = MLPS[config.mlp]
        self.up = nn.Linear(config.embed_dim, config.mlp_dim * (2 if self.gated else 1), bias=config.bias)
        self.down = nn.Linear(config.mlp_dim, config.embed_dim, bias=config.bias)

    def forward(self, x: Tensor) -> Tensor:
        x = self.up(x)
        if self.gated:
            gate, x = x.chunk(2, dim=-1)
            return self.down(self.activation(gate) * x)
        return self.down(self.activation(x))


class Block(nn.Module):
    """Attention to oneself, then to the encoder where there is one, then the perceptron; each added to the stream."""

    def __init__(self, config: TransformerConfig, layer: int, encoder_dim: int | None = None):
        super().__init__()
        sandwich = config.norm_placement == "sandwich"
        self.is_post_norm = config.norm_placement == "post"
        self.attention_norm = make_norm(config)
        self.attention = SelfAttention(config, layer)
        self.attention_post_norm = make_norm(config) if sandwich else None
        self.cross_norm = make_norm(config) if encoder_dim else None
        self.cross_attention = CrossAttention(config, encoder_dim) if encoder_dim else None
        self.cross_post_norm = make_norm(config) if encoder_dim and sandwich else None
        self.mlp_norm = make_norm(config)
        self.mlp = MLP(config)
        self.mlp_post_norm = make_norm(config) if sandwich else None
        self.dropout = nn.Dropout(config.dropout)

    def forward(
        self,
        x: Tensor,
        rotary: Rotary | None,
        bias: Tensor | None,
        padding: Padding | None,
        *,
        is_causal: bool,
        cache: LayerCache | None = None,
        cross: tuple[Tensor, Tensor] | None = None,
        cross_padding: Padding | None = None,
    ) -> Tensor:
        def attend(x: Tensor) -> Tensor:
            return self.attention(x, rotary, bias, padding, is_causal=is_causal, cache=cache)

        x = self._add(x, attend, self.attention_norm, self.attention_post_norm)
        if self.cross_attention is not None:

            def attend_to_encoder(x: Tensor) -> Tensor:
                return self.cross_attention(x, cross, cross_padding)

            x = self._add(x, attend_to_encoder, self.cross_norm, self.cross_post_norm)
        return self._add(x, self.mlp, self.mlp_norm, self.mlp_post_norm)

    def _add(
        self, x: Tensor, layer: Callable[[Tensor], Tensor], norm: nn.Module, post_norm: nn.Module | None
    ) -> Tensor:
        if self.is_post_norm:
            return norm(x + self.dropout(layer(x)))
        y = layer(norm(x))
        return x + self.dropout(y if post_norm is None else post_norm(y))


# -- What surrounds the blocks -----------------------------------------------------------------------------------------


def init_weights(model: nn.Module, num_residuals: int) -> None:
    """GPT-2's initial values: N(0, 0.02), zero biases, and what writes to the residual stream smaller by the root of
    how many do, so that the stream's variance at the last layer does not grow with depth."""
    for name, module in model.named_modules():
        if isinstance(module, (nn.Linear, nn.Embedding)):
            writes_to_stream = name.endswith((".out", ".down"))
            nn.init.normal_(module.weight, std=0.02 / num_residuals**0.5 if writes_to_stream else 0.02)
            if getattr(module, "bias", None) is not None:
                nn.init.zeros_(module.bias)


class Stack(nn.Module):
    """Token ids in, hidden states out: embeddings, blocks and the last norm. Every model here puts a head on one.

    `embedding` stands in for the token embedding, for input that is no ids; `token_types` is how many kinds of token
    there are, whose embeddings are added (BERT's two segments).
    """

    def __init__(
        self,
        config: TransformerConfig,
        encoder_dim: int | None = None,
        *,
        embedding: nn.Module | None = None,
        token_types: int = 0,
    ):
        super().__init__()
        self.config = config
        self.tokens = nn.Embedding(config.vocab_size, config.embed_dim) if embedding is None else embedding
        self.token_types = nn.Embedding(token_types, config.embed_dim) if token_types else None
        self.positions = nn.Embedding(config.max_length, config.embed_dim) if config.positions == "learned" else None
        self.relative = RelativeBias(config) if config.positions == "relative" else None
        self.embedding_norm = make_norm(config) if config.embedding_norm else None
        self.dropout = nn.Dropout(config.dropout)
        self.blocks = nn.ModuleList(Block(config, i, encoder_dim) for i in range(config.num_layers))
        self.norm = nn.Identity() if config.norm_placement == "post" else make_norm(config)

    def forward(
        self,
        ids: Tensor,
        padding: Padding | None,
        *,
        is_causal: bool,
        token_type_ids: Tensor | None = None,
        cache: KeyValueCache | None = None,
        cross: list[tuple[Tensor, Tensor]] | None = None,
        cross_padding: Padding | None = None,
    ) -> Tensor:
        """Hidden states (B, L, embed_dim) of ids (B, L), or of the chunk ids that follows what the cache holds. Tokens
        are of type 0 where token_type_ids (B, L) do not say otherwise."""
        x = self.tokens(ids)
        L = x.shape[1]
        if cache is not None:
            cache.prepare(ids, padding)
        if self.config.embedding_scale != 1.0:
            x = x * self.config.embedding_scale
        if self.positions is not None:
            x = x + self.positions(self._places(L, padding, cache, x))
        if self.token_types is not None:
            x = x + (self.token_types.weight[0] if token_type_ids is None else self.token_types(token_type_ids))
        if self.embedding_norm is not None:
            x = self.embedding_norm(x)
        x = self.dropout(x)
        rotary, bias = self._rotary(L, cache, x), self._bias(L, cache, x, is_causal)
        for i, block in enumerate(self.blocks):
            x = block(
                x, rotary[i], bias, padding,
                is_causal=is_causal,
                cache=cache.layer(i, L) if cache is not None else None,
                cross=cross[i] if cross is not None else None,
                cross_padding=cross_padding,
            )  # fmt: skip
        if cache is not None:
            cache.advance(L, padding)
        return self.norm(x)

    def _places(self, length: int, padding: Padding | None, cache: KeyValueCache | None, like: Tensor) -> Tensor:
        """Learned positions (B, length) or (length,), counted from each row's first real token."""
        if cache is not None:
            return cache.positions(length)
        place = torch.arange(length, device=like.device)
        return place if padding is None else (place - padding.starts[:, None]).clamp(min=0)

    def _rotary(self, length: int, cache: KeyValueCache | None, like: Tensor) -> list[Rotary | None]:
        if self.config.positions != "rotary":
            return [None] * len(self.blocks)
        return rotary_tables(length, self.config, like) if cache is None else cache.rotary

    def _bias(self, length: int, cache: KeyValueCache | None, like: Tensor, is_causal: bool) -> Tensor | None:
        if self.relative is None:
            return None
        place = torch.arange(length, device=like.device)[None]
        if cache is not None:  # the places in the cache: what pads a row on the left moves queries and keys alike
            place, length = cache.lengths[:, None] + place, cache.used + length
        return self.relative(place, length, is_causal=is_causal)


def softcap(logits: Tensor, cap: float) -> Tensor:
    """cap * tanh(logits / cap), or the logits where cap is 0 (Gemma 2)."""
    return cap * torch.tanh(logits / cap) if cap else logits


def token_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Mean cross entropy over the labels that are not -100, in at least float32; zero, not NaN, where all are."""
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    total = F.cross_entropy(logits.flatten(0, 1), labels.flatten().long(), ignore_index=IGNORED_LABEL, reduction="sum")
    return total / (labels != IGNORED_LABEL).sum().clamp(min=1)
