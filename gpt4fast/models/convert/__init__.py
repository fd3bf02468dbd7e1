"""Others' weights in our models: folders of transformers, and GGUF files.

    model = GPT.from_pretrained("path/to/SmolLM2-135M")

One file a model: `gpt.py`, `encoder.py`, `encoder_decoder.py` have a reader for each family, which makes our
configuration of theirs and a table of names; `conversion.py` makes the model of both. The weights that come out are
ours: `save_pretrained` writes our format.
"""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import torch

from .checkpoint import SafetensorsCheckpoint
from .conversion import convert
from .fields import Fields

# Our models by their model_type: the class, and the module with its families.
_MODULES = {
    "gpt": ("GPT", ".gpt"),
    "encoder": ("Encoder", ".encoder"),
    "encoder_decoder": ("EncoderDecoder", ".encoder_decoder"),
}


def families(model_type: str) -> dict[str, Any]:
    """The readers of foreign model types, for one of ours."""
    if model_type not in _MODULES:
        return {}
    return importlib.import_module(_MODULES[model_type][1], __name__).FAMILIES


def load_folder(cls: type, folder: Path, values: dict[str, Any], dtype: torch.dtype | None) -> Any:
    """The model of a folder whose config.json holds `values`, which are transformers'."""
    fields = Fields(values, str(folder / "config.json"))
    read = _reader(cls, fields, values.get("model_type"))
    fields.only(quantization_config=None)
    checkpoint = SafetensorsCheckpoint(folder)
    return convert(cls, read(fields, checkpoint), checkpoint, dtype)


def load_gguf(cls: type, path: Path, dtype: torch.dtype | None) -> Any:
    """The model of a GGUF file; where dtype is None, in the embedding's, float32 if that is quantised."""
    from .gguf_models import GGUFCheckpoint

    checkpoint = GGUFCheckpoint(path)
    fields = Fields(checkpoint.fields, str(path))
    read = _reader(cls, fields, fields.values["model_type"])
    return convert(cls, read(fields, checkpoint), checkpoint, dtype or checkpoint.dtype)


def _reader(cls: type, fields: Fields, found: Any) -> Any:
    ours = families(cls.model_type)
    if found in ours:
        return ours[found]
    for other, (name, _) in _MODULES.items():
        if found in families(other):
            raise ValueError(f"{fields.where} describes a {found!r}, which {name}.from_pretrained reads")
    known = ", ".join(ours) or "none"
    raise ValueError(f"{fields.where} describes a {found!r}; of others' models {cls.__name__} reads: {known}")
