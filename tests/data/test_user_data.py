"""Splits, text and picture files of the user's own."""

import pytest
import torch
from PIL import Image

from gpt4fast.data import image_folder, resize, split_indices, split_text, text_file
from gpt4fast.data.splits import SPLITS


@pytest.mark.parametrize("n", [1, 9, 10, 11, 1797])
def test_split_indices_part_everything(n):
    parts = split_indices(n)
    assert tuple(parts) == SPLITS
    assert torch.equal(torch.cat(list(parts.values())).sort().values, torch.arange(n))
    assert len(parts["validation"]) == len(parts["test"]) == n // 10


def test_split_indices_depend_on_the_seed_only():
    torch.manual_seed(1)
    first = split_indices(100, 3)
    torch.manual_seed(2)
    assert all(torch.equal(first[split], split_indices(100, 3)[split]) for split in SPLITS)
    assert not torch.equal(first["test"], split_indices(100, 4)["test"])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"n": 0}, "n must be at least 1, got 0"),
        ({"n": 10, "validation": 1.0}, r"validation must be a share in \[0, 1\), got 1.0"),
        ({"n": 10, "test": -0.1}, r"test must be a share in \[0, 1\), got -0.1"),
        ({"n": 10, "validation": 0.5, "test": 0.5}, "leaves none of the 10 examples to train on"),
    ],
)
def test_split_indices_refuse(arguments, message):
    with pytest.raises(ValueError, match=message):
        split_indices(**arguments)


def test_split_text_cuts_between_paragraphs():
    paragraphs = [f"paragraph {i} has two sentences. Here is the other." for i in range(100)]
    text = "\n\n".join(paragraphs)
    parts = {split: split_text(text, split, validation=0.2, test=0.1) for split in SPLITS}
    assert "".join(parts.values()) == text
    assert parts["train"].startswith("paragraph 0") and parts["train"].endswith(".\n\n")
    assert 15 <= parts["validation"].count("paragraph") <= 25 and 5 <= parts["test"].count("paragraph") <= 12
    assert split_text("x" * 100, "test") == "x" * 5  # nowhere to cut: in the middle


def test_text_file_and_folder(tmp_path):
    (tmp_path / "b.txt").write_bytes("\ufeffzweite Datei, größer\r\nEnde".encode())
    (tmp_path / "a.txt").write_text("first file", encoding="utf-8")
    (tmp_path / "c.md").write_text("not text", encoding="utf-8")
    whole = "".join(text_file(tmp_path, split) for split in SPLITS)
    assert sorted(whole) == sorted("first file" + "zweite Datei, größer\nEnde")
    assert "".join(text_file(tmp_path / "a.txt", split) for split in SPLITS) == "first file"


def test_text_file_errors(tmp_path):
    with pytest.raises(FileNotFoundError, match="no such text file: .*none.txt"):
        text_file(tmp_path / "none.txt")
    with pytest.raises(FileNotFoundError, match="no .txt files under"):
        text_file(tmp_path)
    (tmp_path / "latin.txt").write_bytes("Größe".encode("latin-1"))
    with pytest.raises(ValueError, match="latin.txt is not UTF-8: byte 2 is 0xf6"):
        text_file(tmp_path)
    (tmp_path / "latin.txt").write_text(" \n", encoding="utf-8")
    with pytest.raises(ValueError, match="latin.txt is empty"):
        text_file(tmp_path / "latin.txt")
    (tmp_path / "latin.txt").write_text("text", encoding="utf-8")
    with pytest.raises(ValueError, match="split must be one of"):
        text_file(tmp_path, "dev")
    with pytest.raises(ValueError, match=r"test must be a share in \[0, 1\), got 2"):
        text_file(tmp_path, test=2)


@pytest.fixture
def pictures(tmp_path):
    for i in range(20):
        folder = tmp_path / ("left" if i % 2 else "right")
        folder.mkdir(exist_ok=True)
        Image.new("RGB", (40 + i, 30), (i * 10, 255 - i * 10, 7)).save(folder / f"{i:02}.png")
    (tmp_path / "notes.txt").write_text("no picture")
    return tmp_path


def test_image_folder(pictures):
    images, names = {}, {}
    for split in SPLITS:
        images[split], names[split] = image_folder(pictures, 16, split)
        for image, name in zip(images[split], names[split], strict=True):
            i = int(name[-6:-4])
            expected = torch.tensor([i * 10, 255 - i * 10, 7]) / 127.5 - 1
            torch.testing.assert_close(image, expected[:, None, None].expand(3, 16, 16))
    assert [len(images[split]) for split in SPLITS] == [16, 2, 2]
    assert len(set(sum(names.values(), []))) == 20
    grey, _ = image_folder(pictures, 16, channels=1)
    assert grey.shape == (16, 1, 16, 16)


def test_image_folder_keeps_orientation_and_centre(tmp_path):
    picture = Image.new("L", (12, 4), 0)  # a wide picture, white in the central square's top right corner
    picture.putpixel((7, 0), 255)
    for i in range(3):
        picture.save(tmp_path / f"{i}.png")
    images, _ = image_folder(tmp_path, 4, channels=1)
    expected = torch.full((1, 4, 4), -1.0)
    expected[0, 0, 3] = 1
    assert torch.equal(images[0], expected)


def test_image_folder_errors(pictures):
    with pytest.raises(FileNotFoundError, match="no such folder: .*nowhere"):
        image_folder(pictures / "nowhere", 16)
    with pytest.raises(ValueError, match="channels must be 1 or 3, got 4"):
        image_folder(pictures, 16, channels=4)
    with pytest.raises(ValueError, match="size must be at least 1, got 0"):
        image_folder(pictures, 0)
    with pytest.raises(ValueError, match="split must be one of"):
        image_folder(pictures, 16, "dev")
    for file in (pictures / "left").iterdir():
        file.write_bytes(file.read_bytes()[:40])
    with pytest.raises(ValueError, match=r"\d\d.png is not a picture that can be read"):
        image_folder(pictures, 16)
    for file in [*(pictures / "left").iterdir(), *list((pictures / "right").iterdir())[1:]]:
        file.unlink()
    with pytest.raises(ValueError, match="split 'test' of path .* is empty: 1 files are too few"):
        image_folder(pictures, 16, "test")
    next((pictures / "right").iterdir()).unlink()
    with pytest.raises(FileNotFoundError, match="no image files"):
        image_folder(pictures, 16)


def test_resize_is_smooth_and_bounded():
    step = torch.full((1, 1, 8, 8), -1.0)
    step[..., 4:] = 1
    large = resize(step, 32)
    assert large.shape == (1, 1, 32, 32) and large.abs().max() == 1
    assert (large[0, 0, 0].diff() >= 0).all()  # no ringing after the clamp
    torch.testing.assert_close(resize(large, 8), step, atol=0.3, rtol=0)
    with pytest.raises(ValueError, match="size must be at least 1, got 0"):
        resize(step, 0)
