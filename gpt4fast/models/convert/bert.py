"""Encoder from BERT (MiniLM, BGE, E5, ...) and RoBERTa (XLM-RoBERTa, CamemBERT), with or without their head for masked
tokens. The pooler and the head for next sentences are left out: `Encoder.embed` makes vectors of the hidden states."""

from __future__ import annotations

from torch import Tensor

from ..encoder import EncoderConfig
from .conversion import Checkpoint, Conversion, block, head_ties
from .fields import GELUS, Fields

BERT = {
    "stack.tokens": "embeddings.word_embeddings",
    "stack.positions": "embeddings.position_embeddings",
    "stack.token_types": "embeddings.token_type_embeddings",
    "stack.embedding_norm": "embeddings.LayerNorm",
    **block("stack.blocks.*", "encoder.layer.*", {
        "attention.qkv": "attention.self.query attention.self.key attention.self.value",
        "attention.out": "attention.output.dense",
        "attention_norm": "attention.output.LayerNorm",
        "mlp.up": "intermediate.dense",
        "mlp.down": "output.dense",
        "mlp_norm": "output.LayerNorm",
    }),
}  # fmt: skip


def bert(fields: Fields, checkpoint: Checkpoint) -> Conversion:
    """Devlin et al. 2019."""
    head = {
        "transform": "cls.predictions.transform.dense",
        "transform_norm": "cls.predictions.transform.LayerNorm",
        "head": "cls.predictions.decoder",
    }
    conversion = _bert_style(fields, checkpoint, "bert.", head, first_position=0)
    if conversion.config.head and conversion.config.mlp != "gelu":
        raise fields.refusal("hidden_act", fields.get("hidden_act", None), "'gelu' where there is a head")
    return conversion


def roberta(fields: Fields, checkpoint: Checkpoint) -> Conversion:
    """Liu et al. 2019: BERT, whose positions count from the number behind the padding token's."""
    head = {"transform": "lm_head.dense", "transform_norm": "lm_head.layer_norm", "head": "lm_head.decoder"}
    return _bert_style(fields, checkpoint, "roberta.", head, first_position=fields.get("pad_token_id", 1) + 1)


def _bert_style(
    fields: Fields, checkpoint: Checkpoint, prefix: str, head: dict[str, str], first_position: int
) -> Conversion:
    fields.only(is_decoder=False, add_cross_attention=False, position_embedding_type="absolute")
    names = checkpoint.names()
    has_head = f"{head['transform']}.weight" in names
    embedding = f"{prefix}embeddings.word_embeddings.weight"
    config = EncoderConfig(
        vocab_size=fields.size("vocab_size"),
        max_length=fields.size("max_position_embeddings") - first_position,
        num_layers=fields.size("num_hidden_layers"),
        num_heads=fields.size("num_attention_heads"),
        embed_dim=fields.size("hidden_size"),
        mlp_dim=fields.size("intermediate_size"),
        mlp=fields.choose("hidden_act", GELUS, "gelu"),
        norm_eps=fields.number("layer_norm_eps", 1e-12),
        tie_embeddings=head_ties(fields, checkpoint, True, f"{head['head']}.weight", embedding),
        norm_placement="post",
        embedding_norm=True,
        head=has_head,
        token_types=fields.size("type_vocab_size", 2),
    )
    if has_head and f"{head['head']}.bias" not in names:  # it stands beside the matrix, not in it
        head = head | {"head.bias": head["head"].rpartition(".")[0] + ".bias"}

    def change(name: str, tensor: Tensor) -> Tensor:
        return tensor[first_position:] if name == "embeddings.position_embeddings.weight" else tensor

    ignored = r"position_ids$|^pooler\.|^cls\.seq_relationship\.|^(cls\.predictions|lm_head)\.bias$"
    return Conversion(config, BERT | head, change, prefix, ignored)
