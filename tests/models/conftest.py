"""Small configurations of every style, float64 so that equality means the formula and not its rounding."""

from __future__ import annotations

import pytest
import torch

from gpt4fast.models import GPTConfig

SIZES = {"vocab_size": 61, "max_length": 32, "num_layers": 3, "num_heads": 4, "embed_dim": 32}
STYLES = {
    "gpt2": GPTConfig.gpt2(**SIZES),
    "llama": GPTConfig.llama(**SIZES, num_kv_heads=2),
    "one_kv_head": GPTConfig(**SIZES, num_kv_heads=1, positions="rotary", bias=False),
    "rms_learned": GPTConfig(**SIZES, norm="rms", mlp="swiglu", mlp_dim=40, tie_embeddings=False),
}
# Styles of others' models: their formulas are tested against transformers (test_convert_*.py).
OTHERS = {
    "gemma": GPTConfig(
        **SIZES, num_kv_heads=2, head_dim=12, norm="rms", norm_placement="sandwich", positions="rotary",
        mlp="geglu_tanh", mlp_dim=40, bias=False, qkv_bias=True, qk_norm=True, embedding_scale=3.0,
        attention_softcap=2.0, logit_softcap=9.0, windows=(4, 0, 4), window_rotary_base=100.0,
    ),
    "bert": GPTConfig(**SIZES, norm_placement="post", embedding_norm=True, head_bias=True, mlp="relu"),
    "t5": GPTConfig(**SIZES, head_dim=6, positions="relative", norm="rms", relative_buckets=8, relative_max_distance=9),
    "stretched": GPTConfig(**SIZES, positions="rotary", rotary_frequencies=(0.9, 0.3, 0.01), mlp="geglu"),
}  # fmt: skip


@pytest.fixture(autouse=True)
def seeded_on_one_thread():
    """Tiny tensors on several threads are slower than on one, by far where other processes want the cores too."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(params=STYLES, ids=list(STYLES))
def style(request) -> GPTConfig:
    return STYLES[request.param]


@pytest.fixture(params=STYLES | OTHERS, ids=list(STYLES | OTHERS))
def any_style(request) -> GPTConfig:
    return (STYLES | OTHERS)[request.param]


@pytest.fixture
def randomize():
    """Makes every parameter matter: fresh norms are ones, fresh biases zeros, fresh weights too small to tell."""

    def apply(model):
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                parameter.add_(torch.randn_like(parameter) * (0.05 if "tokens" in name else 0.2))
        return model

    return apply
