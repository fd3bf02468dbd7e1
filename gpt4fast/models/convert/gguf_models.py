"""GGUF files as the folders of transformers that they were made from: metadata become fields, and names names.

llama.cpp changed some weights when it made the file; they are changed back here, and the families' readers do not
know the difference.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .gguf import GGUFFile

# Metadata under the architecture's name, and the field of transformers.
_FIELDS = {
    "context_length": "max_position_embeddings",
    "embedding_length": "hidden_size",
    "block_count": "num_hidden_layers",
    "feed_forward_length": "intermediate_size",
    "attention.head_count": "num_attention_heads",
    "attention.head_count_kv": "num_key_value_heads",
    "attention.key_length": "head_dim",
    "attention.layer_norm_rms_epsilon": "rms_norm_eps",
    "attention.sliding_window": "sliding_window",
    "rope.freq_base": "rope_theta",
    "rope.freq_base_swa": "rope_local_base_freq",
    "attn_logit_softcapping": "attn_logit_softcapping",
    "final_logit_softcapping": "final_logit_softcapping",
}
_GPT2_FIELDS = {
    "context_length": "n_positions",
    "embedding_length": "n_embd",
    "block_count": "n_layer",
    "feed_forward_length": "n_inner",
    "attention.head_count": "n_head",
    "attention.layer_norm_epsilon": "layer_norm_epsilon",
}
# Read below, or said by the tensors anyway.
_READ = {
    "vocab_size", "attention.value_length", "rope.dimension_count", "rope.scaling.type", "rope.scaling.factor",
    "rope.scaling.original_context_length",
}  # fmt: skip

_NAMES = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "output": "lm_head",
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_SANDWICH_NAMES = _NAMES | {
    "post_attention_norm": "post_attention_layernorm",
    "ffn_norm": "pre_feedforward_layernorm",
    "post_ffw_norm": "post_feedforward_layernorm",
}
_GPT2_NAMES = {
    "token_embd": "transformer.wte",
    "position_embd": "transformer.wpe",
    "output_norm": "transformer.ln_f",
    "output": "lm_head",
    "attn_norm": "ln_1",
    "attn_qkv": "attn.c_attn",
    "attn_output": "attn.c_proj",
    "ffn_norm": "ln_2",
    "ffn_up": "mlp.c_fc",
    "ffn_down": "mlp.c_proj",
}
# An architecture's model_type in transformers, fields, names, and what its blocks' names begin with.
_ARCHITECTURES = {
    "gpt2": ("gpt2", _GPT2_FIELDS, _GPT2_NAMES, "transformer.h"),
    "llama": ("llama", _FIELDS, _NAMES, "model.layers"),
    "qwen2": ("qwen2", _FIELDS, _NAMES, "model.layers"),
    "qwen3": ("qwen3", _FIELDS, _NAMES, "model.layers"),
    "gemma": ("gemma", _FIELDS, _NAMES, "model.layers"),
    "gemma2": ("gemma2", _FIELDS, _SANDWICH_NAMES, "model.layers"),
    "gemma3": ("gemma3_text", _FIELDS, _SANDWICH_NAMES, "model.layers"),
}
_GEMMA_27B = {"gemma2": 46, "gemma3": 62}  # their layers: only their scores are divided by another number


class GGUFCheckpoint:
    """A file's tensors under transformers' names and as transformers has them, and `fields`, its config.json."""

    def __init__(self, path: Path):
        self.where = str(path)
        self._file = GGUFFile(path)
        metadata = self._file.metadata
        self._architecture = metadata.get("general.architecture")
        if not isinstance(self._architecture, str) or self._architecture not in _ARCHITECTURES:
            known = ", ".join(_ARCHITECTURES)
            raise ValueError(f"{path} is of the architecture {self._architecture!r}; GPT reads {known}")
        if metadata.get("split.count", 1) not in (0, 1):
            raise ValueError(f"{path} is one of {metadata['split.count']} parts; merge them first (gguf-split --merge)")
        _, _, names, blocks = _ARCHITECTURES[self._architecture]
        self._names = {}
        for name in self._file.tensors:
            if name == "rope_freqs.weight":
                continue
            found = re.fullmatch(r"(blk\.(\d+)\.)?(\w+)\.(weight|bias)", name)
            module = names.get(found.group(3)) if found else None
            if module is None:
                raise ValueError(f"{path} has the tensor {name}, which the architecture {self._architecture} has not")
            layer = f"{blocks}.{found.group(2)}." if found.group(1) else ""
            self._names[f"{layer}{module}.{found.group(4)}"] = name
        self.fields = self._read_fields()

    @property
    def dtype(self) -> torch.dtype:
        """The embedding's, in which a file without quantised blocks is meant to be computed."""
        return self._file.dtype("token_embd.weight")

    def names(self) -> list[str]:
        return list(self._names)

    def read(self, name: str) -> Tensor:
        original = self._names[name]
        tensor = self._file.read(original)
        if self._architecture.startswith("gemma") and name.endswith("norm.weight"):
            return tensor.double() - 1.0
        if self._architecture == "gpt2" and tensor.dim() == 2 and original.startswith("blk."):
            return tensor.T
        if self._architecture == "llama" and (".attn_q." in original or ".attn_k." in original):
            # Of llama's heads, llama.cpp turns pairs of neighbouring rows, transformers the pairs of two halves.
            heads = self.fields["num_attention_heads" if ".attn_q." in original else "num_key_value_heads"]
            if tensor.shape[0] % (2 * heads) == 0:  # or it will not fit the configuration, and is named for that
                tensor = tensor.unflatten(0, (heads, -1, 2)).transpose(1, 2).reshape(tensor.shape)
        return tensor

    def _read_fields(self) -> dict[str, Any]:
        model_type, known, _, _ = _ARCHITECTURES[self._architecture]
        prefix = f"{self._architecture}."
        given = {k.removeprefix(prefix): v for k, v in self._file.metadata.items() if k.startswith(prefix)}
        if unknown := sorted(set(given) - set(known) - _READ):
            raise ValueError(f"{self.where}: metadata {prefix}{unknown[0]} is {given[unknown[0]]!r}, which is unknown")
        # One number a layer is one number where they are all the same.
        given = {k: v[0] if isinstance(v, list) and v and len(set(v)) == 1 else v for k, v in given.items()}
        for key, value in given.items():
            if not isinstance(value, str if key == "rope.scaling.type" else (int, float)):
                raise ValueError(f"{self.where}: metadata {prefix}{key} is {value!r}, which is not supported")
        if "token_embd.weight" not in self._file.tensors:
            raise ValueError(f"{self.where} has no tensor token_embd.weight")
        layers = given.get("block_count", 0)
        if layers > len(self._names):  # before a model of so many layers is made, to find that they are missing
            raise ValueError(f"{self.where}: metadata {prefix}block_count is {layers}, more than there are tensors")
        fields = {field: given[key] for key, field in known.items() if key in given}
        fields |= {
            "model_type": model_type,
            "vocab_size": self._file.tensors["token_embd.weight"].shape[0],
            "tie_word_embeddings": True,  # unless there is an output that differs
            "attention_bias": "model.layers.0.self_attn.q_proj.bias" in self._names,
            "mlp_bias": "model.layers.0.mlp.up_proj.bias" in self._names,
        }
        if self._architecture == "gpt2":
            return fields
        for name in ("num_attention_heads", "hidden_size", "num_hidden_layers"):
            if not isinstance(fields.get(name), int) or fields[name] < 1:
                raise ValueError(f"{self.where}: metadata for {name} must be a positive int, got {fields.get(name)!r}")
        fields.setdefault("num_key_value_heads", fields["num_attention_heads"])
        fields.setdefault("head_dim", fields["hidden_size"] // fields["num_attention_heads"])
        for key in ("attention.value_length", "rope.dimension_count"):
            if given.get(key, fields["head_dim"]) != fields["head_dim"]:
                raise ValueError(
                    f"{self.where}: metadata {prefix}{key} is {given[key]}, which is not supported; it must be the "
                    f"head's {fields['head_dim']}"
                )
        if self._architecture == "llama" and fields.get("sliding_window"):
            fields["model_type"] = "mistral"
        is_27b = fields["num_hidden_layers"] == _GEMMA_27B.get(self._architecture)
        scale = fields["hidden_size"] // fields["num_attention_heads"] if is_27b else fields["head_dim"]
        return fields | {"query_pre_attn_scalar": scale, "rope_scaling": self._scaling(given)}

    def _scaling(self, given: dict[str, Any]) -> dict[str, Any] | None:
        if "rope_freqs.weight" in self._file.tensors:
            return {"rope_type": "factors", "factors": self._file.read("rope_freqs.weight").tolist()}
        kind = given.get("rope.scaling.type", "none")
        if kind == "none":
            return None
        scaling = {"rope_type": kind, "factor": given.get("rope.scaling.factor", 1.0)}
        if "rope.scaling.original_context_length" in given:
            scaling["original_max_position_embeddings"] = given["rope.scaling.original_context_length"]
        return scaling
