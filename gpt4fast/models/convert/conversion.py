"""How another's tensors become one of our models: which of theirs each of ours is made of, and what changes on the way.

What a weight can say needs no switch in the model. A factor of the scores is multiplied into the queries' weights, the
one of Gemma's `1 + weight` is added, a matrix that is stored transposed is turned, and queries, keys and values become
one matrix.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from ..pretrained import distinct_tensors, raise_problems
from .fields import Fields


class Checkpoint(Protocol):
    """Where another's tensors are: a folder of transformers, or a GGUF file."""

    where: str

    def names(self) -> list[str]: ...

    def read(self, name: str) -> Tensor: ...


@dataclass
class Conversion:
    """What a family's reader makes of a foreign configuration."""

    config: Any  # ours
    # Our module: theirs, several one after another where ours holds their rows together; or, with its last name, our
    # tensor: theirs. * is the number of a layer.
    modules: dict[str, str]
    change: Callable[[str, Tensor], Tensor] = lambda name, tensor: tensor  # theirs by name, as it should be in ours
    prefix: str = ""  # of their names, which is missing where only the base model was saved
    ignored: str = r"$."  # a pattern of their names that say nothing the model needs; by default of none
    unbiased: tuple[str, ...] = ()  # endings of their modules that have no bias where ours have one: it is zero


def convert(cls: type, conversion: Conversion, checkpoint: Checkpoint, dtype: torch.dtype | None) -> Any:
    """The model, tensor by tensor: beside it, no more than one of theirs is in memory."""
    names = {_modern(name).removeprefix(conversion.prefix): name for name in checkpoint.names()}
    try:
        with torch.device("meta"):
            model = cls(conversion.config)
    except RuntimeError as error:  # sizes whose product is no number of elements
        raise ValueError(f"{checkpoint.where}: its configuration makes no model: {error}") from error
    used = {source for name in model.state_dict() for source in _sources(conversion, name)}
    problems = []
    for name, ours in distinct_tensors(model).items():
        sources = _sources(conversion, name)
        absent = [source for source in sources if source not in names and not _is_unbiased(conversion, source)]
        if absent:
            problems += [f"missing {source}" for source in absent]
            continue
        parts = [_part(conversion, checkpoint, names, source, dtype) for source in sources]
        if not _fit(parts, ours):
            told = " and ".join(f"{s} {tuple(p.shape)} {p.dtype}" for s, p in zip(sources, parts, strict=True))
            problems.append(f"{told} should make {name} {tuple(ours.shape)}")
            continue
        tensor = torch.cat(parts) if len(parts) > 1 else parts[0].contiguous()
        # Swapped, so that every module that shares the parameter sees it.
        torch.utils.swap_tensors(ours, nn.Parameter(tensor))
    problems += [
        f"unexpected {theirs}"
        for name, theirs in names.items()
        if name not in used and not re.search(conversion.ignored, name)
    ]
    raise_problems(checkpoint.where, problems)
    return model.eval()


def head_is_embedding(checkpoint: Checkpoint, head: str, embedding: str) -> bool:
    """Whether a head that the configuration ties to the embedding is: a file may hold another one all the same, which
    transformers then takes, too."""
    names = checkpoint.names()
    if head not in names or embedding not in names:
        return True
    return torch.equal(checkpoint.read(head), checkpoint.read(embedding))


def head_ties(fields: Fields, checkpoint: Checkpoint, default: bool, head: str, embedding: str) -> bool:
    """Whether the head is the embedding: the configuration says so, and the file does not hold another one."""
    return bool(fields.get("tie_word_embeddings", default)) and head_is_embedding(checkpoint, head, embedding)


def scaled(tensor: Tensor, factor: float) -> Tensor:
    """tensor * factor, rounded only when it is stored."""
    return tensor.double() * factor


def block(ours: str, theirs: str, modules: dict[str, str]) -> dict[str, str]:
    """A block's modules by their names within it, as `Conversion.modules` wants them."""
    return {
        f"{ours}.{name}": " ".join(f"{theirs}.{source}" for source in sources.split())
        for name, sources in modules.items()
    }


def _modern(name: str) -> str:
    """Old BERTs call a norm's weight and bias gamma and beta."""
    return re.sub(r"\.gamma$", ".weight", re.sub(r"\.beta$", ".bias", name))


def _sources(conversion: Conversion, name: str) -> list[str]:
    """Names of the tensors that our tensor `name` is made of."""
    number = re.search(r"\.(\d+)\.", name)
    layer = number.group(1) if number else ""
    name = re.sub(r"\.\d+\.", ".*.", name)
    if name in conversion.modules:
        sources = conversion.modules[name].split()
    else:
        module, _, kind = name.rpartition(".")
        sources = [f"{source}.{kind}" for source in conversion.modules[module].split()]
    return [source.replace("*", layer) for source in sources]


def _is_unbiased(conversion: Conversion, source: str) -> bool:
    module, _, kind = source.rpartition(".")
    return kind == "bias" and module.endswith(conversion.unbiased) and bool(conversion.unbiased)


def _fit(parts: list[Tensor], ours: Tensor) -> bool:
    """Whether the rows of all parts together are those of our tensor."""
    return (
        all(part.is_floating_point() and part.dim() == ours.dim() for part in parts)
        and all(part.shape[1:] == ours.shape[1:] for part in parts)
        and sum(len(part) for part in parts) == len(ours)
    )


def _part(
    conversion: Conversion, checkpoint: Checkpoint, names: dict[str, str], source: str, dtype: torch.dtype | None
) -> Tensor:
    if source in names:
        tensor = checkpoint.read(names[source])
        return conversion.change(source, tensor).to(dtype or tensor.dtype)
    weight = source.removesuffix("bias") + "weight"
    tensor = conversion.change(weight, checkpoint.read(names[weight]))
    return torch.zeros(tensor.shape[0], dtype=dtype or tensor.dtype)
