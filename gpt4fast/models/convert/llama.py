"""GPT from Llama (SmolLM, TinyLlama, ...), Mistral, Qwen 2 and Qwen 3, and what Gemma shares with them."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ..gpt import GPTConfig
from .conversion import Checkpoint, Conversion, block, head_ties, scaled
from .fields import Fields
from .rotary import parse_rotary, read_rotary

LLAMA_BLOCK = {
    "attention_norm": "input_layernorm",
    "attention.qkv": "self_attn.q_proj self_attn.k_proj self_attn.v_proj",
    "attention.query_norm": "self_attn.q_norm",
    "attention.key_norm": "self_attn.k_norm",
    "attention.out": "self_attn.o_proj",
    "mlp_norm": "post_attention_layernorm",
    "mlp.up": "mlp.gate_proj mlp.up_proj",
    "mlp.down": "mlp.down_proj",
}


def llama(fields: Fields, checkpoint: Checkpoint) -> Conversion:
    """Touvron et al. 2023, and what is of its kind: SmolLM, TinyLlama, Yi, DeepSeek's first."""
    ours = llama_style(fields, checkpoint, kv_heads=None)
    attention_bias, mlp_bias = fields.get("attention_bias", False), fields.get("mlp_bias", False)
    unbiased = () if attention_bias else ("q_proj", "k_proj", "v_proj", "o_proj")
    unbiased += () if mlp_bias else ("gate_proj", "up_proj", "down_proj")
    return llama_conversion(
        fields, ours | {"bias": attention_bias or mlp_bias, "qkv_bias": attention_bias}, unbiased=unbiased
    )


def mistral(fields: Fields, checkpoint: Checkpoint) -> Conversion:
    """Jiang et al. 2023: Llama with a sliding window."""
    ours = llama_style(fields, checkpoint, kv_heads=8)
    window = fields.get("sliding_window", 4096)
    return llama_conversion(fields, ours | {"windows": (window,) * ours["num_layers"] if window else None})


def qwen2(fields: Fields, checkpoint: Checkpoint) -> Conversion:
    """Yang et al. 2024: Llama with biases of queries, keys and values."""
    ours = llama_style(fields, checkpoint, kv_heads=32)
    return llama_conversion(fields, ours | {"qkv_bias": True, "windows": _qwen_windows(fields, ours["num_layers"])})


def qwen3(fields: Fields, checkpoint: Checkpoint) -> Conversion:
    """Yang et al. 2025: norms of queries and keys instead."""
    ours = llama_style(fields, checkpoint, kv_heads=32, head_dim=128)
    bias = fields.get("attention_bias", False)
    ours |= {"bias": bias, "qk_norm": True, "windows": _qwen_windows(fields, ours["num_layers"])}
    return llama_conversion(fields, ours, unbiased=("gate_proj", "up_proj", "down_proj"))


def _qwen_windows(fields: Fields, layers: int) -> tuple[int, ...] | None:
    if not fields.get("use_sliding_window", False) or fields.get("sliding_window", 4096) is None:
        return None
    first = fields.get("max_window_layers", 28)
    return windows_by_name(fields, ["sliding_attention" if i >= first else "full_attention" for i in range(layers)])


# -- What all of this kind share ---------------------------------------------------------------------------------------


def llama_style(
    fields: Fields,
    checkpoint: Checkpoint,
    kv_heads: int | None,
    head_dim: int | None = None,
    tie: bool = False,
    mlp: str | None = None,
) -> dict[str, Any]:
    """Sizes and style; the other arguments are what transformers takes where a field is missing."""
    dim, heads = fields.size("hidden_size"), fields.size("num_attention_heads")
    return {
        "vocab_size": fields.size("vocab_size"),
        "max_length": fields.size("max_position_embeddings"),
        "num_layers": fields.size("num_hidden_layers"),
        "num_heads": heads,
        "num_kv_heads": fields.size("num_key_value_heads", kv_heads or heads),
        "embed_dim": dim,
        "head_dim": fields.size("head_dim", head_dim or dim // heads),
        "mlp_dim": fields.size("intermediate_size"),
        "norm": "rms",
        "norm_eps": fields.number("rms_norm_eps", 1e-6),
        "mlp": mlp or fields.choose("hidden_act", {"silu": "swiglu", "gelu": "geglu"}, "silu"),
        "bias": False,
        "tie_embeddings": head_ties(fields, checkpoint, tie, "lm_head.weight", "model.embed_tokens.weight"),
    }


def llama_conversion(
    fields: Fields,
    ours: dict[str, Any],
    modules: dict[str, str] = LLAMA_BLOCK,
    unbiased: tuple[str, ...] = (),
    norm_offset: float = 0.0,
    score_size: float | None = None,
) -> Conversion:
    """norm_offset: what is added to a norm's weight before it multiplies. score_size: by whose root the scores are
    divided, where it is not head_dim."""
    rotary = fields.get("rope_parameters", None) or {}
    if "full_attention" in rotary:  # Gemma 3's, one for each kind of layer
        rotary, factor = parse_rotary(fields, rotary["full_attention"], 1e6, ours["head_dim"])
    else:
        rotary, factor = read_rotary(fields, ours["head_dim"], 1e6 if "window_rotary_base" in ours else 1e4)
    config = GPTConfig(**ours | rotary)
    # A factor of queries and of keys is its square of the scores.
    scale = factor**2 * (config.head_dim / (score_size or config.head_dim)) ** 0.5
    queries = (".q_norm.weight",) if config.qk_norm else (".q_proj.weight", ".q_proj.bias")

    def change(name: str, tensor: Tensor) -> Tensor:
        if norm_offset and name.endswith("norm.weight"):
            tensor = tensor.double() + norm_offset
        if scale != 1.0 and name.endswith(queries):
            tensor = scaled(tensor, scale)
        return tensor

    names = {
        "stack.tokens": "embed_tokens",
        "stack.norm": "norm",
        "head": "lm_head",
        **block("stack.blocks.*", "layers.*", modules),
    }
    return Conversion(config, names, change, "model.", r"rotary_emb\.inv_freq$", unbiased)


def windows_by_name(fields: Fields, default: list[str]) -> tuple[int, ...]:
    """Each layer's window by its name in layer_types."""
    windows = {"full_attention": 0, "sliding_attention": fields.get("sliding_window", 4096)}
    kinds = fields.get("layer_types", None) or default
    for kind in kinds:
        if kind not in windows:
            raise fields.refusal("layer_types", kind, " or ".join(map(repr, windows)))
        if windows[kind] is None:
            raise fields.refusal("sliding_window", None, "an int where layers have a window")
    return tuple(windows[kind] for kind in kinds)
