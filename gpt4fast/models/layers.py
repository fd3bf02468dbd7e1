"""The pieces that every transformer here is made of, in the order in which a token meets them.

One configuration says which style a model has: GPT-2 (layer norm, learned positions, GELU, biases), Llama (RMS norm,
rotary positions, SwiGLU, grouped-query attention, no biases), or anything between. All blocks are pre-norm,
x + f(norm(x)), so the residual stream is never normalised on its way and a fresh model trains without a warm-up.

Attention never sees a padding mask. A row of padded tokens is a run of real ones, and a run is two numbers, where it
starts and where it ends: `gpt4fast.attention` takes them as `kv_starts` and `kv_lengths` and skips the rest, where a
mask would be read for every score.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import gpt4fast

if TYPE_CHECKING:
    from .cache import KeyValueCache, LayerCache

IGNORED_LABEL = -100  # torch's own ignore_index


@dataclass
class TransformerConfig:
    """Sizes and style shared by all transformers.

    Raises:
        ValueError: a size is not positive, heads do not divide, or a style is unknown.
    """

    vocab_size: int = 50257
    max_length: int = 1024  # positions: the longest sequence the model was made for
    num_layers: int = 12
    num_heads: int = 12
    num_kv_heads: int | None = (
        None  # fewer key and value heads than query heads: grouped-query attention; None: as many
    )
    embed_dim: int = 768
    mlp_dim: int | None = (
        None  # None: 4 * embed_dim, or for SwiGLU 8/3 of it rounded up to 64, which has as many weights
    )
    norm: str = "layer"  # "layer", "rms"
    positions: str = "learned"  # "learned", "rotary"
    mlp: str = "gelu"  # "gelu" (exact), "gelu_tanh" (GPT-2's), "swiglu"
    bias: bool = True
    tie_embeddings: bool = True  # the output head is the token embedding
    dropout: float = 0.0
    norm_eps: float = 1e-5
    rotary_base: float = 10000.0

    def __post_init__(self) -> None:
        if self.num_kv_heads is None:
            self.num_kv_heads = self.num_heads
        for name in ("vocab_size", "max_length", "num_layers", "num_heads", "num_kv_heads", "embed_dim"):
            check_positive(name, getattr(self, name))
        if self.mlp_dim is None:
            self.mlp_dim = -(-8 * self.embed_dim // 3 // 64) * 64 if self.mlp == "swiglu" else 4 * self.embed_dim
        check_positive("mlp_dim", self.mlp_dim)
        check_choice("norm", self.norm, ("layer", "rms"))
        check_choice("positions", self.positions, ("learned", "rotary"))
        check_choice("mlp", self.mlp, ("gelu", "gelu_tanh", "swiglu"))
        if self.embed_dim % self.num_heads:
            raise ValueError(f"embed_dim ({self.embed_dim}) must be a multiple of num_heads ({self.num_heads})")
        if self.num_heads % self.num_kv_heads:
            raise ValueError(f"num_heads ({self.num_heads}) must be a multiple of num_kv_heads ({self.num_kv_heads})")
        if self.positions == "rotary" and self.head_dim % 2:
            raise ValueError(f"rotary positions need an even head size, got embed_dim / num_heads = {self.head_dim}")
        if not 0.0 <= self.dropout < 1.0:
            raise ValueError(f"dropout must be in [0, 1), got {self.dropout}")

    @property
    def head_dim(self) -> int:
        return self.embed_dim // self.num_heads


# -- Checks. What a user gets wrong is said by name; nothing here waits for a GPU. -------------------------------------


def check_positive(name: str, value: int) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ValueError(f"{name} must be a positive int, got {value!r}")


def check_choice(name: str, value: object, choices: tuple) -> None:
    if value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, choices))}, got {value!r}")


def check_token_ids(name: str, ids: Tensor, config: TransformerConfig) -> None:
    """Raises unless ids is (B, L) int64 or int32 with L at most max_length and every value in the vocabulary."""
    _check_integer_tensor(name, ids)
    if ids.dim() != 2:
        raise ValueError(f"{name} must be (batch, length), got shape {tuple(ids.shape)}")
    if ids.shape[1] > config.max_length:
        raise ValueError(f"{name} has length {ids.shape[1]}, more than max_length = {config.max_length} of the model")
    _check_values(name, ids, config.vocab_size)


def check_labels(labels: Tensor, ids: Tensor, config: TransformerConfig, ids_name: str = "input_ids") -> None:
    """Raises unless labels has the shape of ids, and every value is in the vocabulary or -100."""
    _check_integer_tensor("labels", labels)
    if labels.shape != ids.shape:
        raise ValueError(f"labels must have the shape of {ids_name}, {tuple(ids.shape)}, got {tuple(labels.shape)}")
    _check_values("labels", labels, config.vocab_size, ignored=True)


def _check_integer_tensor(name: str, ids: Tensor) -> None:
    if not isinstance(ids, Tensor):
        raise TypeError(f"{name} must be a tensor, got {type(ids).__name__}")
    if ids.dtype not in (torch.int64, torch.int32):
        raise TypeError(f"{name} must be int64 or int32, got {ids.dtype}")


def _check_values(name: str, ids: Tensor, vocab_size: int, *, ignored: bool = False) -> None:
    """Looks at values on the CPU only: a GPU would have to be waited for, and torch's embedding asserts there."""
    if ids.device.type != "cpu" or torch.compiler.is_compiling():
        return
    seen = ids[ids != IGNORED_LABEL] if ignored else ids
    if seen.numel() == 0:
        return
    low, high = (int(value) for value in torch.aminmax(seen))
    if low < 0 or high >= vocab_size:
        wrong = low if low < 0 else high
        also = ", nor -100" if ignored else ""
        raise ValueError(f"{name} holds {wrong}, which is not in the vocabulary (0 to {vocab_size - 1}){also}")


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


# -- Positions ---------------------------------------------------------------------------------------------------------


def rotary_tables(length: int, config: TransformerConfig, like: Tensor) -> tuple[Tensor, Tensor]:
    """Cosines and sines (length, head_dim / 2) of the rotary positions (RoFormer, Su et al. 2021), on like's device.

    Made anew for every forward, once for all layers, and always in at least float32: kept as a buffer they would follow
    `.to(torch.bfloat16)`, whose 8 bits cannot tell position 257 from 256.
    """
    dtype = torch.promote_types(like.dtype, torch.float32)
    half = torch.arange(0, config.head_dim, 2, device=like.device, dtype=dtype) / config.head_dim
    angles = torch.arange(length, device=like.device, dtype=dtype)[:, None] * config.rotary_base**-half
    return angles.cos(), angles.sin()


def apply_rotary(x: Tensor, tables: tuple[Tensor, Tensor]) -> Tensor:
    """Turns the pairs (x[i], x[i + D/2]) of x (..., L, D) by each position's angles."""
    cos, sin = tables
    first, second = x.to(cos.dtype).chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, first * sin + second * cos), dim=-1).to(x.dtype)


# -- Layers ------------------------------------------------------------------------------------------------------------


def make_norm(config: TransformerConfig) -> nn.Module:
    if config.norm == "rms":
        return nn.RMSNorm(config.embed_dim, eps=config.norm_eps)
    return nn.LayerNorm(config.embed_dim, eps=config.norm_eps, bias=config.bias)


class MLP(nn.Module):
    """The perceptron of a block: GELU, or SwiGLU (Shazeer 2020), whose gate and input come from one matrix product."""

    def __init__(self, config: TransformerConfig):
        super().__init__()
        self.kind = config.mlp
        self.up = nn.Linear(config.embed_dim, config.mlp_dim * (2 if config.mlp == "swiglu" else 1), bias=config.bias)
        self.down = nn.Linear(config.mlp_dim, config.embed_dim, bias=config.bias)

    def forward(self, x: Tensor) -> Tensor:
        x = self.up(x)
        if self.kind == "swiglu":
            gate, x = x.chunk(2, dim=-1)
            return self.down(F.silu(gate) * x)
        return self.down(F.gelu(x, approximate="tanh" if self.kind == "gelu_tanh" else "none"))


class SelfAttention(nn.Module):
    """Attention of a sequence to itself, with grouped-query heads, rotary positions and a cache where asked for."""

    def __init__(self, config: TransformerConfig):
        super().__init__()
        self.num_heads, self.num_kv_heads, self.head_dim = config.num_heads, config.num_kv_heads, config.head_dim
        self.dropout = config.dropout
        self.qkv = nn.Linear(
            config.embed_dim, (config.num_heads + 2 * config.num_kv_heads) * config.head_dim, bias=config.bias
        )
        self.out = nn.Linear(config.embed_dim, config.embed_dim, bias=config.bias)

    def forward(
        self,
        x: Tensor,
        rotary: tuple[Tensor, Tensor] | None,
        padding: Padding | None,
        *,
        is_causal: bool,
        cache: LayerCache | None = None,
    ) -> Tensor:
        heads = self.num_heads + 2 * self.num_kv_heads
        qkv = self.qkv(x).unflatten(-1, (heads, self.head_dim)).transpose(1, 2)  # (B, heads, L, D)
        q, k, v = qkv.split([self.num_heads, self.num_kv_heads, self.num_kv_heads], dim=1)
        if cache is not None:
            # Rotates, appends the new keys and values in place, and attends. The cache is not part of any gradient.
            y = gpt4fast.attention_decode(
                q.detach(), cache.key, cache.value, cache.lengths,
                key=k.detach(), value=v.detach(), rotary=rotary, kv_starts=cache.starts,
                key_scales=cache.key_scales, value_scales=cache.value_scales,
            )  # fmt: skip
        else:
            if rotary is not None:
                q, k = apply_rotary(q, rotary), apply_rotary(k, rotary)
            y = gpt4fast.attention(
                q, k, v,
                dropout_p=self.dropout if self.training else 0.0,
                is_causal=is_causal,
                kv_starts=padding.starts if padding else None,
                kv_lengths=padding.lengths if padding else None,
            )  # fmt: skip
        return self.out(y.transpose(1, 2).flatten(2))


class CrossAttention(nn.Module):
    """Attention of the decoder's tokens to the encoder's, whose keys and values `project` makes once for all steps."""

    def __init__(self, config: TransformerConfig, encoder_dim: int):
        super().__init__()
        self.num_heads, self.num_kv_heads, self.head_dim = config.num_heads, config.num_kv_heads, config.head_dim
        self.dropout = config.dropout
        self.query = nn.Linear(config.embed_dim, config.embed_dim, bias=config.bias)
        self.key_value = nn.Linear(encoder_dim, 2 * config.num_kv_heads * config.head_dim, bias=config.bias)
        self.out = nn.Linear(config.embed_dim, config.embed_dim, bias=config.bias)

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


class Block(nn.Module):
    """Attention to oneself, then to the encoder where there is one, then the perceptron; each added to the stream."""

    def __init__(self, config: TransformerConfig, encoder_dim: int | None = None):
        super().__init__()
        self.attention_norm = make_norm(config)
        self.attention = SelfAttention(config)
        self.cross_norm = make_norm(config) if encoder_dim else None
        self.cross_attention = CrossAttention(config, encoder_dim) if encoder_dim else None
        self.mlp_norm = make_norm(config)
        self.mlp = MLP(config)
        self.dropout = nn.Dropout(config.dropout)

    def forward(
        self,
        x: Tensor,
        rotary: tuple[Tensor, Tensor] | None,
        padding: Padding | None,
        *,
        is_causal: bool,
        cache: LayerCache | None = None,
        cross: tuple[Tensor, Tensor] | None = None,
        cross_padding: Padding | None = None,
    ) -> Tensor:
        x = x + self.dropout(self.attention(self.attention_norm(x), rotary, padding, is_causal=is_causal, cache=cache))
        if self.cross_attention is not None:
            x = x + self.dropout(self.cross_attention(self.cross_norm(x), cross, cross_padding))
        return x + self.dropout(self.mlp(self.mlp_norm(x)))


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
    """Token ids in, hidden states out: embeddings, blocks and the last norm. Every model here puts a head on one."""

    def __init__(self, config: TransformerConfig, encoder_dim: int | None = None):
        super().__init__()
        self.config = config
        self.tokens = nn.Embedding(config.vocab_size, config.embed_dim)
        self.positions = nn.Embedding(config.max_length, config.embed_dim) if config.positions == "learned" else None
        self.dropout = nn.Dropout(config.dropout)
        self.blocks = nn.ModuleList(Block(config, encoder_dim) for _ in range(config.num_layers))
        self.norm = make_norm(config)

    def forward(
        self,
        ids: Tensor,
        padding: Padding | None,
        *,
        is_causal: bool,
        cache: KeyValueCache | None = None,
        cross: list[tuple[Tensor, Tensor]] | None = None,
        cross_padding: Padding | None = None,
    ) -> Tensor:
        """Hidden states (B, L, embed_dim) of ids (B, L), or of the chunk ids that follows what the cache holds."""
        x, L = self.tokens(ids), ids.shape[1]
        rotary = None
        if cache is not None:
            cache.prepare(ids, padding)
            rotary = cache.rotary
        elif self.positions is None:
            rotary = rotary_tables(L, self.config, x)
        if self.positions is not None:
            if cache is not None:
                place = cache.positions(L)
            else:
                place = torch.arange(L, device=ids.device)
                if padding is not None:  # a row counts from its first real token
                    place = (place - padding.starts[:, None]).clamp(min=0)
            x = x + self.positions(place)
        x = self.dropout(x)
        for i, block in enumerate(self.blocks):
            x = block(
                x, rotary, padding,
                is_causal=is_causal,
                cache=cache.layer(i, L) if cache is not None else None,
                cross=cross[i] if cross is not None else None,
                cross_padding=cross_padding,
            )  # fmt: skip
        if cache is not None:
            cache.advance(L, padding)
        return self.norm(x)


def token_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Mean cross entropy over the labels that are not -100, in at least float32; zero, not NaN, where all are."""
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    total = F.cross_entropy(logits.flatten(0, 1), labels.flatten().long(), ignore_index=IGNORED_LABEL, reduction="sum")
    return total / (labels != IGNORED_LABEL).sum().clamp(min=1)
