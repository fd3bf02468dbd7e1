"""Configurations as they stand beside well-known models: each is read, and makes as many parameters as the model has.

Abridged from the models' config.json: the fields that transformers reads, in the format of the version that wrote them.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

pytest.importorskip("safetensors")

from gpt4fast.models import GPT, Encoder, EncoderDecoder  # noqa: E402
from gpt4fast.models.convert import FAMILIES  # noqa: E402
from gpt4fast.models.convert.fields import Fields  # noqa: E402

MODELS = {
    "gpt2": (
        124_439_808,
        {
            "activation_function": "gelu_new", "attn_pdrop": 0.1, "layer_norm_epsilon": 1e-05, "model_type": "gpt2",
            "n_ctx": 1024, "n_embd": 768, "n_head": 12, "n_layer": 12, "n_positions": 1024, "vocab_size": 50257,
            "summary_type": "cls_index", "task_specific_params": {"text-generation": {"do_sample": True}},
        },
    ),
    "SmolLM2-135M": (
        134_515_008,
        {
            "attention_bias": False, "hidden_act": "silu", "hidden_size": 576, "intermediate_size": 1536,
            "is_llama_config": True, "max_position_embeddings": 8192, "model_type": "llama", "num_attention_heads": 9,
            "num_hidden_layers": 30, "num_key_value_heads": 3, "pretraining_tp": 1, "rms_norm_eps": 1e-05,
            "rope_interleaved": False, "rope_scaling": None, "rope_theta": 100000, "tie_word_embeddings": True,
            "vocab_size": 49152,
        },
    ),
    "Llama-3.2-1B": (
        1_235_814_400,
        {
            "attention_bias": False, "head_dim": 64, "hidden_act": "silu", "hidden_size": 2048,
            "intermediate_size": 8192, "max_position_embeddings": 131072, "mlp_bias": False, "model_type": "llama",
            "num_attention_heads": 32, "num_hidden_layers": 16, "num_key_value_heads": 8, "rms_norm_eps": 1e-05,
            "rope_scaling": {
                "factor": 32.0, "high_freq_factor": 4.0, "low_freq_factor": 1.0,
                "original_max_position_embeddings": 8192, "rope_type": "llama3",
            },
            "rope_theta": 500000.0, "tie_word_embeddings": True, "vocab_size": 128256,
        },
    ),
    "Mistral-7B-v0.1": (
        7_241_732_096,
        {
            "hidden_act": "silu", "hidden_size": 4096, "intermediate_size": 14336, "max_position_embeddings": 32768,
            "model_type": "mistral", "num_attention_heads": 32, "num_hidden_layers": 32, "num_key_value_heads": 8,
            "rms_norm_eps": 1e-05, "rope_theta": 10000.0, "sliding_window": 4096, "tie_word_embeddings": False,
            "vocab_size": 32000,
        },
    ),
    "Qwen2.5-0.5B": (
        494_032_768,
        {
            "hidden_act": "silu", "hidden_size": 896, "intermediate_size": 4864, "max_position_embeddings": 32768,
            "max_window_layers": 24, "model_type": "qwen2", "num_attention_heads": 14, "num_hidden_layers": 24,
            "num_key_value_heads": 2, "rms_norm_eps": 1e-06, "rope_theta": 1000000.0, "sliding_window": 32768,
            "tie_word_embeddings": True, "use_mrope": False, "use_sliding_window": False, "vocab_size": 151936,
        },
    ),
    "Qwen3-0.6B": (
        596_049_920,
        {
            "attention_bias": False, "head_dim": 128, "hidden_act": "silu", "hidden_size": 1024,
            "intermediate_size": 3072, "max_position_embeddings": 40960, "max_window_layers": 28,
            "model_type": "qwen3", "num_attention_heads": 16, "num_hidden_layers": 28, "num_key_value_heads": 8,
            "rms_norm_eps": 1e-06, "rope_scaling": None, "rope_theta": 1000000, "sliding_window": None,
            "tie_word_embeddings": True, "use_sliding_window": False, "vocab_size": 151936,
        },
    ),
    "gemma-2-2b": (
        2_614_341_888,
        {
            "attention_bias": False, "attn_logit_softcapping": 50.0, "cache_implementation": "hybrid",
            "final_logit_softcapping": 30.0, "head_dim": 256, "hidden_act": "gelu_pytorch_tanh",
            "hidden_activation": "gelu_pytorch_tanh", "hidden_size": 2304, "intermediate_size": 9216,
            "max_position_embeddings": 8192, "model_type": "gemma2", "num_attention_heads": 8,
            "num_hidden_layers": 26, "num_key_value_heads": 4, "query_pre_attn_scalar": 256, "rms_norm_eps": 1e-06,
            "rope_theta": 10000.0, "sliding_window": 4096, "vocab_size": 256000,
        },
    ),
    "gemma-3-1b-it": (
        999_885_952,
        {
            "attention_bias": False, "attn_logit_softcapping": None, "final_logit_softcapping": None, "head_dim": 256,
            "hidden_activation": "gelu_pytorch_tanh", "hidden_size": 1152, "intermediate_size": 6912,
            "max_position_embeddings": 32768, "model_type": "gemma3_text", "num_attention_heads": 4,
            "num_hidden_layers": 26, "num_key_value_heads": 1, "query_pre_attn_scalar": 256, "rms_norm_eps": 1e-06,
            "rope_local_base_freq": 10000, "rope_scaling": None, "rope_theta": 1000000, "sliding_window": 512,
            "sliding_window_pattern": 6, "vocab_size": 262144,
        },
    ),
    "gemma-3-4b-it": (
        3_880_263_168,  # without what sees pictures
        {
            "boi_token_index": 255999, "mm_tokens_per_image": 256, "model_type": "gemma3",
            "text_config": {
                "hidden_size": 2560, "intermediate_size": 10240, "model_type": "gemma3_text", "num_hidden_layers": 34,
                "rope_scaling": {"factor": 8.0, "rope_type": "linear"}, "sliding_window": 1024,
            },
            "vision_config": {"hidden_size": 1152, "model_type": "siglip_vision_model"},
        },
    ),
    "all-MiniLM-L6-v2": (
        22_713_216 - 384 * 384 - 384,  # without the pooler
        {
            "gradient_checkpointing": False, "hidden_act": "gelu", "hidden_size": 384, "intermediate_size": 1536,
            "layer_norm_eps": 1e-12, "max_position_embeddings": 512, "model_type": "bert", "num_attention_heads": 12,
            "num_hidden_layers": 6, "pad_token_id": 0, "position_embedding_type": "absolute", "type_vocab_size": 2,
            "vocab_size": 30522,
        },
    ),
    "t5-small": (
        60_506_624,
        {
            "d_ff": 2048, "d_kv": 64, "d_model": 512, "decoder_start_token_id": 0, "dropout_rate": 0.1,
            "feed_forward_proj": "relu", "is_encoder_decoder": True, "layer_norm_epsilon": 1e-06, "model_type": "t5",
            "n_positions": 512, "num_heads": 8, "num_layers": 6, "relative_attention_num_buckets": 32,
            "vocab_size": 32128,
        },
    ),
    "bart-base": (
        139_420_416 + 50265 - 4 * 768,  # with the bias of the logits, without the first two positions
        {
            "activation_function": "gelu", "add_bias_logits": False, "add_final_layer_norm": False, "d_model": 768,
            "decoder_attention_heads": 12, "decoder_ffn_dim": 3072, "decoder_layers": 6, "encoder_attention_heads": 12,
            "encoder_ffn_dim": 3072, "encoder_layers": 6, "max_position_embeddings": 1024, "model_type": "bart",
            "normalize_before": False, "normalize_embedding": True, "scale_embedding": False, "vocab_size": 50265,
        },
    ),
    "whisper-tiny": (
        37_760_640 + (4 + 2 * 4) * 384,  # with biases of the keys
        {
            "activation_function": "gelu", "d_model": 384, "decoder_attention_heads": 6, "decoder_ffn_dim": 1536,
            "decoder_layers": 4, "encoder_attention_heads": 6, "encoder_ffn_dim": 1536, "encoder_layers": 4,
            "max_source_positions": 1500, "max_target_positions": 448, "model_type": "whisper", "num_mel_bins": 80,
            "scale_embedding": False, "vocab_size": 51865,
        },
    ),
}  # fmt: skip


class NoTensors:
    where = "nowhere"

    def names(self):
        return ["final_logits_bias"]  # BART's


@pytest.mark.parametrize("name", MODELS)
def test_number_of_parameters(name):
    count, values = MODELS[name]
    cls = next(cls for cls in (GPT, Encoder, EncoderDecoder) if values["model_type"] in FAMILIES[cls.__name__])
    read = FAMILIES[cls.__name__][values["model_type"]]
    conversion = read(Fields(values, str(Path(name) / "config.json")), NoTensors())
    with torch.device("meta"):
        model = cls(conversion.config)
    assert sum(parameter.numel() for parameter in model.parameters()) == count
