"""Sound from an audio generator: WAV files and spectrograms."""

from __future__ import annotations

import os
from pathlib import Path

import torch
from torch import nn

from gpt4fast.data.audio import write_wav
from gpt4fast.generation.images import run_in_eval

__all__ = ["plot_spectrograms", "sample_audio", "spectrogram", "write_wav"]


@torch.no_grad()
def sample_audio(generator: nn.Module, count: int, seed: int) -> torch.Tensor:
    """`count` sounds (count, samples) float32 in [-1, 1] on the CPU; the same seed gives the same latents."""
    if count < 1:
        raise ValueError(f"count must be at least 1, was {count}")
    latents = torch.randn(count, generator.config.latent_dim, generator=torch.Generator().manual_seed(seed))
    return run_in_eval(generator, latents).squeeze(1)


def spectrogram(waveform: torch.Tensor, window: int = 512, hop: int = 128) -> torch.Tensor:
    """Log power in dB relative to the loudest bin, at least -80, (window/2 + 1, frames); waveform (samples,)."""
    frames = torch.stft(waveform.float(), window, hop, window=torch.hann_window(window), return_complex=True)
    power = frames.abs().square()
    return (10 * (power / power.max().clamp_min(1e-20)).clamp_min(1e-8).log10()).clamp_min(-80)


def plot_spectrograms(
    waveforms: torch.Tensor, path: str | os.PathLike, sample_rate: int = 16000, columns: int = 4
) -> Path:
    """One PNG with a spectrogram of each sound (count, samples)."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    count = len(waveforms)
    columns = min(columns, count)
    rows = -(-count // columns)
    figure = Figure(figsize=(2.6 * columns, 2.0 * rows), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(rows, columns, squeeze=False, sharex=True, sharey=True).flatten()
    seconds = waveforms.shape[1] / sample_rate
    for axis, waveform in zip(axes, waveforms, strict=False):
        axis.imshow(
            spectrogram(waveform).numpy(), origin="lower", aspect="auto", cmap="magma", vmin=-80, vmax=0,
            extent=(0, seconds, 0, sample_rate / 2000),
        )  # fmt: skip
    for axis in axes[count:]:
        axis.set_axis_off()
    figure.supxlabel("seconds")
    figure.supylabel("kHz")
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
    return path
