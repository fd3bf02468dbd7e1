"""Sound: files to tensors, resampling, augmentation, writing."""

from __future__ import annotations

import math
import os
import wave as wave_module
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from gpt4fast.data.splits import check_split, split_indices

_EXTENSIONS = (".wav", ".flac", ".ogg", ".aiff", ".aif", ".mp3")


def resample(wave: Tensor, from_rate: float, to_rate: float) -> Tensor:
    """Band-limited resampling along the last dimension, by cutting or padding the spectrum.

    Args:
        wave: (..., L) floating point.
        from_rate, to_rate: sample rates in hertz (only their ratio matters).

    Returns:
        (..., round(L * to_rate / from_rate)), at least one sample, the same dtype.
    """
    if from_rate <= 0 or to_rate <= 0:
        raise ValueError(f"from_rate and to_rate must be positive, got {from_rate} and {to_rate}")
    length = wave.shape[-1]
    new_length = max(1, round(length * to_rate / from_rate))
    if from_rate == to_rate or length == 0:
        return wave
    # Silence behind the end keeps the periodic transform from mixing the tail into the attack.
    padded = length + max(256, length // 8)
    if float(from_rate).is_integer() and float(to_rate).is_integer():
        # A whole number of samples at both rates, or the wave would be stretched by a fraction of one.
        padded = math.ceil(padded / (unit := from_rate // math.gcd(int(from_rate), int(to_rate)))) * int(unit)
    new_padded = round(padded * to_rate / from_rate)
    spectrum = torch.fft.rfft(wave, n=padded)
    bins = min(spectrum.shape[-1], new_padded // 2 + 1)
    return torch.fft.irfft(spectrum[..., :bins], n=new_padded)[..., :new_length] * (new_padded / padded)


def fit(wave: Tensor, samples: int, *, threshold: float = 0.02) -> Tensor:
    """One hit of a fixed length: starts at the attack, ends in a short fade, peak 0.95.

    Args:
        wave: (L,) floating point.
        samples: length of the result.
        threshold: the attack is the first sample above this share of the peak.

    Returns:
        (samples,); all zeros if `wave` is silent.
    """
    result = wave.new_zeros(samples)
    peak = wave.abs().max() if wave.numel() else wave.new_zeros(())
    if peak == 0:
        return result
    start = max(0, int((wave.abs() > threshold * peak).nonzero()[0]) - 16)
    piece = wave[start : start + samples]
    result[: piece.shape[0]] = piece / peak * 0.95
    ends = min(piece.shape[0], samples)
    fade = min(ends // 4, samples // 8)
    result[ends - fade : ends] *= 0.5 + 0.5 * torch.cos(torch.linspace(0, math.pi, fade, dtype=wave.dtype))
    return result


def read_audio(path: str | os.PathLike[str]) -> tuple[Tensor, int]:
    """Reads a sound file as mono.

    16-bit WAV needs nothing; other formats need the package soundfile.

    Returns:
        (L,) float32 in [-1, 1] and the sample rate in hertz.

    Raises:
        FileNotFoundError, ValueError: not there, or not a sound file that can be read (the message names it).
        ImportError: the format needs soundfile and it is not installed.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"path: no such sound file: {path}")
    if path.suffix.lower() == ".wav":
        try:
            with wave_module.open(str(path), "rb") as file:
                if file.getsampwidth() == 2:
                    data = torch.frombuffer(bytearray(file.readframes(file.getnframes())), dtype=torch.int16)
                    frames = data.reshape(-1, file.getnchannels()).float().mean(1) / 32768
                    return frames, file.getframerate()
        except (wave_module.Error, EOFError, ValueError, RuntimeError):
            pass  # a float, 24-bit or damaged WAV: soundfile reads it or says what is wrong
    try:
        import soundfile
    except ImportError as error:
        raise ImportError(f"{path} needs the package soundfile: pip install 'gpt4fast[audio]'") from error
    try:
        data, rate = soundfile.read(path, dtype="float32", always_2d=True)
    except soundfile.LibsndfileError as error:
        raise ValueError(f"path: {path} is not a sound file that can be read: {error}") from error
    return torch.from_numpy(data).mean(1), rate


def write_wav(path: str | os.PathLike[str], wave: Tensor, sample_rate: int = 16000) -> None:
    """Writes (L,) samples in [-1, 1] (clipped) as 16-bit mono WAV."""
    if wave.dim() != 1:
        raise ValueError(f"wave must have shape (samples,), got {tuple(wave.shape)}")
    samples = (wave.detach().float().cpu().clamp(-1, 1) * 32767).round().to(torch.int16)
    with wave_module.open(str(path), "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(sample_rate)
        file.writeframes(samples.numpy().tobytes())


def audio_folder(
    path: str | os.PathLike[str], split: str = "train", *, samples: int = 8192, sample_rate: int = 16000, seed: int = 0
) -> tuple[Tensor, list[str], int]:
    """Every sound file under a folder (recursively), mono, resampled, cut to its first `samples` after the attack.

    Returns:
        waves (N, samples) float32 with peak 0.95, the files' names relative to `path`, and `sample_rate`.

    Raises:
        FileNotFoundError: `path` is not a folder, or holds no sound file.
        ValueError: a damaged file, an unknown split, or a split that is empty (fewer than 10 files).
    """
    check_split(split)
    if samples < 1:
        raise ValueError(f"samples must be at least 1, got {samples}")
    files = list_files(path, _EXTENSIONS, "sound")
    chosen = [files[i] for i in split_indices(len(files), seed)[split].tolist()]
    if not chosen:
        raise ValueError(f"split {split!r} of path {path} is empty: {len(files)} files are too few")
    waves = []
    for file in chosen:
        wave, rate = read_audio(file)
        waves.append(fit(resample(wave, rate, sample_rate), samples))
    return torch.stack(waves), [str(file.relative_to(path)) for file in chosen], sample_rate


def list_files(path: str | os.PathLike[str], extensions: Sequence[str], kind: str) -> list[Path]:
    """Files under `path` with one of the extensions, sorted by name; FileNotFoundError where there are none."""
    folder = Path(path)
    if not folder.is_dir():
        raise FileNotFoundError(f"path: no such folder: {folder}")
    files = sorted(file for file in folder.rglob("*") if file.suffix.lower() in extensions and file.is_file())
    if not files:
        raise FileNotFoundError(f"path: no {kind} files ({', '.join(extensions)}) under {folder}")
    return files


def augment(
    waves: Tensor, *, generator: torch.Generator | None = None, gain: float = 0.3, shift: int = 64, pitch: float = 2.0
) -> Tensor:
    """New versions of few hits: each row is played faster or slower, quieter and a little later.

    Args:
        waves: (N, samples) float.
        generator: source of the random draws.
        gain: rows are scaled by a factor in [1 - gain, 1].
        shift: largest delay in samples.
        pitch: largest change of pitch, in semitones up or down.

    Returns:
        (N, samples), a new tensor; no row louder than 1.
    """
    if waves.dim() != 2:
        raise ValueError(f"waves must have shape (N, samples), got {tuple(waves.shape)}")
    if not 0 <= gain < 1 or shift < 0 or pitch < 0:
        raise ValueError(f"gain must be in [0, 1), shift and pitch at least 0; got {gain}, {shift}, {pitch}")
    n, samples = waves.shape
    draws = torch.rand(3, n, generator=generator)
    result = torch.zeros_like(waves)
    for row in range(n):
        ratio = 2 ** ((2 * draws[0, row].item() - 1) * pitch / 12)
        wave = resample(waves[row], 1.0, ratio)
        start = int(draws[1, row].item() * (shift + 1))
        piece = wave[: samples - start]
        piece = piece * (1 - gain * draws[2, row].item())
        # A band-limited wave swings a little beyond its samples, and resampling finds out.
        result[row, start : start + piece.shape[0]] = piece / piece.abs().amax().clamp(min=1)
    return result
