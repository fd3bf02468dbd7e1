"""The six steps of the demo. Each takes the run and returns what the report shows of it, as plain JSON values."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from gpt4fast.data import load_digits, load_drums, load_shakespeare, write_wav
from gpt4fast.demo.bars import Callback
from gpt4fast.demo.state import State
from gpt4fast.generation.images import save_image, tile

SPLITS = ("train", "validation", "test")
GRID = 64  # pictures in a grid
CLIPS = 8  # sounds side by side


@dataclass(frozen=True)
class Run:
    """What a step gets: where it works, how long (1 is the full demo), its seed, earlier results, and progress bars."""

    folder: Path
    scale: float
    seed: int
    state: State
    track: Callable[[str], Callback]

    @property
    def timing(self) -> float:
        """Seconds for one timed pair."""
        return max(0.05, 2.5 * min(1.0, self.scale))


def fact(label: str, value: str, unit: str = "", note: str = "") -> dict[str, str]:
    """One figure of the report with its name, unit and explanation."""
    return {"label": label, "value": value, "unit": unit, "note": note}


def figure(path: str, label: str, caption: str) -> dict[str, str]:
    """One picture of the report; `path` is relative to the run's folder."""
    return {"path": path, "label": label, "caption": caption}


def _save_clips(folder: Path, where: str, waves: torch.Tensor, labels: list[str], rate: int) -> list[dict[str, str]]:
    (folder / where).mkdir(parents=True, exist_ok=True)
    clips = []
    for i, (wave, label) in enumerate(zip(waves, labels, strict=True)):
        write_wav(folder / where / f"{i:02d}.wav", wave, rate)
        clips.append({"path": f"{where}/{i:02d}.wav", "label": label})
    return clips


def data(run: Run) -> dict:
    """Step 1: loads the three data sets, splits included, and saves some real samples to compare with."""
    digits = {split: load_digits(split, 32).images for split in SPLITS}
    drums = {split: load_drums(split) for split in SPLITS}
    text = {split: load_shakespeare(split) for split in SPLITS}
    images, hits = digits["train"], drums["train"]
    save_image(tile(images[:GRID], 8), run.folder / "data" / "digits.png", scale=2)
    chosen = torch.linspace(0, len(hits.waves) - 1, CLIPS).long().tolist()  # spread over the names: all kinds of hits
    labels = [hits.names[i].replace("_", " ") for i in chosen]
    clips = _save_clips(run.folder, "data/drums", hits.waves[chosen], labels, hits.sample_rate)
    samples = hits.waves.shape[1]

    def counts(parts: dict) -> dict[str, str]:
        return {split: f"{len(part):,}" for split, part in parts.items()}

    table = [
        {
            "name": "Digits",
            "shape": f"{images.shape[2]}×{images.shape[3]} grey pixels, enlarged from 8×8",
            "source": "Handwritten digits of the UCI repository, as scikit-learn carries them",
            "licence": "CC BY 4.0, E. Alpaydin and C. Kaynak 1998",
            "splits": counts(digits),
        },
        {
            "name": "Drums",
            "shape": f"{samples:,} samples, {samples / hits.sample_rate:.2f} s at {hits.sample_rate // 1000} kHz",
            "source": "Drum hits from Sonic Pi's collection",
            "licence": "CC0 1.0, by freesound.org's contributors",
            "splits": counts({split: part.waves for split, part in drums.items()}),
        },
        {
            "name": "Plays",
            "shape": "characters",
            "source": "Ten plays of William Shakespeare; held out is the end of every play",
            "licence": "public domain",
            "splits": counts(text),
        },
    ]
    opening = text["validation"].strip()[:600]
    return {
        "table": table,
        "grid": figure("data/digits.png", "Real digits", "From the training split."),
        "clips": clips,
        "excerpt": opening[: opening.rfind("\n")],
        "nyquist": f"{hits.sample_rate // 2:,}",
    }
