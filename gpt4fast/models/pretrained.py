"""Saving a model to a folder and loading it back: weights in safetensors, configuration in JSON.

    folder/config.json         {"model_type": "gpt", "format_version": 1, ...the fields of the configuration}
    folder/model.safetensors   every tensor of the state dict once; a tied weight under the first of its names

Each file is written under a temporary name and renamed, so an interrupted save leaves the old one whole. Loading is
strict: a wrong class, an unknown field, a missing, unexpected or mis-shaped tensor each raise an error that names it.
Dtypes come back as saved.
"""

from __future__ import annotations

import dataclasses
import json
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar, get_args, get_type_hints

import torch
from torch import Tensor

FORMAT_VERSION = 1
CONFIG_FILE = "config.json"
WEIGHTS_FILE = "model.safetensors"


def later(default: Any) -> Any:
    """A field that a configuration got after models had been saved: where theirs lack it, it has its default."""
    return dataclasses.field(default=default, metadata={"later": True})


class Pretrained:
    """Mixin of a torch.nn.Module that is built as `Class(config)` and keeps it as `.config`."""

    model_type: ClassVar[str]
    config_class: ClassVar[type]

    def save_pretrained(self, folder: str | os.PathLike) -> None:
        """Writes config.json and model.safetensors into folder, which is made where it is missing."""
        from safetensors.torch import save_file

        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        header = {"model_type": self.model_type, "format_version": FORMAT_VERSION}
        text = json.dumps(header | dataclasses.asdict(self.config), indent=2) + "\n"
        weights = {name: tensor.detach().cpu().contiguous() for name, tensor in distinct_tensors(self).items()}
        _replace_file(folder / WEIGHTS_FILE, lambda path: save_file(weights, path, metadata={"format": "pt"}))
        _replace_file(folder / CONFIG_FILE, lambda path: path.write_text(text, encoding="utf-8"))

    @classmethod
    def from_pretrained(cls, folder: str | os.PathLike, *, dtype: torch.dtype | None = None) -> Any:
        """The model in folder, on the CPU and in evaluation mode: what `save_pretrained` wrote, or another's weights.

        Others' are a folder of transformers (config.json, safetensors), and for `GPT` a GGUF file, whose quantised
        blocks become numbers (`pip install gpt4fast[hf]`). Logits are transformers'. What is read:

        - `GPT`: gpt2, llama (SmolLM, TinyLlama and more), mistral, qwen2, qwen3, gemma, gemma2, gemma3;
        - `Encoder`: bert (MiniLM, BGE, E5), roberta, xlm-roberta, camembert;
        - `EncoderDecoder`: t5 (Flan-T5), bart, whisper.

        Args:
            dtype: of the weights; as saved where it is None (a GGUF file: in its embedding's, quantised in float32).

        Raises:
            FileNotFoundError: a file is missing.
            ValueError: another class or format, an unknown or missing field, tensors that do not fit the configuration,
                or a field of another's configuration that would change the result and that we do not honour.
        """
        if dtype is not None and not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
            raise ValueError(f"dtype must be a floating-point torch.dtype or None, got {dtype!r}")
        folder = Path(folder)
        if folder.suffix == ".gguf":
            from .convert import load_gguf

            return load_gguf(cls, folder, dtype)
        values = cls._read_json(folder)
        if "format_version" not in values and values.get("model_type") not in (None, cls.model_type):
            from .convert import load_folder

            return load_folder(cls, folder, values, dtype)
        model = cls._load_own(folder, values)
        return model if dtype is None else model.to(dtype)

    @classmethod
    def _load_own(cls, folder: Path, values: dict[str, Any]) -> Any:
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        config = cls._check_config(folder / CONFIG_FILE, values)
        if not (folder / WEIGHTS_FILE).is_file():
            raise _missing(folder / WEIGHTS_FILE, cls)
        # The initial values are thrown away: they must not move the caller's generator.
        with torch.random.fork_rng(devices=[]):
            model = cls(config)
        try:
            weights = load_file(folder / WEIGHTS_FILE)
        except SafetensorError as error:
            raise ValueError(f"{folder / WEIGHTS_FILE} is not a whole safetensors file: {error}") from error
        _fill(model, weights, folder / WEIGHTS_FILE)
        return model.eval()

    @classmethod
    def _read_json(cls, folder: Path) -> dict[str, Any]:
        path = folder / CONFIG_FILE
        if not path.is_file():
            raise _missing(path, cls)
        try:
            values = json.loads(path.read_text(encoding="utf-8"))
        except ValueError as error:
            raise ValueError(f"{path} is not JSON: {error}") from error
        if not isinstance(values, dict):
            raise ValueError(f"{path} must hold one JSON object, got {type(values).__name__}")
        return values

    @classmethod
    def _check_config(cls, path: Path, values: dict[str, Any]) -> Any:
        values = dict(values)
        found = values.pop("model_type", None)
        if found != cls.model_type:
            raise ValueError(f"{path} describes a model of type {found!r}; {cls.__name__} is {cls.model_type!r}")
        version = values.pop("format_version", None)
        if version != FORMAT_VERSION:
            raise ValueError(f"{path} has format_version {version!r}; this gpt4fast reads {FORMAT_VERSION}")
        return _config_from_dict(cls.config_class, values, str(path))


def _missing(path: Path, cls: type) -> FileNotFoundError:
    return FileNotFoundError(f"{path} does not exist; {cls.__name__}.save_pretrained(folder) writes it")


def _config_from_dict(config_class: type, values: dict[str, Any], where: str) -> Any:
    types = get_type_hints(config_class)
    known = {field.name for field in dataclasses.fields(config_class)}
    if unknown := sorted(set(values) - known):
        raise ValueError(f"{where}: {config_class.__name__} has no field {', '.join(unknown)}")
    required = {field.name for field in dataclasses.fields(config_class) if "later" not in field.metadata}
    if missing := sorted(required - set(values)):
        raise ValueError(f"{where}: the field {', '.join(missing)} of {config_class.__name__} is missing")
    arguments = {}
    for name, value in values.items():
        nested = [kind for kind in (types[name], *get_args(types[name])) if dataclasses.is_dataclass(kind)]
        if nested and isinstance(value, dict):
            value = _config_from_dict(nested[0], value, f"{where}, {name}")
        elif isinstance(value, list):
            value = tuple(value)  # JSON has no tuples; no configuration holds a list
        arguments[name] = value
    return config_class(**arguments)


def distinct_tensors(model: Any) -> dict[str, Tensor]:
    """The state dict with each tensor once: a tied weight goes by the first of its names."""
    first: dict[int, str] = {}
    state = model.state_dict(keep_vars=True)  # the parameters themselves, so that tied ones are the same object
    return {name: tensor for name, tensor in state.items() if first.setdefault(id(tensor), name) == name}


def _fill(model: Any, weights: dict[str, Tensor], path: Path) -> None:
    state = distinct_tensors(model)
    problems = [f"missing {name}" for name in state if name not in weights]
    problems += [f"unexpected {name}" for name in weights if name not in state]
    problems += [
        f"{name} is {tuple(weights[name].shape)} instead of {tuple(tensor.shape)}"
        for name, tensor in state.items()
        if name in weights and weights[name].shape != tensor.shape
    ]
    raise_problems(str(path), problems)
    for name, tensor in state.items():
        tensor.data = weights[name]  # takes the saved dtype too, and reaches every name of a tied weight


def raise_problems(where: str, problems: list[str]) -> None:
    if problems:
        more = f" and {len(problems) - 8} more" if len(problems) > 8 else ""
        raise ValueError(f"{where} does not fit its config.json: {'; '.join(problems[:8])}{more}")


def _replace_file(path: Path, write: Callable[[Path], Any]) -> None:
    """Runs write on a temporary file beside path, then renames it to path."""
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    os.close(handle)
    try:
        write(Path(temporary))
        os.chmod(temporary, 0o644)  # mkstemp gives 0600, which no one else could read
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise
