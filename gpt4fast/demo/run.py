"""What the steps of the demo share: the run, and the pieces that a report is made of, as plain JSON values."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from gpt4fast.data import write_wav
from gpt4fast.demo.bars import Callback
from gpt4fast.generation.plots import series


@dataclass(frozen=True)
class Run:
    """What a step gets: where it works, how long (1 is the full demo), the seed, and progress bars."""

    folder: Path
    scale: float
    seed: int
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


def save_clips(folder: Path, where: str, waves: torch.Tensor, labels: list[str], rate: int) -> list[dict[str, str]]:
    (folder / where).mkdir(parents=True, exist_ok=True)
    clips = []
    for i, (wave, label) in enumerate(zip(waves, labels, strict=True)):
        write_wav(folder / where / f"{i:02d}.wav", wave, rate)
        clips.append({"path": f"{where}/{i:02d}.wav", "label": label})
    return clips


def curve(
    name: str,
    history: list[dict[str, float]],
    metrics: dict[str, str],
    label: str,
    caption: str,
    y_label: str,
    reference: tuple[float, str] | None = None,
) -> dict:
    """A chart of a training history: metrics {name in the history: name in the legend}, at most 500 points each."""
    lines = {}
    for metric, legend in metrics.items():
        x, y = series(history, metric)
        stride = -(-len(x) // 500) or 1
        lines[legend] = [x[::stride], [round(value, 5) for value in y[::stride]]]
    return {
        "name": name, "series": lines, "label": label, "caption": caption, "x_label": "training step",
        "y_label": y_label, "reference": reference,
    }  # fmt: skip
