"""What is saved comes back bit by bit; what does not fit is refused by name."""

from __future__ import annotations

import dataclasses
import json
import os

import pytest
import torch
from safetensors.torch import load_file, save_file

from gpt4fast.models import (
    GPT,
    DCGANConfig,
    DCGANDiscriminator,
    DCGANGenerator,
    Encoder,
    EncoderConfig,
    EncoderDecoder,
    EncoderDecoderConfig,
    GPTConfig,
    WaveGANConfig,
    WaveGANDiscriminator,
    WaveGANGenerator,
)
from gpt4fast.models.pretrained import Pretrained

SMALL = {"vocab_size": 61, "max_length": 8, "num_layers": 1, "num_heads": 2, "embed_dim": 16}
IMAGES, WAVES = DCGANConfig(image_size=8, base_channels=4), WaveGANConfig(samples=128, base_channels=4)
MODELS = {
    "gpt tied": lambda: GPT(GPTConfig.gpt2(**SMALL)),
    "gpt untied": lambda: GPT(GPTConfig.llama(**SMALL)),
    "encoder": lambda: Encoder(EncoderConfig(**SMALL)),
    "encoder_decoder shared": lambda: EncoderDecoder(EncoderDecoderConfig(EncoderConfig(**SMALL))),
    "encoder_decoder apart": lambda: EncoderDecoder(
        EncoderDecoderConfig(EncoderConfig(**SMALL), GPTConfig.llama(**SMALL), share_embeddings=False)
    ),
    "dcgan generator": lambda: DCGANGenerator(IMAGES),
    "dcgan discriminator": lambda: DCGANDiscriminator(IMAGES),
    "wavegan generator": lambda: WaveGANGenerator(WAVES),
    "wavegan discriminator": lambda: WaveGANDiscriminator(WAVES),
}


def same_tensors(one, other):
    mine, theirs = one.state_dict(), other.state_dict()
    return list(mine) == list(theirs) and all(
        mine[name].dtype == theirs[name].dtype and torch.equal(mine[name], theirs[name]) for name in mine
    )


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_roundtrip_is_bitwise(tmp_path, name, dtype):
    model = MODELS[name]().to(dtype)
    if "generator" in name:  # moves batch norm's running statistics away from their initial values
        model(torch.randn(4, 100, dtype=dtype))
    model.save_pretrained(tmp_path / "folder")
    before = torch.get_rng_state()
    loaded = type(model).from_pretrained(tmp_path / "folder")
    assert torch.equal(torch.get_rng_state(), before)  # loading draws nothing from the caller's generator
    assert type(loaded) is type(model) and loaded.config == model.config
    assert not any(module.training for module in loaded.modules())
    assert same_tensors(model, loaded)
    assert len(list(loaded.parameters())) == len(list(model.parameters()))  # what was one parameter is one again
    assert sorted(os.listdir(tmp_path / "folder")) == ["config.json", "model.safetensors"]


def test_tied_weights_are_stored_once_and_tied_again(tmp_path):
    model = MODELS["encoder_decoder shared"]()
    model.save_pretrained(tmp_path)
    stored = load_file(tmp_path / "model.safetensors")
    assert [name for name, tensor in stored.items() if tensor.shape == (61, 16)] == ["decoder.tokens.weight"]
    loaded = EncoderDecoder.from_pretrained(tmp_path)
    embedding = loaded.decoder.tokens.weight
    assert loaded.encoder.stack.tokens.weight is embedding and loaded.head.weight is embedding
    ids = torch.randint(61, (2, 5))
    assert torch.equal(loaded(ids, ids).logits, model(ids, ids).logits)
    loaded(ids, ids, ids).loss.backward()
    assert embedding.grad.abs().max() > 0


def test_an_interrupted_save_leaves_the_old_files(tmp_path, monkeypatch):
    model = MODELS["gpt tied"]()
    model.save_pretrained(tmp_path)
    old = {name: (tmp_path / name).read_bytes() for name in os.listdir(tmp_path)}

    def interrupt(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "replace", interrupt)
    with pytest.raises(KeyboardInterrupt):
        MODELS["gpt untied"]().save_pretrained(tmp_path)
    assert {name: (tmp_path / name).read_bytes() for name in os.listdir(tmp_path)} == old


def change_config(folder, **changes):
    values = json.loads((folder / "config.json").read_text())
    values.update(changes)
    (folder / "config.json").write_text(json.dumps({k: v for k, v in values.items() if v != "drop"}))


def change_weights(folder, **changes):
    weights = load_file(folder / "model.safetensors")
    for name, tensor in changes.items():
        name = name.replace("__", ".")
        weights.pop(name, None)
        if tensor is not None:
            weights[name] = tensor
    save_file(weights, folder / "model.safetensors")


@pytest.mark.parametrize(
    "spoil, error, message",
    [
        (lambda f: os.unlink(f / "config.json"), FileNotFoundError, "config.json does not exist; GPT.save_pretrained"),
        (lambda f: os.unlink(f / "model.safetensors"), FileNotFoundError, "model.safetensors does not exist"),
        (lambda f: (f / "config.json").write_text("{"), ValueError, "config.json is not JSON"),
        (lambda f: (f / "config.json").write_text("[]"), ValueError, "must hold one JSON object, got list"),
        (lambda f: change_config(f, model_type="encoder"), ValueError, "a model of type 'encoder'; GPT is 'gpt'"),
        (lambda f: change_config(f, model_type="drop"), ValueError, "a model of type None; GPT is 'gpt'"),
        (lambda f: change_config(f, format_version=2), ValueError, "format_version 2; this gpt4fast reads 1"),
        (lambda f: change_config(f, colour="red"), ValueError, "GPTConfig has no field colour"),
        (lambda f: change_config(f, num_heads="drop"), ValueError, "the field num_heads of GPTConfig is missing"),
        (lambda f: change_config(f, num_heads=3), ValueError, "must be a multiple of num_kv_heads"),
        (lambda f: change_config(f, mlp_dim=65), ValueError, r"mlp.up.weight is \(64, 16\) instead of \(65, 16\)"),
        (lambda f: change_weights(f, stack__norm__weight=None), ValueError, "missing stack.norm.weight"),
        (lambda f: change_weights(f, extra=torch.zeros(1)), ValueError, "unexpected extra"),
        (lambda f: (f / "model.safetensors").write_bytes(b"\0" * 20), ValueError, "not a whole safetensors file"),
        (
            lambda f: os.truncate(f / "model.safetensors", os.path.getsize(f / "model.safetensors") - 8),
            ValueError,
            "not a whole safetensors file",
        ),
    ],
)
def test_what_does_not_fit_is_named(tmp_path, spoil, error, message):
    MODELS["gpt tied"]().save_pretrained(tmp_path)
    spoil(tmp_path)
    with pytest.raises(error, match=message):
        GPT.from_pretrained(tmp_path)


def test_folders_from_before_a_field_was_there(tmp_path):
    """What `later` marks may be missing, and is then what models did before."""
    model = MODELS["gpt untied"]()
    model.save_pretrained(tmp_path)
    added = [field.name for field in dataclasses.fields(GPTConfig) if "later" in field.metadata]
    assert {"head_dim", "norm_placement", "windows", "logit_softcap"} <= set(added)
    change_config(tmp_path, **dict.fromkeys(added, "drop"))
    loaded = GPT.from_pretrained(tmp_path)
    assert loaded.config == model.config and same_tensors(loaded, model)


def test_dtype_converts(tmp_path):
    model = MODELS["gpt tied"]()
    model.save_pretrained(tmp_path)
    assert same_tensors(GPT.from_pretrained(tmp_path, dtype=torch.bfloat16), model.bfloat16())
    with pytest.raises(ValueError, match="dtype must be a floating-point torch.dtype or None, got torch.int32"):
        GPT.from_pretrained(tmp_path, dtype=torch.int32)


def test_nested_configurations_name_their_place(tmp_path):
    MODELS["encoder_decoder shared"]().save_pretrained(tmp_path)
    change_config(tmp_path, encoder={"colour": "red"})
    with pytest.raises(ValueError, match="config.json, encoder: EncoderConfig has no field colour"):
        EncoderDecoder.from_pretrained(tmp_path)


def test_a_shared_name_is_not_another_model(tmp_path):
    MODELS["dcgan generator"]().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="'dcgan_generator'; DCGANDiscriminator is 'dcgan_discriminator'"):
        DCGANDiscriminator.from_pretrained(tmp_path)
    types = [type(make()).model_type for make in MODELS.values()]
    assert len(set(types)) == 7 and all(issubclass(type(make()), Pretrained) for make in MODELS.values())
