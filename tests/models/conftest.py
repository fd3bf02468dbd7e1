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


@pytest.fixture
def randomize():
    """Makes every parameter matter: fresh norms are ones, fresh biases zeros, fresh weights too small to tell."""

    def apply(model):
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                parameter.add_(torch.randn_like(parameter) * (0.05 if "tokens" in name else 0.2))
        return model

    return apply
