"""Others' weights in our models: folders of transformers, and GGUF files.

    model = GPT.from_pretrained("path/to/SmolLM2-135M")

A family is a function in `gpt2.py`, `llama.py`, `gemma.py`, `bert.py`, `t5.py` or `bart.py`, which makes our
configuration of theirs and has a table of names; `conversion.py` makes the model of both. The model is ours then:
`save_pretrained` writes our format.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from . import bart, bert, gemma, gpt2, llama, t5
from .checkpoint import SafetensorsCheckpoint
from .conversion import Checkpoint, Conversion, convert
from .fields import Fields

# By our class's name and transformers' model_type.
FAMILIES: dict[str, dict[str, Callable[[Fields, Checkpoint], Conversion]]] = {
    "GPT": {
        "gpt2": gpt2.gpt2,
        "llama": llama.llama,
        "mistral": llama.mistral,
        "qwen2": llama.qwen2,
        "qwen3": llama.qwen3,
        "gemma": gemma.gemma,
        "gemma2": gemma.gemma2,
        "gemma3_text": gemma.gemma3,
        "gemma3": gemma.gemma3_with_pictures,
    },
    "Encoder": {
        "bert": bert.bert,
        "roberta": bert.roberta,
        "xlm-roberta": bert.roberta,
        "camembert": bert.roberta,
    },
    "EncoderDecoder": {"t5": t5.t5, "bart": bart.bart, "whisper": bart.whisper},
}


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


def _reader(cls: type, fields: Fields, found: Any) -> Callable[[Fields, Checkpoint], Conversion]:
    ours = next((FAMILIES[base.__name__] for base in cls.__mro__ if base.__name__ in FAMILIES), {})
    if found in ours:
        return ours[found]
    for name, families in FAMILIES.items():
        if found in families:
            raise ValueError(f"{fields.where} describes a {found!r}, which {name}.from_pretrained reads")
    known = ", ".join(ours) or "none"
    raise ValueError(f"{fields.where} describes a {found!r}; of others' models {cls.__name__} reads: {known}")
