"""Pictures and sounds as the report shows them: data URIs, waveforms and spectrograms."""

from __future__ import annotations

import base64
import io
from pathlib import Path

import torch

from gpt4fast.data import read_audio
from gpt4fast.generation.audio import spectrogram

_MIME = {".png": "image/png", ".gif": "image/gif", ".wav": "audio/wav", ".jpg": "image/jpeg"}


def data_uri(path: Path) -> str:
    """The file as a `data:` address, so that the page needs nothing beside itself."""
    return f"data:{_MIME[path.suffix.lower()]};base64,{base64.b64encode(path.read_bytes()).decode()}"


def waveform_path(samples: torch.Tensor, columns: int = 96) -> str:
    """SVG path of the outline (loudest and lowest value in each column), in a box of `columns` × 2, zero at y = 1."""
    length = samples.numel() // columns * columns
    blocks = samples[:length].view(columns, -1) if length else samples.new_zeros(columns, 1)
    peak = samples.abs().max().clamp(min=1e-6) if samples.numel() else samples.new_ones(())
    top = (1 - blocks.amax(1) / peak * 0.96).tolist()
    bottom = (1 - blocks.amin(1) / peak * 0.96).tolist()
    # half a pixel more on both sides keeps silence visible as a line
    points = [f"{x} {y - 0.02:.3f}" for x, y in enumerate(top)]
    points += [f"{x} {y + 0.02:.3f}" for x, y in reversed(list(enumerate(bottom)))]
    return "M" + "L".join(points) + "Z"


def spectrogram_png(samples: torch.Tensor) -> bytes:
    """PNG of the log-magnitude short-time spectrum: time runs right, frequency up, 80 dB from dark to bright."""
    from matplotlib import colormaps
    from PIL import Image

    hop = max(32, samples.numel() // 192)
    padded = torch.nn.functional.pad(samples, (0, max(0, 512 - samples.numel())))
    picture = (spectrogram(padded, window=512, hop=hop) / 80 + 1).flip(0)
    colours = (colormaps["magma"](picture.numpy())[..., :3] * 255).astype("uint8")
    buffer = io.BytesIO()
    Image.fromarray(colours).resize((192, 96)).save(buffer, "PNG", optimize=True)
    return buffer.getvalue()


def clip(path: Path, label: str) -> dict[str, str | float]:
    """What one audio card needs: label, seconds, the sound, its outline and its spectrogram."""
    samples, rate = read_audio(path)
    return {
        "label": label,
        "seconds": samples.numel() / rate,
        "sound": data_uri(path),
        "outline": waveform_path(samples),
        "spectrogram": "data:image/png;base64," + base64.b64encode(spectrogram_png(samples)).decode(),
    }
