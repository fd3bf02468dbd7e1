"""What a transformer is: sizes and style, in one configuration that every model here is built from.

It says which family a model is of: GPT-2 (layer norm, learned positions, GELU, biases), Llama (RMS norm, rotary
positions, SwiGLU, grouped-query attention, no biases), Gemma, BERT, T5, or anything between.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import partial

from torch.nn import functional as F

from .pretrained import later

gelu_tanh = partial(F.gelu, approximate="tanh")
# A perceptron's name, its activation, and whether that is the gate of a second half (Shazeer 2020).
MLPS = {
    "gelu": (F.gelu, False),
    "gelu_tanh": (gelu_tanh, False),
    "relu": (F.relu, False),
    "swiglu": (F.silu, True),
    "geglu": (F.gelu, True),
    "geglu_tanh": (gelu_tanh, True),
}


@dataclass
class TransformerConfig:
    """Sizes and style shared by all transformers.

    Raises:
        ValueError: a size is not positive, heads do not divide, or a style is unknown.
    """

    vocab_size: int = 50257
    max_length: int = 1024  # positions: the longest sequence the model was made for; "relative" ones have no end
    num_layers: int = 12
    num_heads: int = 12
    num_kv_heads: int | None = (
        None  # fewer key and value heads than query heads: grouped-query attention; None: as many
    )
    embed_dim: int = 768
    mlp_dim: int | None = (
        None  # None: 4 * embed_dim, or for a gated one 8/3 of it rounded up to 64, which has as many weights
    )
    norm: str = "layer"  # "layer", "rms"
    positions: str = "learned"  # "learned", "rotary", "relative" (T5's: a learned number per head and distance)
    mlp: str = "gelu"  # "gelu" (exact), "gelu_tanh" (GPT-2's), "relu"; gated: "swiglu", "geglu", "geglu_tanh" (Gemma's)
    bias: bool = True
    tie_embeddings: bool = True  # the output head is the token embedding
    dropout: float = 0.0
    norm_eps: float = 1e-5
    rotary_base: float = 10000.0
    head_dim: int | None = later(None)  # None: embed_dim / num_heads
    qkv_bias: bool | None = later(None)  # of queries, keys and values; None: as bias
    qk_norm: bool = later(False)  # queries and keys pass an RMS norm, each head by itself (Qwen 3, Gemma 3)
    # Of each block's norms: "pre", x + f(norm(x)); "post", norm(x + f(x)), and none at the end of the stack (BERT);
    # "sandwich", x + norm(f(norm(x))) (Gemma 2).
    norm_placement: str = later("pre")
    embedding_norm: bool = later(False)  # a norm of the embeddings, positions included (BERT, BART)
    embedding_scale: float = later(1.0)  # factor of the token embeddings (Gemma, BART)
    attention_softcap: float = later(0.0)  # scores become cap * tanh(scores / cap) (Gemma 2); 0 is off
    # Sliding windows: of each layer, how many tokens a query sees, itself included and looking one way; 0: all of them.
    windows: tuple[int, ...] | None = later(None)
    window_rotary_base: float | None = later(None)  # rotary_base of layers with a window (Gemma 3); None: the same
    # Radians per position of each pair of channels that turns, of layers with no window_rotary_base: for positions that
    # were stretched to a longer context, or turn only the first channels. None: rotary_base ** (-2 i / head_dim), all.
    rotary_frequencies: tuple[float, ...] | None = later(None)
    relative_buckets: int = later(32)  # of "relative" positions: how many distances are told apart
    relative_max_distance: int = later(128)  # from which on all are one

    def __post_init__(self) -> None:
        if self.num_kv_heads is None:
            self.num_kv_heads = self.num_heads
        for name in ("vocab_size", "max_length", "num_layers", "num_heads", "num_kv_heads", "embed_dim"):
            check_positive(name, getattr(self, name))
        check_choice("norm", self.norm, ("layer", "rms"))
        check_choice("positions", self.positions, ("learned", "rotary", "relative"))
        check_choice("mlp", self.mlp, tuple(MLPS))
        check_choice("norm_placement", self.norm_placement, ("pre", "post", "sandwich"))
        if self.mlp_dim is None:
            self.mlp_dim = -(-8 * self.embed_dim // 3 // 64) * 64 if self.gated else 4 * self.embed_dim
        check_positive("mlp_dim", self.mlp_dim)
        if self.head_dim is None:
            if self.embed_dim % self.num_heads:
                raise ValueError(f"embed_dim ({self.embed_dim}) must be a multiple of num_heads ({self.num_heads})")
            self.head_dim = self.embed_dim // self.num_heads
        check_positive("head_dim", self.head_dim)
        if self.num_heads % self.num_kv_heads:
            raise ValueError(f"num_heads ({self.num_heads}) must be a multiple of num_kv_heads ({self.num_kv_heads})")
        if self.positions == "rotary" and self.head_dim % 2:
            raise ValueError(f"rotary positions need an even head_dim, got {self.head_dim}")
        if not 0.0 <= self.dropout < 1.0:
            raise ValueError(f"dropout must be in [0, 1), got {self.dropout}")
        if self.qkv_bias is None:
            self.qkv_bias = self.bias
        check_not_negative("attention_softcap", self.attention_softcap)
        if self.windows is not None and (
            len(self.windows) != self.num_layers or not all(isinstance(w, int) and w >= 0 for w in self.windows)
        ):
            raise ValueError(
                f"windows must be {self.num_layers} ints, one per layer and none negative, got {self.windows}"
            )
        if self.rotary_frequencies is not None and not 0 < len(self.rotary_frequencies) <= self.head_dim // 2:
            raise ValueError(
                f"rotary_frequencies must be 1 to {self.head_dim // 2} numbers, one per pair of a head's channels, "
                f"got {len(self.rotary_frequencies)}"
            )
        # Half of them look ahead, and half of those grow with the logarithm of the distance.
        if self.relative_buckets < 4 or self.relative_buckets % 4:
            raise ValueError(f"relative_buckets must be a positive multiple of 4, got {self.relative_buckets}")
        if self.relative_max_distance <= self.relative_buckets // 2:
            raise ValueError(
                f"relative_max_distance must be more than half of relative_buckets ({self.relative_buckets}), "
                f"got {self.relative_max_distance}"
            )

    @property
    def gated(self) -> bool:
        return MLPS[self.mlp][1]


# -- Checks of configurations: a wrong value is said by name. ----------------------------------------------------------


def check_positive(name: str, value: int) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ValueError(f"{name} must be a positive int, got {value!r}")


def check_not_negative(name: str, value: float) -> None:
    if not isinstance(value, (int, float)) or isinstance(value, bool) or not 0 <= value < math.inf:
        raise ValueError(f"{name} must be a number, 0 or more, got {value!r}")


def check_choice(name: str, value: object, choices: tuple) -> None:
    if value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, choices))}, got {value!r}")
