"""How good are generated digits and drum hits? Measures that can fail, each with what real samples and noise reach."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gpt4fast.data.builtin import Digits, load_digits

NOT_A_DIGIT = 10


@dataclass
class DigitScore:
    """share: of images taken for a digit with more than 0.9 confidence; counts: of those per digit, (10,);
    spread: entropy of the counts over that of ten equal classes, 0 (always the same digit) to 1."""

    share: float
    counts: list[int]
    spread: float


class DigitJudge(nn.Module):
    """A small convolutional network that names a digit, or says that it is none.

    It learns the real digits, and as its eleventh class what a bad generator makes: two digits blended, halves in the
    wrong place, noise, faint blurs. So a confident answer means a digit.
    """

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv2d(1, 16, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
            nn.Conv2d(16, 32, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
            nn.Flatten(), nn.Dropout(0.3), nn.Linear(32 * 4 * 4, 11),
        )  # fmt: skip

    def forward(self, images: Tensor) -> Tensor:
        """Images (N, 1, S, S) in [-1, 1], S at least 16, to logits (N, 11)."""
        if images.dim() != 4 or images.shape[1] != 1 or images.shape[2] < 16:
            raise ValueError(f"images must be (N, 1, S, S) with S at least 16, got {tuple(images.shape)}")
        return self.layers(F.adaptive_avg_pool2d(images, 16))

    @torch.no_grad()
    def score(self, images: Tensor) -> DigitScore:
        """What share of the images are digits, and are all ten among them?"""
        self.eval()
        confidence, names = self(images).softmax(1).max(1)
        sure = (confidence > 0.9) & (names != NOT_A_DIGIT)
        counts = names[sure].bincount(minlength=10)
        shares = counts / counts.sum().clamp(min=1)
        spread = -(shares * shares.clamp(min=1e-9).log()).sum().item() / math.log(10)
        return DigitScore(sure.float().mean().item(), counts.tolist(), spread)


def spoiled_digits(images: Tensor, labels: Tensor) -> Tensor:
    """(N, 1, S, S), S even: what is like digits but none, drawn from the global random state."""
    n, size = len(images), images.shape[-1]
    order = labels.argsort()
    partners = torch.empty_like(order)
    partners[order] = order.roll(n // 2)  # of another class, unless one class has half the batch
    half, other = size // 2, images[partners]
    weight = 0.4 + 0.2 * torch.rand(n, 1, 1, 1)
    mixed = images * weight + other * (1 - weight)
    sideways = torch.cat([images[..., half:], other[..., :half]], 3)
    upside_down = torch.cat([images[:, :, half:], other[:, :, :half]], 2)
    noise = F.interpolate(torch.randn(n, 1, 8, 8), size=(size, size), mode="bicubic").clamp(-1, 1)
    blank = torch.full_like(images, -1) + 2 * torch.rand(n, 1, 1, 1) * F.avg_pool2d(images / 2 + 0.5, 9, 1, 4)
    kinds = torch.stack([mixed, sideways, upside_down, noise, blank])
    return kinds[torch.randint(len(kinds), (n,)), torch.arange(n)]


def train_digit_judge(digits: Digits | None = None, *, steps: int = 500, seed: int = 0) -> DigitJudge:
    """Trains a judge on real digits (by default the training split at 32×32) and spoiled ones; some 5 CPU seconds."""
    images, labels = load_digits("train", 32) if digits is None else digits
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        judge = DigitJudge().train()
        adam = torch.optim.Adam(judge.parameters(), lr=2e-3)
        for _ in range(steps):
            chosen = torch.randint(len(images), (64,))
            # A generator's strokes are a little softer and displaced: no reason to call them no digit.
            real = torch.roll(images[chosen], torch.randint(-2, 3, (2,)).tolist(), (2, 3))
            spoiled = spoiled_digits(images[chosen], labels[chosen])[:32]
            targets = torch.cat([labels[chosen], torch.full((32,), NOT_A_DIGIT)])
            loss = F.cross_entropy(judge(torch.cat([real, spoiled])), targets)
            adam.zero_grad()
            loss.backward()
            adam.step()
    return judge.eval()


def log_mel(waves: Tensor, sample_rate: int = 16000, *, bands: int = 40, window: int = 512, hop: int = 256) -> Tensor:
    """(N, samples) to log mel spectra (N, bands, frames), in nepers above a floor of -40 dB, which a hit masks.

    Bands are triangles on the HTK mel scale, 2595 log10(1 + f / 700), from 0 Hz to half the sample rate.
    """
    if waves.dim() != 2:
        raise ValueError(f"waves must be (N, samples), got {tuple(waves.shape)}")
    spectrum = torch.stft(waves, window, hop, window=torch.hann_window(window), return_complex=True).abs()
    top = 2595 * math.log10(1 + sample_rate / 2 / 700)
    edges = 700 * (10 ** (torch.linspace(0, top, bands + 2) / 2595) - 1)
    frequencies = torch.linspace(0, sample_rate / 2, window // 2 + 1)
    rise = (frequencies - edges[:-2, None]) / (edges[1:-1] - edges[:-2])[:, None]
    fall = (edges[2:, None] - frequencies) / (edges[2:] - edges[1:-1])[:, None]
    triangles = torch.minimum(rise, fall).clamp(min=0)
    magnitude = triangles @ spectrum / (window / 4)  # a sine of amplitude 1 has magnitude 1
    return magnitude.clamp(min=0.01).log() - math.log(0.01)


def nearest_distances(waves: Tensor, references: Tensor, sample_rate: int = 16000) -> Tensor:
    """The distance (N,) of each of `waves` (N, samples), peak brought to 1, to the nearest of `references`
    (M, samples): root mean square difference of log mel spectra, in decibels. A wave itself among the references does
    not count."""

    def features(x: Tensor) -> Tensor:
        peak = x.abs().amax(1, keepdim=True).clamp(min=1e-6)
        return log_mel(x / peak, sample_rate).flatten(1) * (20 / math.log(10))

    a, b = features(waves), features(references)
    distances = torch.cdist(a, b) / math.sqrt(a.shape[1])
    return distances.masked_fill(distances < 1e-2, math.inf).amin(1)


@dataclass
class DrumScore:
    """Mean distance in dB to the nearest real hit: of the generated hits, of each real hit to the others, and of white
    noise; spread: mean distance of a generated hit to the nearest other generated one (0: all the same)."""

    generated: float
    real: float
    noise: float
    spread: float


def score_drums(generated: Tensor, real: Tensor, sample_rate: int = 16000, *, seed: int = 0) -> DrumScore:
    """Compares generated hits (N, samples) with real ones (M, samples); see `DrumScore`."""
    noise = torch.randn(64, real.shape[1], generator=torch.Generator().manual_seed(seed))
    twins = nearest_distances(generated, generated, sample_rate)
    return DrumScore(
        nearest_distances(generated, real, sample_rate).mean().item(),
        nearest_distances(real, real, sample_rate).mean().item(),
        nearest_distances(noise, real, sample_rate).mean().item(),
        0.0 if twins.isinf().all() else twins[twins.isfinite()].mean().item(),
    )
