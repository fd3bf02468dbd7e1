"""Settings that turn the Shakespeare sample into a writer of plays within minutes on two CPU cores."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import torch

from gpt4fast.data import load_shakespeare
from gpt4fast.data.tokenizer import Tokenizer
from gpt4fast.models import Encoder, EncoderConfig, EncoderDecoder, EncoderDecoderConfig
from gpt4fast.training.finetune import finetune_decoder, warm_start_decoder
from gpt4fast.training.pretrain import pretrain_encoder

Progress = Callable[[int, int, dict], None]
#: Most words are one token: few are misspelt, and a step sees more text than with fewer tokens.
VOCABULARY = 3072
ENCODER_STEPS = 700
DECODER_STEPS = 450


def encoder_config(vocab_size: int) -> EncoderConfig:
    """1.3 million parameters, 4 blocks of 128: in minutes, more steps of a small model beat fewer of a larger one.

    With biases attention finds places ("the token before") early, which the masked objectives need.
    """
    return EncoderConfig(
        vocab_size=vocab_size, max_length=256, num_layers=4, num_heads=4, embed_dim=128,
        norm="rms", positions="rotary", mlp="swiglu",
    )  # fmt: skip


def shakespeare_tokenizer(folder: str | os.PathLike) -> Tokenizer:
    """The one in `folder`/tokenizer.json; where there is none, it is trained and put there."""
    path = Path(folder) / "tokenizer.json"
    if not path.exists():
        Tokenizer.train(load_shakespeare("train"), VOCABULARY).save(path)
    return Tokenizer.load(path)


def shakespeare_encoder(
    folder: str | os.PathLike, progress: Progress | None = None, scale: float = 1.0
) -> tuple[Encoder, Tokenizer, list[dict[str, float]]]:
    """Pre-trains an encoder with checkpoints in `folder`; about 120 s of CPU time at scale 1, in proportion."""
    tokenizer = shakespeare_tokenizer(folder)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        encoder = Encoder(encoder_config(tokenizer.vocab_size))
    history = pretrain_encoder(
        encoder,
        tokenizer.encode(load_shakespeare("train")),
        tokenizer,
        folder,
        steps=max(1, round(ENCODER_STEPS * scale)),
        validation_ids=tokenizer.encode(load_shakespeare("validation")),
        progress=progress,
    )
    return encoder, tokenizer, history


def shakespeare_decoder(
    encoder: Encoder, folder: str | os.PathLike, progress: Progress | None = None, scale: float = 1.0
) -> tuple[EncoderDecoder, Tokenizer, list[dict[str, float]]]:
    """Adds a decoder to the encoder and fine-tunes both (the encoder in place); about 130 s of CPU time at scale 1."""
    tokenizer = shakespeare_tokenizer(folder)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        model = EncoderDecoder(EncoderDecoderConfig(encoder.config), encoder)
    warm_start_decoder(model)
    history = finetune_decoder(
        model,
        tokenizer.encode(load_shakespeare("train")),
        tokenizer,
        folder,
        steps=max(1, round(DECODER_STEPS * scale)),
        validation_ids=tokenizer.encode(load_shakespeare("validation")),
        progress=progress,
    )
    return model, tokenizer, history
