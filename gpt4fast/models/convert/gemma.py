"""GPT from Gemma 1 to 3, whose pictures are left out."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from .conversion import Checkpoint, Conversion
from .fields import Fields
from .llama import LLAMA_BLOCK, llama_conversion, llama_style, windows_by_name
from .rotary import parse_rotary

SANDWICH_BLOCK = LLAMA_BLOCK | {
    "attention_post_norm": "post_attention_layernorm",
    "mlp_norm": "pre_feedforward_layernorm",
    "mlp_post_norm": "post_feedforward_layernorm",
}


def gemma(fields: Fields, checkpoint: Checkpoint) -> Conversion:
    """Gemma Team 2024."""
    # The first releases say "gelu" and mean the approximation, and transformers takes it so.
    mlp = fields.choose("hidden_act", {"gelu_pytorch_tanh": "geglu_tanh", "gelu": "geglu_tanh"}, "gelu_pytorch_tanh")
    return _gemma_conversion(fields, checkpoint, mlp, kv_heads=16)


def gemma2(fields: Fields, checkpoint: Checkpoint) -> Conversion:
    """Gemma Team 2024b: norms before and after, soft caps, and a window in every other layer."""
    layers = fields.size("num_hidden_layers")
    ours = {
        "norm_placement": "sandwich",
        "attention_softcap": fields.number("attn_logit_softcapping", 50.0) or 0.0,
        "logit_softcap": fields.number("final_logit_softcapping", 30.0) or 0.0,
        "windows": windows_by_name(fields, ["full_attention" if i % 2 else "sliding_attention" for i in range(layers)]),
    }
    return _gemma_conversion(fields, checkpoint, _gemma_mlp(fields), 4, ours, SANDWICH_BLOCK)


def gemma3(fields: Fields, checkpoint: Checkpoint) -> Conversion:
    """Gemma Team 2025: norms of queries and keys; five layers with a window, and a rotary base of their own, to one."""
    layers, every = fields.size("num_hidden_layers"), fields.size("sliding_window_pattern", 6)
    kinds = ["sliding_attention" if (i + 1) % every else "full_attention" for i in range(layers)]
    rotary = fields.get("rope_parameters", None) or {}
    base = fields.number("rope_local_base_freq", 10000.0)
    windowed, _ = parse_rotary(fields, rotary.get("sliding_attention") or {}, base, 2)
    if "rotary_frequencies" in windowed:
        raise fields.refusal("rope_parameters", rotary, "'default' in rope_type of sliding_attention")
    ours = {
        "norm_placement": "sandwich",
        "qk_norm": True,
        "attention_softcap": fields.number("attn_logit_softcapping", None) or 0.0,
        "logit_softcap": fields.number("final_logit_softcapping", None) or 0.0,
        "windows": windows_by_name(fields, kinds),
        "window_rotary_base": windowed["rotary_base"],
    }
    return _gemma_conversion(fields, checkpoint, _gemma_mlp(fields), 4, ours, SANDWICH_BLOCK)


def gemma3_with_pictures(fields: Fields, checkpoint: Checkpoint) -> Conversion:
    """The language model of Gemma 3 from 4B on; what reads pictures is left out. Google's files leave out sizes that
    are what transformers takes anyway."""
    sizes = {
        "vocab_size": 262208, "num_attention_heads": 8, "num_key_value_heads": 4, "max_position_embeddings": 131072,
    }  # fmt: skip
    text = fields.get("text_config", None)
    if not isinstance(text, dict):
        raise ValueError(f"{fields.where}: text_config must be an object, got {text!r}")
    conversion = gemma3(Fields(sizes | text, f"{fields.where}, text_config"), checkpoint)
    prefixes = ("language_model.model.", "model.language_model.")
    prefix = next((p for p in prefixes if any(name.startswith(p) for name in checkpoint.names())), prefixes[0])
    return replace(conversion, prefix=prefix, ignored=r"vision_tower\.|multi_modal_projector\.")


def _gemma_mlp(fields: Fields) -> str:
    return fields.choose(
        "hidden_activation", {"gelu_pytorch_tanh": "geglu_tanh", "gelu": "geglu", "silu": "swiglu"}, "gelu_pytorch_tanh"
    )


def _gemma_conversion(
    fields: Fields,
    checkpoint: Checkpoint,
    mlp: str,
    kv_heads: int,
    ours: dict[str, Any] | None = None,
    modules: dict[str, str] = LLAMA_BLOCK,
) -> Conversion:
    fields.only(use_bidirectional_attention=False)
    # What the scores are divided by the root of; Gemma 1 has the head's size.
    scale = fields.number("query_pre_attn_scalar", 256) if modules is SANDWICH_BLOCK else None
    style = llama_style(fields, checkpoint, kv_heads, head_dim=256, tie=True, mlp=mlp)
    style |= {"embedding_scale": style["embed_dim"] ** 0.5, "bias": fields.get("attention_bias", False)}
    unbiased = ("gate_proj", "up_proj", "down_proj")
    return llama_conversion(fields, style | (ours or {}), modules, unbiased, norm_offset=1.0, score_size=scale)
