"""Text files."""

from __future__ import annotations

import os
from pathlib import Path

from gpt4fast.data.splits import check_split


def split_text(text: str, split: str, *, validation: float = 0.05, test: float = 0.05, separator: str = "\n\n") -> str:
    """The first part of `text` to train on, the next for validation, the last for the test.

    The cuts fall on `separator` where the text has one near by, so that no sentence is in two splits.
    """
    check_split(split)
    for name, share in (("validation", validation), ("test", test)):
        if not 0 <= share < 1:
            raise ValueError(f"{name} must be a share in [0, 1), got {share}")
    if validation + test >= 1:
        raise ValueError(f"validation + test must be below 1, got {validation + test}")

    def cut(share: float) -> int:
        position = int(len(text) * share)
        found = text.find(separator, position)
        return found + len(separator) if found >= 0 else position

    first = cut(1 - validation - test)
    second = max(first, cut(1 - test))
    start, stop = {"train": (0, first), "validation": (first, second), "test": (second, len(text))}[split]
    return text[start:stop]


def text_file(
    path: str | os.PathLike[str], split: str = "train", *, validation: float = 0.05, test: float = 0.05
) -> str:
    """A UTF-8 text file, or every .txt file under a folder, in order of name.

    Each file is split on its own (see `split_text`), so that every split sees something of every file.

    Raises:
        FileNotFoundError: nothing there, or a folder with no .txt file.
        ValueError: not UTF-8 (the message names the file and the byte), an empty file, or an unknown split.
    """
    path = Path(path)
    if path.is_dir():
        files = sorted(path.rglob("*.txt"))
        if not files:
            raise FileNotFoundError(f"path: no .txt files under {path}")
    elif path.is_file():
        files = [path]
    else:
        raise FileNotFoundError(f"path: no such text file: {path}")
    parts = []
    for file in files:
        try:
            text = file.read_bytes().decode("utf-8-sig")
        except UnicodeDecodeError as error:
            raise ValueError(
                f"path: {file} is not UTF-8: byte {error.start} is {error.object[error.start]:#04x}"
            ) from error
        if not text.strip():
            raise ValueError(f"path: {file} is empty")
        parts.append(split_text(text.replace("\r\n", "\n"), split, validation=validation, test=test))
    return "".join(parts)
