"""What the tests of others' models share: random weights, comparison, and folders that are changed by hand."""

from __future__ import annotations

import json

import torch
from safetensors.torch import load_file, save_file


def randomized(model):
    """A model of transformers with every parameter random: it begins norms with ones and biases with zeros."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            # Small embeddings: with large ones, tied models say the last token again, whatever their layers do.
            is_embedding = any(word in name for word in ("embed_tokens", "wte", "word_embeddings"))
            small = is_embedding or name.endswith("bias")  # large biases drown what is said of a token
            scale = 0.1 if small else 0.5 if parameter.dim() < 2 else 0.3
            parameter.add_(torch.randn_like(parameter) * scale)
    return model.eval()


def close(actual, expected):
    """Within 1e-5 of the largest number in float32, 1e-10 in float64."""
    tolerance = 1e-5 if actual.dtype == torch.float32 else 1e-10
    torch.testing.assert_close(actual, expected, rtol=0, atol=tolerance * expected.abs().max().item())


def change_config(folder, **changes):
    """Fields of config.json; "drop" takes one away."""
    values = json.loads((folder / "config.json").read_text()) | changes
    (folder / "config.json").write_text(json.dumps({k: v for k, v in values.items() if v != "drop"}))


def change_weights(folder, change):
    weights = load_file(folder / "model.safetensors")
    save_file(change(weights), folder / "model.safetensors")
