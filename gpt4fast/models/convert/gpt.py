"""GPT from GPT-2, Llama (SmolLM, TinyLlama, ...), Mistral, Qwen 2 and 3, and Gemma 1 to 3."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..gpt import GPTConfig
from .conversion import Checkpoint, Conversion, block, head_is_embedding, scaled
from .fields import GELUS, Fields
from .rotary import parse_rotary, read_rotary

GPT2 = {
    "stack.tokens": "wte", "stack.positions": "wpe", "stack.norm": "ln_f", "head": "lm_head",
    **block("stack.blocks.*", "h.*", {
        "attention_norm": "ln_1", "attention.qkv": "attn.c_attn", "attention.out": "attn.c_proj",
        "mlp_norm": "ln_2", "mlp.up": "mlp.c_fc", "mlp.down": "mlp.c_proj",
    }),
}  # fmt: skip


def gpt2(fields: Fields, checkpoint: Checkpoint) -> Conversion:
    """Radford et al. 2019. Its matrices are stored transposed."""
    fields.only(add_cross_attention=False)
    dim, heads = fields.size("n_embd"), fields.size("n_head")
    config = GPTConfig(
        vocab_size=fields.size("vocab_size"),
        max_length=fields.size("n_positions"),
        num_layers=fields.size("n_layer"),
        num_heads=heads,
        embed_dim=dim,
        mlp_dim=fields.size("n_inner", 4 * dim),
        mlp=fields.choose("activation_function", GELUS, "gelu_new"),
        norm_eps=fields.get("layer_norm_epsilon", 1e-5),
        tie_embeddings=_ties(fields, checkpoint, True, "lm_head.weight", "transformer.wte.weight"),
    )
    scale_plainly = fields.get("scale_attn_weights", True)
    by_layer = fields.get("scale_attn_by_inverse_layer_idx", False)

    def change(name: str, tensor: Tensor) -> Tensor:
        if name.endswith((".c_attn.weight", ".c_proj.weight", ".c_fc.weight")):
            tensor = tensor.T
        if ".c_attn." in name and (by_layer or not scale_plainly):
            layer = int(name.split(".")[1])
            factor = (1.0 if scale_plainly else config.head_dim**0.5) / (layer + 1 if by_layer else 1)
            tensor = torch.cat((scaled(tensor[:dim], factor), tensor[dim:]))
        return tensor

    # Of old files: causal masks.
    return Conversion(config, GPT2, change, prefix="transformer.", ignored=r"\.attn\.(masked_)?bias$")


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
SANDWICH_BLOCK = LLAMA_BLOCK | {
    "attention_post_norm": "post_attention_layernorm",
    "mlp_norm": "pre_feedforward_layernorm",
    "mlp_post_norm": "post_feedforward_layernorm",
}


def llama(fields: Fields, checkpoint: Checkpoint) -> Conversion:
    """Touvron et al. 2023, and what is of its kind: SmolLM, TinyLlama, Yi, DeepSeek's first."""
    ours = _llama_style(fields, checkpoint, kv_heads=None)
    attention_bias, mlp_bias = fields.get("attention_bias", False), fields.get("mlp_bias", False)
    unbiased = () if attention_bias else ("q_proj", "k_proj", "v_proj", "o_proj")
    unbiased += () if mlp_bias else ("gate_proj", "up_proj", "down_proj")
    return _llama_conversion(
        fields, ours | {"bias": attention_bias or mlp_bias, "qkv_bias": attention_bias}, unbiased=unbiased
    )


def mistral(fields: Fields, checkpoint: Checkpoint) -> Conversion:
    """Jiang et al. 2023: Llama with a sliding window."""
    ours = _llama_style(fields, checkpoint, kv_heads=8)
    window = fields.get("sliding_window", 4096)
    return _llama_conversion(fields, ours | {"windows": (window,) * ours["num_layers"] if window else None})


def qwen2(fields: Fields, checkpoint: Checkpoint) -> Conversion:
    """Yang et al. 2024: Llama with biases of queries, keys and values."""
    ours = _llama_style(fields, checkpoint, kv_heads=32)
    return _llama_conversion(fields, ours | {"qkv_bias": True, "windows": _qwen_windows(fields, ours["num_layers"])})


def qwen3(fields: Fields, checkpoint: Checkpoint) -> Conversion:
    """Yang et al. 2025: norms of queries and keys instead."""
    ours = _llama_style(fields, checkpoint, kv_heads=32, head_dim=128)
    bias = fields.get("attention_bias", False)
    ours |= {"bias": bias, "qk_norm": True, "windows": _qwen_windows(fields, ours["num_layers"])}
    return _llama_conversion(fields, ours, unbiased=("gate_proj", "up_proj", "down_proj"))


def _qwen_windows(fields: Fields, layers: int) -> tuple[int, ...] | None:
    if not fields.get("use_sliding_window", False):
        return None
    first = fields.get("max_window_layers", 28)
    return _windows(fields, ["sliding_attention" if i >= first else "full_attention" for i in range(layers)])


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
        "attention_softcap": fields.get("attn_logit_softcapping", 50.0) or 0.0,
        "logit_softcap": fields.get("final_logit_softcapping", 30.0) or 0.0,
        "windows": _windows(fields, ["full_attention" if i % 2 else "sliding_attention" for i in range(layers)]),
    }
    return _gemma_conversion(fields, checkpoint, _gemma_mlp(fields), 4, ours, SANDWICH_BLOCK)


def gemma3(fields: Fields, checkpoint: Checkpoint) -> Conversion:
    """Gemma Team 2025: norms of queries and keys; five layers with a window, and a rotary base of their own, to one."""
    layers, every = fields.size("num_hidden_layers"), fields.get("sliding_window_pattern", 6)
    windows = _windows(fields, ["sliding_attention" if (i + 1) % every else "full_attention" for i in range(layers)])
    rotary = fields.get("rope_parameters", None) or {}
    base = fields.get("rope_local_base_freq", 10000.0)
    windowed, _ = parse_rotary(fields, rotary.get("sliding_attention") or {}, base, 2)
    if "rotary_frequencies" in windowed:
        raise fields.refusal("rope_parameters", rotary, "'default' in rope_type of sliding_attention")
    ours = {
        "norm_placement": "sandwich",
        "qk_norm": True,
        "attention_softcap": fields.get("attn_logit_softcapping", None) or 0.0,
        "logit_softcap": fields.get("final_logit_softcapping", None) or 0.0,
        "windows": windows,
        "window_rotary_base": windowed["rotary_base"],
    }
    return _gemma_conversion(fields, checkpoint, _gemma_mlp(fields), 4, ours, SANDWICH_BLOCK)


def _gemma_mlp(fields: Fields) -> str:
    return fields.choose(
        "hidden_activation", {"gelu_pytorch_tanh": "geglu_tanh", "gelu": "geglu", "silu": "swiglu"}, "gelu_pytorch_tanh"
    )


def _gemma_conversion(fields, checkpoint, mlp, kv_heads, ours=None, modules=LLAMA_BLOCK) -> Conversion:
    fields.only(use_bidirectional_attention=False)
    style = _llama_style(fields, checkpoint, kv_heads, head_dim=256, tie=True, mlp=mlp)
    style |= {"embedding_scale": style["embed_dim"] ** 0.5, "bias": fields.get("attention_bias", False)}
    unbiased = ("gate_proj", "up_proj", "down_proj")
    return _llama_conversion(fields, style | (ours or {}), modules, unbiased, norm_offset=1.0)


# -- What all of Llama's kind share ------------------------------------------------------------------------------------


def _llama_style(
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
        "norm_eps": fields.get("rms_norm_eps", 1e-6),
        "mlp": mlp or fields.choose("hidden_act", {"silu": "swiglu", "gelu": "geglu"}, "silu"),
        "bias": False,
        "tie_embeddings": _ties(fields, checkpoint, tie, "lm_head.weight", "model.embed_tokens.weight"),
    }


def _llama_conversion(
    fields: Fields,
    ours: dict[str, Any],
    modules: dict[str, str] = LLAMA_BLOCK,
    unbiased: tuple[str, ...] = (),
    norm_offset: float = 0.0,
) -> Conversion:
    """norm_offset: what is added to a norm's weight before it multiplies."""
    rotary = fields.get("rope_parameters", None) or {}
    if "full_attention" in rotary:  # Gemma 3's, one for each kind of layer
        rotary, factor = parse_rotary(fields, rotary["full_attention"], 1e6, ours["head_dim"])
    else:
        rotary, factor = read_rotary(fields, ours["head_dim"], 1e6 if "window_rotary_base" in ours else 1e4)
    config = GPTConfig(**ours | rotary)
    # A factor of queries and of keys is its square of the scores; so is what Gemma divides by in head_dim's place.
    scale = factor**2 * (config.head_dim / (fields.get("query_pre_attn_scalar", None) or config.head_dim)) ** 0.5
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


def _windows(fields: Fields, default: list[str]) -> tuple[int, ...] | None:
    """Each layer's window by its name in layer_types."""
    kinds = fields.get("layer_types", None) or default
    window = fields.get("sliding_window", 4096)
    for kind in kinds:
        if kind not in ("full_attention", "sliding_attention"):
            raise fields.refusal("layer_types", kind, "'full_attention' or 'sliding_attention'")
    if not window:
        return None
    return tuple(window if kind == "sliding_attention" else 0 for kind in kinds)


def _ties(fields: Fields, checkpoint: Checkpoint, default: bool, head: str, embedding: str) -> bool:
    return bool(fields.get("tie_word_embeddings", default)) and head_is_embedding(checkpoint, head, embedding)


FAMILIES = {
    "gpt2": gpt2,
    "llama": llama,
    "mistral": mistral,
    "qwen2": qwen2,
    "qwen3": qwen3,
    "gemma": gemma,
    "gemma2": gemma2,
    "gemma3_text": gemma3,
}
