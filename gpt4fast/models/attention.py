"""Attention of a sequence to itself and of a decoder to its encoder, on gpt4fast's ops."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor, nn

import gpt4fast

from .config import TransformerConfig
from .inputs import Padding
from .positions import Rotary, apply_rotary

if TYPE_CHECKING:
    from .cache import LayerCache


class SelfAttention(nn.Module):
    """Attention of a sequence to itself, with grouped-query heads, positions, a window and a cache where asked for."""

    def __init__(self, config: TransformerConfig, layer: int):
        super().__init__()
        self.num_heads, self.num_kv_heads, self.head_dim = config.num_heads, config.num_kv_heads, config.head_dim
        self.dropout = config.dropout
        self.softcap = config.attention_softcap
        window = config.windows[layer] if config.windows else 0
        self.window = (window - 1, window - 1) if window else None
        heads = config.num_heads + 2 * config.num_kv_heads
        self.qkv = nn.Linear(config.embed_dim, heads * config.head_dim, bias=config.qkv_bias)
        self.query_norm = nn.RMSNorm(config.head_dim, eps=config.norm_eps) if config.qk_norm else None
        self.key_norm = nn.RMSNorm(config.head_dim, eps=config.norm_eps) if config.qk_norm else None
        self.out = nn.Linear(config.num_heads * config.head_dim, config.embed_dim, bias=config.bias)

    def forward(
        self,
        x: Tensor,
        rotary: Rotary | None,
        bias: Tensor | None,
        padding: Padding | None,
        *,
        is_causal: bool,
        cache: LayerCache | None = None,
    ) -> Tensor:
        heads = self.num_heads + 2 * self.num_kv_heads
        qkv = self.qkv(x).unflatten(-1, (heads, self.head_dim)).transpose(1, 2)  # (B, heads, L, D)
        q, k, v = qkv.split([self.num_heads, self.num_kv_heads, self.num_kv_heads], dim=1)
        if self.query_norm is not None:
            q, k = self.query_norm(q), self.key_norm(k)
        if cache is not None:
            y = self._decode(q.detach(), k.detach(), v.detach(), rotary, bias, cache)
        else:
            if rotary is not None:
                q, k = apply_rotary(q, rotary), apply_rotary(k, rotary)
            y = gpt4fast.attention(
                q, k, v, bias,
                dropout_p=self.dropout if self.training else 0.0,
                is_causal=is_causal,
                kv_starts=padding.starts if padding else None,
                kv_lengths=padding.lengths if padding else None,
                window=self.window,
                softcap=self.softcap,
            )  # fmt: skip
        return self.out(y.transpose(1, 2).flatten(2))

    def _decode(
        self, q: Tensor, k: Tensor, v: Tensor, rotary: Rotary | None, bias: Tensor | None, cache: LayerCache
    ) -> Tensor:
        """Rotates, appends the new keys and values in place, and attends. The cache is not part of any gradient."""
        if bias is None:
            return gpt4fast.attention_decode(
                q, cache.key, cache.value, cache.lengths,
                key=k, value=v, rotary=rotary, kv_starts=cache.starts, window=self.window, softcap=self.softcap,
                key_scales=cache.key_scales, value_scales=cache.value_scales,
            )  # fmt: skip
        # attention_decode takes no bias.
        lengths = cache.lengths
        k, v = cache.append(k, v)
        return gpt4fast.attention(
            q, k, v, bias.detach(),
            is_causal=True, query_offset=lengths, kv_starts=cache.starts, kv_lengths=lengths + q.shape[2],
            window=self.window, softcap=self.softcap,
        )  # fmt: skip


class CrossAttention(nn.Module):
    """Attention of the decoder's tokens to the encoder's, whose keys and values `project` makes once for all steps."""

    def __init__(self, config: TransformerConfig, encoder_dim: int):
        super().__init__()
        self.num_heads, self.num_kv_heads, self.head_dim = config.num_heads, config.num_kv_heads, config.head_dim
        self.dropout = config.dropout
        width = config.num_heads * config.head_dim
        self.query = nn.Linear(config.embed_dim, width, bias=config.qkv_bias)
        self.key_value = nn.Linear(encoder_dim, 2 * config.num_kv_heads * config.head_dim, bias=config.qkv_bias)
        self.out = nn.Linear(width, config.embed_dim, bias=config.bias)

    def project(self, encoder_output: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values (B, Hk, S, D) of the encoder's output (B, S, encoder_dim)."""
        heads = (2 * self.num_kv_heads, self.head_dim)
        return self.key_value(encoder_output).unflatten(-1, heads).transpose(1, 2).split(self.num_kv_heads, dim=1)

    def forward(self, x: Tensor, key_value: tuple[Tensor, Tensor], padding: Padding | None) -> Tensor:
        y = gpt4fast.attention(
            self.query(x).unflatten(-1, (self.num_heads, self.head_dim)).transpose(1, 2), *key_value,
            dropout_p=self.dropout if self.training else 0.0,
            kv_starts=padding.starts if padding else None,
            kv_lengths=padding.lengths if padding else None,
        )  # fmt: skip
        return self.out(y.transpose(1, 2).flatten(2))
