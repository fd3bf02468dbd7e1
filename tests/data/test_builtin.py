"""The samples that come along: sizes, ranges, licences, and splits that never share an example."""

import json

import pytest
import torch

from gpt4fast.data import load_digits, load_drums, load_shakespeare, load_tang_poems
from gpt4fast.data.builtin import SAMPLES
from gpt4fast.data.splits import SPLITS


def test_digits():
    splits = [load_digits(split) for split in SPLITS]
    images = torch.cat([digits.images for digits in splits])
    assert [len(digits.images) for digits in splits] == [1439, 179, 179]
    assert images.shape[1:] == (1, 8, 8) and images.dtype == torch.float32
    assert images.min() == -1 and images.max() == 1
    labels = torch.cat([digits.labels for digits in splits])
    # Counts per class as scikit-learn has them.
    assert labels.bincount().tolist() == [178, 182, 177, 183, 181, 182, 181, 179, 174, 180]
    # A digit's neighbours in pixel space are mostly of its class, so images and labels belong together.
    flat = images.flatten(1)
    nearest = torch.cdist(flat, flat).fill_diagonal_(9e9).argmin(1)
    assert (labels[nearest] == labels).float().mean() > 0.98


def test_digits_are_resized_with_a_margin():
    small, large = load_digits("test").images, load_digits("test", 32).images
    assert large.shape == (179, 1, 32, 32)
    assert large.min() >= -1 and large.max() <= 1
    assert (large[:, :, [0, 1, -2, -1]] < -0.5).all()
    # Ten by ten pixels, margin included, became 32 by 32: the same picture when it is shrunk again.
    shrunk = torch.nn.functional.interpolate(large, size=(10, 10), mode="area")[:, :, 1:-1, 1:-1]
    assert torch.corrcoef(torch.stack([shrunk.flatten(), small.flatten()]))[0, 1] > 0.95


def test_digits_splits_are_disjoint():
    whole = [{image.numpy().tobytes() for image in load_digits(split).images} for split in SPLITS]
    assert not whole[0] & whole[1] and not whole[0] & whole[2] and not whole[1] & whole[2]
    assert torch.equal(load_digits("test").images, load_digits("test").images)


def test_shakespeare():
    parts = {split: load_shakespeare(split) for split in SPLITS}
    assert 1.0e6 < len(parts["train"]) < 1.3e6
    assert all(len(parts[split]) > 50_000 for split in SPLITS)
    text = "".join(parts.values())
    assert text.isascii() and "\r" not in text
    for word in ("gutenberg", "copyright", "etext", "public domain"):
        assert word not in text.lower()
    assert "If music be the food of love, play on," in parts["train"]
    assert "MACBETH.\n" in parts["train"] and "MIRANDA.\n" in parts["train"]
    assert "For never was a story of more woe" in parts["test"]  # the end of Romeo and Juliet
    # No line of some length that is held out was trained on, but for a few repeated ones (songs, exits).
    trained = set(parts["train"].splitlines())
    for split in ("validation", "test"):
        lines = [line for line in parts[split].splitlines() if len(line) > 30]
        assert sum(line in trained for line in lines) < 0.01 * len(lines)


def test_tang_poems():
    parts = {split: load_tang_poems(split) for split in SPLITS}
    assert [len(part) for part in parts.values()] == [256, 32, 32]
    poems = sum(parts.values(), [])
    assert all(poem.keys() == {"title", "author", "form", "lines"} and poem["lines"] for poem in poems)
    text = "".join(line for poem in poems for line in poem["lines"])
    assert all("\u4e00" <= character <= "\u9fff" or character in "，。？！；：《》" for character in text)
    assert any(poem["title"] == "靜夜思" and poem["author"] == "李白" for poem in poems)
    whole = [{"".join(poem["lines"]) for poem in part} for part in parts.values()]
    assert not whole[0] & whole[1] and not whole[0] & whole[2] and not whole[1] & whole[2]


def test_drums():
    parts = [load_drums(split) for split in SPLITS]
    assert sum(len(part.waves) for part in parts) == 79
    names = [set(part.names) for part in parts]
    assert not names[0] & names[1] and not names[0] & names[2] and not names[1] & names[2]
    for waves, names, rate in parts:
        assert waves.shape == (len(names), 8192) and waves.dtype == torch.float32 and rate == 16000
        torch.testing.assert_close(waves.abs().amax(1), torch.full((len(waves),), 0.95), atol=0.05, rtol=0)
        assert (waves[:, 0].abs() < 0.3).all() and (waves[:, -1].abs() < 1e-3).all()  # attack at once, faded out
        assert (waves[:, :256].abs().amax(1) > 0.02).all()


def test_kicks_are_low_and_cymbals_high():
    drums = load_drums("train")
    spectrum = torch.fft.rfft(drums.waves).abs()
    frequencies = torch.linspace(0, drums.sample_rate / 2, spectrum.shape[1])
    centre = (spectrum.square() * frequencies).sum(1) / spectrum.square().sum(1)
    by_name = dict(zip(drums.names, centre.tolist(), strict=True))
    assert by_name["bd_808"] < 150 and by_name["bd_boom"] < 150
    assert by_name["drum_cymbal_closed"] > 2000 and by_name["drum_splash_hard"] > 2000


@pytest.mark.parametrize("load", [load_digits, load_shakespeare, load_tang_poems, load_drums])
def test_unknown_split(load):
    with pytest.raises(ValueError, match="split must be one of train, validation, test, got 'dev'"):
        load("dev")


def test_every_sample_file_has_a_licence_note_and_all_is_small():
    notes = (SAMPLES / "LICENSES.md").read_text(encoding="utf-8")
    files = [file for file in SAMPLES.rglob("*") if file.is_file() and file.name != "LICENSES.md"]
    assert files and sum(file.stat().st_size for file in files) < 3.5e6
    for file in files:
        assert f"## {file.relative_to(SAMPLES).parts[0]}" in notes, file
    for split in SPLITS:
        for name in load_drums(split).names:
            assert f"| {name} |" in notes
    assert json.loads((SAMPLES / "tang_poems.json").read_text(encoding="utf-8"))
