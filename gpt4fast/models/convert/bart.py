"""EncoderDecoder from BART and Whisper."""

from __future__ import annotations

from torch import Tensor

from ..encoder import EncoderConfig
from ..encoder_decoder import EncoderDecoderConfig
from ..gpt import GPTConfig
from .conversion import Checkpoint, Conversion, block, head_is_embedding, head_ties
from .fields import GELUS, Fields

BART_BLOCK = {
    "attention.qkv": "self_attn.q_proj self_attn.k_proj self_attn.v_proj",
    "attention.out": "self_attn.out_proj",
    "attention_norm": "self_attn_layer_norm",
    "mlp.up": "fc1",
    "mlp.down": "fc2",
    "mlp_norm": "final_layer_norm",
}
BART_CROSS = {
    "cross_attention.query": "encoder_attn.q_proj",
    "cross_attention.key_value": "encoder_attn.k_proj encoder_attn.v_proj",
    "cross_attention.out": "encoder_attn.out_proj",
    "cross_norm": "encoder_attn_layer_norm",
}
BART = {
    "encoder.stack.positions": "encoder.embed_positions",
    "decoder.positions": "decoder.embed_positions",
    "decoder.tokens": "shared",
    "encoder.stack.tokens": "shared",
    "encoder.stack.embedding_norm": "encoder.layernorm_embedding",
    "decoder.embedding_norm": "decoder.layernorm_embedding",
    "head": "lm_head",
    "head.bias": "final_logits_bias",
    **block("encoder.stack.blocks.*", "encoder.layers.*", BART_BLOCK),
    **block("decoder.blocks.*", "decoder.layers.*", BART_BLOCK | BART_CROSS),
}
WHISPER = {
    "encoder.stack.tokens.conv1": "encoder.conv1",
    "encoder.stack.tokens.conv2": "encoder.conv2",
    "encoder.stack.positions": "encoder.embed_positions",
    "encoder.stack.norm": "encoder.layer_norm",
    "decoder.tokens": "decoder.embed_tokens",
    "decoder.positions": "decoder.embed_positions",
    "decoder.norm": "decoder.layer_norm",
    "head": "proj_out",
    **block("encoder.stack.blocks.*", "encoder.layers.*", BART_BLOCK),
    **block("decoder.blocks.*", "decoder.layers.*", BART_BLOCK | BART_CROSS),
}


def bart(fields: Fields, checkpoint: Checkpoint) -> Conversion:
    """Lewis et al. 2020: BERT and GPT, post-norm. Its first two positions are nobody's."""
    fields.only(tie_word_embeddings=True)
    dim = fields.size("d_model")
    style = {
        "max_length": fields.size("max_position_embeddings"),
        "tie_embeddings": head_is_embedding(checkpoint, "lm_head.weight", "model.shared.weight"),
        "norm_placement": "post",
        "embedding_norm": True,
        "embedding_scale": dim**0.5 if fields.get("scale_embedding", False) else 1.0,
    }
    encoder = EncoderConfig(**_bart_style(fields, "encoder"), **style, head=False)
    decoder = GPTConfig(**_bart_style(fields, "decoder"), **style, head_bias="final_logits_bias" in checkpoint.names())

    def change(name: str, tensor: Tensor) -> Tensor:
        if name.endswith("embed_positions.weight"):
            return tensor[2:]
        return tensor.flatten() if name == "final_logits_bias" else tensor

    ignored = r"(en|de)coder\.embed_tokens\.weight$"
    return Conversion(EncoderDecoderConfig(encoder, decoder), BART, change, "model.", ignored)


def whisper(fields: Fields, checkpoint: Checkpoint) -> Conversion:
    """Radford et al. 2022: BART, pre-norm, that reads a spectrogram of 30 seconds. Its keys have no biases."""
    encoder = EncoderConfig(
        **_bart_style(fields, "encoder"),
        max_length=fields.size("max_source_positions"),
        mel_bins=fields.size("num_mel_bins"),
        head=False,
    )
    decoder = GPTConfig(
        **_bart_style(fields, "decoder"),
        max_length=fields.size("max_target_positions"),
        tie_embeddings=head_ties(fields, checkpoint, True, "proj_out.weight", "model.decoder.embed_tokens.weight"),
    )
    config = EncoderDecoderConfig(encoder, decoder, share_embeddings=False)
    return Conversion(config, WHISPER, prefix="model.", unbiased=("k_proj",))


def _bart_style(fields: Fields, half: str) -> dict[str, int | str]:
    return {
        "vocab_size": fields.size("vocab_size"),
        "num_layers": fields.size(f"{half}_layers"),
        "num_heads": fields.size(f"{half}_attention_heads"),
        "embed_dim": fields.size("d_model"),
        "mlp_dim": fields.size(f"{half}_ffn_dim"),
        "mlp": fields.choose("activation_function", GELUS, "gelu"),
    }
