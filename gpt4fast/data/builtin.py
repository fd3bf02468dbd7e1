"""The small real data sets that the package carries (`samples/`, licences in `samples/LICENSES.md`)."""

from __future__ import annotations

import json
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from gpt4fast.data.images import resize
from gpt4fast.data.splits import check_split, split_indices
from gpt4fast.data.text import text_file

SAMPLES = Path(__file__).parent / "samples"


class Digits(NamedTuple):
    """images (N, 1, size, size) float32 in [-1, 1], ink is 1; labels (N,) int64 in 0..9."""

    images: Tensor
    labels: Tensor


class Drums(NamedTuple):
    """waves (N, samples) float32 with peak 0.95; the N hits' names; the sample rate in hertz."""

    waves: Tensor
    names: list[str]
    sample_rate: int


def load_digits(split: str = "train", size: int = 8) -> Digits:
    """1,797 handwritten digits of 8×8 pixels (UCI, through scikit-learn).

    Other sizes than 8 are resized smoothly, with a margin: in 8×8 pixels many digits touch the edge.
    """
    import numpy

    check_split(split)
    with numpy.load(SAMPLES / "digits.npz", allow_pickle=False) as file:
        images, labels = torch.from_numpy(file["images"]), torch.from_numpy(file["labels"])
    chosen = split_indices(len(images))[split]
    images = images[chosen].unsqueeze(1).float() / 8 - 1
    if size != 8:
        images = resize(F.pad(images, (1, 1, 1, 1), value=-1), size)
    return Digits(images, labels[chosen].long())


def load_shakespeare(split: str = "train") -> str:
    """Ten plays of Shakespeare (about 1.1 million characters, ASCII); held out is the end of every play."""
    return text_file(SAMPLES / "shakespeare", split)


def load_tang_poems(split: str = "train") -> list[dict]:
    """The anthology "Three Hundred Tang Poems": 320 entries of title, author, form and lines (traditional script)."""
    check_split(split)
    poems = json.loads((SAMPLES / "tang_poems.json").read_text(encoding="utf-8"))
    return [poems[i] for i in split_indices(len(poems))[split].tolist()]


def load_drums(split: str = "train") -> Drums:
    """Drum one-shots of 8,192 samples (0.5 s at 16 kHz): kicks, snares, toms, cymbals, tabla, percussion."""
    import numpy

    check_split(split)
    with numpy.load(SAMPLES / "drums.npz", allow_pickle=False) as file:
        waves, names, rate = torch.from_numpy(file["waves"]), file["names"].tolist(), int(file["sample_rate"])
    chosen = split_indices(len(waves))[split]
    return Drums(waves[chosen].float() / 32767, [names[i] for i in chosen.tolist()], rate)
