"""Loss curves from a training history (a list of one dict per step)."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path


def series(history: Sequence[Mapping[str, float]], name: str) -> tuple[list[int], list[float]]:
    """Steps (from 1) and values of one metric, steps without it, or where it is no finite number, left out."""
    points = [(i, row[name]) for i, row in enumerate(history, 1) if name in row and math.isfinite(row[name])]
    return [i for i, _ in points], [value for _, value in points]


def smooth(values: Sequence[float], weight: float = 0.9) -> list[float]:
    """Exponential moving average, corrected for its start (Kingma & Ba 2015), so the first value is the first point."""
    average, out = 0.0, []
    for i, value in enumerate(values, 1):
        average = weight * average + (1 - weight) * value
        out.append(average / (1 - weight**i))
    return out


def plot_losses(
    history: Sequence[Mapping[str, float]],
    path: str | os.PathLike,
    *,
    names: Sequence[str] | None = None,
    title: str = "",
) -> Path:
    """Writes one PNG (or SVG, by suffix): each metric faint, its moving average strong. `names` None takes them all."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    if not history:
        raise ValueError("history must have at least one step, was empty")
    names = list(dict.fromkeys(name for row in history for name in row)) if names is None else names
    figure = Figure(figsize=(7, 4), layout="constrained")
    FigureCanvasAgg(figure)
    axis = figure.subplots()
    for name in names:
        steps, values = series(history, name)
        dense = len(values) > 20
        (line,) = axis.plot(steps, smooth(values) if dense else values, label=name, marker=None if dense else "o")
        if dense:
            axis.plot(steps, values, color=line.get_color(), alpha=0.2, linewidth=0.8)
    axis.set(xlabel="step", title=title)
    axis.grid(alpha=0.3)
    axis.legend()
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
    return path
