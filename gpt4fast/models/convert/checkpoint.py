"""The tensors of a transformers folder: model.safetensors, or the shards that model.safetensors.index.json lists.

Files are mapped into memory, not read: a tensor is in memory once, when it is asked for.
"""

from __future__ import annotations

import json
from pathlib import Path

from torch import Tensor

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"


class SafetensorsCheckpoint:
    """Names and tensors of a folder; `where` names it in messages."""

    def __init__(self, folder: Path):
        from safetensors import SafetensorError, safe_open

        self.where = str(folder)
        self._files = {}
        for path in _weight_files(folder):
            try:
                file = safe_open(path, framework="pt")
            except SafetensorError as error:
                raise ValueError(f"{path} is not a whole safetensors file: {error}") from error
            self._files |= dict.fromkeys(file.keys(), file)

    def names(self) -> list[str]:
        return list(self._files)

    def read(self, name: str) -> Tensor:
        return self._files[name].get_tensor(name)


def _weight_files(folder: Path) -> list[Path]:
    if (folder / WEIGHTS).is_file():
        return [folder / WEIGHTS]
    if not (folder / INDEX).is_file():
        pickles = sorted(folder.glob("*.bin")) + sorted(folder.glob("*.pt*"))
        if pickles:
            raise ValueError(
                f"{pickles[0]} is a pickle, which could run any code; save the model as safetensors first, "
                "by from_pretrained and save_pretrained of transformers' class for it"
            )
        raise FileNotFoundError(f"{folder} has neither {WEIGHTS} nor {INDEX}")
    try:
        names = set(json.loads((folder / INDEX).read_text(encoding="utf-8"))["weight_map"].values())
    except (ValueError, KeyError, AttributeError, TypeError) as error:
        raise ValueError(f"{folder / INDEX} has no weight_map of file names: {error!r}") from error
    for name in names:
        if not isinstance(name, str) or Path(name).name != name:
            raise ValueError(f"{folder / INDEX} names {name!r}, which is not a file of this folder")
        if not (folder / name).is_file():
            raise FileNotFoundError(f"{folder / name}, which {INDEX} lists, does not exist")
    return [folder / name for name in sorted(names)]
