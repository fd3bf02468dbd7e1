"""Steps 1 to 3 of the demo: data, and adversarial networks for pictures and sounds."""

from __future__ import annotations

import torch

from gpt4fast.data import load_digits, load_drums, load_shakespeare
from gpt4fast.demo.run import Run, figure, save_clips
from gpt4fast.generation.images import save_image, tile

SPLITS = ("train", "validation", "test")
GRID = 64  # pictures in a grid
CLIPS = 8  # sounds side by side


def data(run: Run) -> dict:
    """Step 1: loads the three data sets, splits included, and saves some real samples to compare with."""
    digits = {split: load_digits(split, 32).images for split in SPLITS}
    drums = {split: load_drums(split) for split in SPLITS}
    text = {split: load_shakespeare(split) for split in SPLITS}
    images, hits = digits["train"], drums["train"]
    save_image(tile(images[:GRID], 8), run.folder / "data" / "digits.png", scale=2)
    chosen = torch.linspace(0, len(hits.waves) - 1, CLIPS).long().tolist()  # spread over the names: all kinds of hits
    labels = [hits.names[i].replace("_", " ") for i in chosen]
    clips = save_clips(run.folder, "data/drums", hits.waves[chosen], labels, hits.sample_rate)
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
