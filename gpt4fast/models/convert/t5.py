"""EncoderDecoder from T5 and Flan-T5."""

from __future__ import annotations

from torch import Tensor

from ..encoder import EncoderConfig
from ..encoder_decoder import EncoderDecoderConfig
from ..gpt import GPTConfig
from .conversion import Checkpoint, Conversion, block, head_is_embedding, scaled
from .fields import Fields


def _t5_block(ours: str, theirs: str, gated: bool, has_cross: bool) -> dict[str, str]:
    last = "layer.2" if has_cross else "layer.1"
    names = {
        "attention_norm": "layer.0.layer_norm",
        "attention.qkv": "layer.0.SelfAttention.q layer.0.SelfAttention.k layer.0.SelfAttention.v",
        "attention.out": "layer.0.SelfAttention.o",
        "mlp_norm": f"{last}.layer_norm",
        "mlp.up": f"{last}.DenseReluDense.wi_0 {last}.DenseReluDense.wi_1" if gated else f"{last}.DenseReluDense.wi",
        "mlp.down": f"{last}.DenseReluDense.wo",
    }
    if has_cross:
        names |= {
            "cross_norm": "layer.1.layer_norm",
            "cross_attention.query": "layer.1.EncDecAttention.q",
            "cross_attention.key_value": "layer.1.EncDecAttention.k layer.1.EncDecAttention.v",
            "cross_attention.out": "layer.1.EncDecAttention.o",
        }
    return block(ours, theirs, names)


def t5(fields: Fields, checkpoint: Checkpoint) -> Conversion:
    """Raffel et al. 2020."""
    perceptrons = {"relu": "relu", "gated-gelu": "geglu_tanh", "gated-silu": "swiglu"}
    style = {
        "vocab_size": fields.size("vocab_size"),
        "num_heads": fields.size("num_heads"),
        "embed_dim": fields.size("d_model"),
        "head_dim": fields.size("d_kv"),
        "mlp_dim": fields.size("d_ff"),
        "mlp": fields.choose("feed_forward_proj", perceptrons, "relu"),
        "norm": "rms",
        "norm_eps": fields.number("layer_norm_epsilon", 1e-6),
        "bias": False,
        "positions": "relative",
        "relative_buckets": fields.size("relative_attention_num_buckets", 32),
        "relative_max_distance": fields.size("relative_attention_max_distance", 128),
        "tie_embeddings": head_is_embedding(checkpoint, "lm_head.weight", "shared.weight"),
    }
    layers = fields.size("num_layers")
    encoder = EncoderConfig(**style, num_layers=layers, head=False)
    decoder = GPTConfig(**style, num_layers=fields.size("num_decoder_layers", layers))
    # T5 1.1 does not scale what goes into the head, and says so by tie_word_embeddings, tied or not.
    scales_output = fields.get("scale_decoder_outputs", fields.get("tie_word_embeddings", True) is not False)

    def change(name: str, tensor: Tensor) -> Tensor:
        if name.endswith("Attention.q.weight"):  # T5's scores are not divided by the root of head_dim
            return scaled(tensor, encoder.head_dim**0.5)
        if name == "decoder.final_layer_norm.weight" and scales_output:
            return scaled(tensor, encoder.embed_dim**-0.5)
        return tensor

    bias = "block.0.layer.0.SelfAttention.relative_attention_bias"
    modules = {
        "decoder.tokens": "shared",
        "encoder.stack.tokens": "shared",
        "encoder.stack.relative.bias": f"encoder.{bias}",
        "encoder.stack.norm": "encoder.final_layer_norm",
        "decoder.relative.bias": f"decoder.{bias}",
        "decoder.norm": "decoder.final_layer_norm",
        "head": "lm_head",
        **_t5_block("encoder.stack.blocks.*", "encoder.block.*", encoder.gated, has_cross=False),
        **_t5_block("decoder.blocks.*", "decoder.block.*", encoder.gated, has_cross=True),
    }
    # Of old files: the shared embedding again, and a bias that nothing reads.
    ignored = r"(en|de)coder\.embed_tokens\.weight$|EncDecAttention\.relative_attention_bias\.weight$"
    return Conversion(EncoderDecoderConfig(encoder, decoder), modules, change, ignored=ignored)
