"""GPT from GPT-2."""

from __future__ import annotations

import torch
from torch import Tensor

from ..gpt import GPTConfig
from .conversion import Checkpoint, Conversion, block, head_ties, scaled
from .fields import GELUS, Fields

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
        norm_eps=fields.number("layer_norm_epsilon", 1e-5),
        tie_embeddings=head_ties(fields, checkpoint, True, "lm_head.weight", "transformer.wte.weight"),
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
