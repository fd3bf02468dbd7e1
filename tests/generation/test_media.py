"""Pictures, sound, moving pictures and plots: read back from the files and compared."""

from __future__ import annotations

import math
import wave
from types import SimpleNamespace

import pytest
import torch
from PIL import Image
from torch import nn

from gpt4fast.generation.audio import plot_spectrograms, sample_audio, spectrogram, write_wav
from gpt4fast.generation.images import sample_grid, sample_images, save_image, tile, to_pixels
from gpt4fast.generation.plots import plot_losses, series, smooth
from gpt4fast.generation.video import interpolate_latents, latent_walk


class Painter(nn.Module):
    """Paints each latent number as one flat square; batch norm would show if it ran in training mode."""

    def __init__(self, channels=1, size=4, latent_dim=3):
        super().__init__()
        self.config = SimpleNamespace(latent_dim=latent_dim)
        self.norm = nn.BatchNorm1d(latent_dim, affine=True)
        self.channels, self.size = channels, size

    def forward(self, z):
        tones = self.norm(z).mean(1).tanh()
        return tones[:, None, None, None].expand(-1, self.channels, self.size, self.size)


class Hummer(nn.Module):
    def __init__(self, samples=2048):
        super().__init__()
        self.config = SimpleNamespace(latent_dim=2)
        self.norm = nn.BatchNorm1d(2)
        self.samples = samples

    def forward(self, z):
        return (self.norm(z)[:, :1] * torch.linspace(0, 300, self.samples)).sin().unsqueeze(1) * 0.9


def pixels(path):
    image = Image.open(path)
    data = torch.tensor(list(image.tobytes()), dtype=torch.uint8)
    return data.reshape(image.height, image.width, -1).squeeze(-1)


def test_to_pixels_maps_the_range_and_clamps():
    values = torch.tensor([-1.0, 0.0, 1.0, -7.0, 7.0]).reshape(1, 1, 1, 5)
    assert to_pixels(values)[0, 0, :, 0].tolist() == [0, 128, 255, 0, 255]


def test_saved_picture_comes_back(tmp_path):
    image = torch.rand(3, 5, 7) * 2 - 1
    back = pixels(save_image(image, tmp_path / "a" / "picture.png", scale=3))
    expected = ((image + 1) * 127.5).round().permute(1, 2, 0).to(torch.uint8)
    assert back.shape == (15, 21, 3)
    for dy in range(3):
        for dx in range(3):
            assert torch.equal(back[dy::3, dx::3], expected)


def test_tile_puts_images_row_by_row():
    images = torch.arange(5.0)[:, None, None, None].expand(5, 1, 2, 3) / 10
    canvas = tile(images, columns=3, gap=1)
    assert canvas.shape == (1, 5, 11)
    for i in range(5):
        top, left = i // 3 * 3, i % 3 * 4
        assert (canvas[0, top : top + 2, left : left + 3] == images[i, 0, 0, 0]).all()
    assert (canvas[0, 2] == -1).all() and (canvas[0, 3:, 8:] == -1).all()
    assert tile(images).shape == (1, 2 * 2 + 2, 3 * 3 + 4)


def test_sample_grid(tmp_path):
    painter = Painter()
    painter.train()
    path = sample_grid(painter, 6, 11, tmp_path / "grid.png", columns=3, scale=1)
    latents = torch.randn(6, 3, generator=torch.Generator().manual_seed(11))
    painter.eval()
    expected = to_pixels(tile(painter(latents), 3)[None])[0, ..., 0]
    assert torch.equal(pixels(path), torch.from_numpy(expected))
    painter.train()
    assert torch.equal(sample_images(painter, 6, 11), sample_images(painter, 6, 11))
    assert painter.training
    assert (painter.norm.running_mean == 0).all()


def test_wav_from_a_generator_comes_back(tmp_path):
    sounds = sample_audio(Hummer(), 3, 5)
    assert sounds.shape == (3, 2048) and not torch.equal(sounds[0], sounds[1])
    write_wav(tmp_path / "hum.wav", sounds[1], 16000)
    with wave.open(str(tmp_path / "hum.wav")) as file:
        assert (file.getframerate(), file.getnchannels(), file.getsampwidth()) == (16000, 1, 2)
        data = torch.frombuffer(bytearray(file.readframes(2048)), dtype=torch.int16)
    torch.testing.assert_close(data / 32767, sounds[1], rtol=0, atol=1 / 32767)


def test_spectrogram_peaks_at_the_tone():
    tone = (2 * math.pi * 2000 * torch.arange(8192) / 16000).sin()
    power = spectrogram(tone)
    assert power.max() == 0 and power.min() == -80
    # Bin k of 512 is at k · 16000 / 512 Hz.
    assert (power[:, 5:-5].argmax(0) == 64).all()
    assert (spectrogram(torch.zeros(8192)) == -80).all()


def test_interpolation_passes_through_the_anchors_on_a_sphere():
    anchors = nn.functional.normalize(torch.randn(4, 3, 50, dtype=torch.float64), dim=-1)
    walk = interpolate_latents(anchors, 5)
    assert walk.shape == (20, 3, 50)
    torch.testing.assert_close(walk[::5], anchors)
    torch.testing.assert_close(walk.norm(dim=-1), torch.ones(20, 3, dtype=torch.float64))
    # Equal steps in angle within a leg, and the last leg leads back to the first anchor.
    closed = torch.cat([walk, walk[:1]])
    angles = (closed[1:] * closed[:-1]).sum(-1).arccos().reshape(4, 5, 3)
    torch.testing.assert_close(angles, angles[:, :1].expand(-1, 5, -1))


def test_interpolation_between_equal_anchors_stays_there():
    anchor = torch.randn(1, 8).repeat(2, 1)
    torch.testing.assert_close(interpolate_latents(anchor, 4), anchor[:1].expand(8, 8))


def test_latent_walk_writes_every_frame(tmp_path):
    painter = Painter(channels=3)
    path = latent_walk(painter, tmp_path / "walk.gif", seed=1, anchors=3, steps=4, pictures=4, scale=1)
    image = Image.open(path)
    assert image.n_frames == 12 and image.size == (10, 10) and image.info["loop"] == 0
    tones = []
    for frame in range(12):
        image.seek(frame)
        tones.append(image.convert("L").getpixel((0, 0)))
    ends = torch.randn(3, 4, 3, generator=torch.Generator().manual_seed(1))
    painter.eval()
    expected = to_pixels(painter(interpolate_latents(ends, 4)[:, 0]))[:, 0, 0, 0].tolist()
    assert tones == pytest.approx(expected, abs=3)
    assert len(set(tones)) > 6


def test_series_leaves_out_what_is_not_there():
    history = [{"a": 1.0}, {"b": 2.0}, {"a": math.nan}, {"a": 4.0}]
    assert series(history, "a") == ([1, 4], [1.0, 4.0])


def test_smooth():
    assert smooth([3.0, 3.0, 3.0]) == pytest.approx([3.0] * 3)
    assert smooth([0.0, 1.0], 0.5) == pytest.approx([0.0, 2 / 3])


def test_plots_are_pictures_with_something_in_them(tmp_path):
    history = [{"loss": 1 / (i + 1), "validation": 2.0} if i % 10 == 0 else {"loss": 1 / (i + 1)} for i in range(60)]
    curves = Image.open(plot_losses(history, tmp_path / "loss.png", title="t"))
    only = Image.open(plot_losses(history, tmp_path / "one.png", names=["loss"]))
    assert curves.size == only.size == (840, 480)
    assert len(curves.convert("RGB").getcolors(100000)) > 20 and curves.tobytes() != only.tobytes()
    assert "<svg" in plot_losses(history, tmp_path / "loss.svg").read_text()
    sounds = sample_audio(Hummer(), 5, 0)
    picture = Image.open(plot_spectrograms(sounds, tmp_path / "spectrograms.png"))
    assert len(picture.convert("RGB").getcolors(1000000)) > 100


@pytest.mark.parametrize(
    ("name", "call"),
    [
        ("count", lambda: sample_images(Painter(), 0, 0)),
        ("count", lambda: sample_audio(Hummer(), 0, 0)),
        ("images", lambda: to_pixels(torch.zeros(1, 2, 4, 4))),
        ("images", lambda: to_pixels(torch.full((1, 1, 4, 4), math.nan))),
        ("anchors", lambda: interpolate_latents(torch.zeros(1, 4), 3)),
        ("steps", lambda: interpolate_latents(torch.zeros(2, 4), 0)),
        ("history", lambda: plot_losses([], "never.png")),
    ],
)
def test_errors_name_the_argument(name, call):
    with pytest.raises(ValueError, match=name):
        call()
