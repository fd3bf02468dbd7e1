"""Pictures: files to tensors."""

from __future__ import annotations

import os

import torch
import torch.nn.functional as F
from torch import Tensor

from gpt4fast.data.audio import list_files
from gpt4fast.data.splits import check_split, split_indices

_EXTENSIONS = (".png", ".jpg", ".jpeg", ".bmp", ".webp", ".gif", ".tif", ".tiff")


def resize(images: Tensor, size: int) -> Tensor:
    """Smooth (bicubic) resizing of (N, C, H, W) images in [-1, 1] to (N, C, size, size), clamped to [-1, 1]."""
    if size < 1:
        raise ValueError(f"size must be at least 1, got {size}")
    shrinks = size < min(images.shape[-2:])
    resized = F.interpolate(images, size=(size, size), mode="bicubic", align_corners=False, antialias=shrinks)
    return resized.clamp(-1, 1)


def image_folder(
    path: str | os.PathLike[str], size: int, split: str = "train", *, channels: int = 3, seed: int = 0
) -> tuple[Tensor, list[str]]:
    """Every picture under a folder (recursively), cut to the central square and resized.

    Args:
        path: the folder.
        size: height and width of the result.
        split: "train", "validation" or "test" (see `split_indices`).
        channels: 3 for colour, 1 for grey.
        seed: seed of the split.

    Returns:
        images (N, channels, size, size) float32 in [-1, 1] and the files' names relative to `path`.

    Raises:
        FileNotFoundError: `path` is not a folder, or holds no picture.
        ValueError: a damaged file (named), an unknown split, or a split that is empty (fewer than 10 files).
    """
    from PIL import Image, ImageOps, UnidentifiedImageError

    check_split(split)
    if channels not in (1, 3):
        raise ValueError(f"channels must be 1 or 3, got {channels}")
    if size < 1:
        raise ValueError(f"size must be at least 1, got {size}")
    files = list_files(path, _EXTENSIONS, "image")
    chosen = [files[i] for i in split_indices(len(files), seed)[split].tolist()]
    if not chosen:
        raise ValueError(f"split {split!r} of path {path} is empty: {len(files)} files are too few")
    images = []
    for file in chosen:
        try:
            with Image.open(file) as picture:
                picture = ImageOps.exif_transpose(picture).convert("RGB" if channels == 3 else "L")
                picture = ImageOps.fit(picture, (size, size), Image.Resampling.LANCZOS)
        except (UnidentifiedImageError, OSError, SyntaxError) as error:
            raise ValueError(f"path: {file} is not a picture that can be read: {error}") from error
        pixels = torch.frombuffer(bytearray(picture.tobytes()), dtype=torch.uint8)
        images.append(pixels.reshape(size, size, channels).permute(2, 0, 1).float() / 127.5 - 1)
    return torch.stack(images), [str(file.relative_to(path)) for file in chosen]
