"""A foreign config.json, read field by field: what we do not honour is an error that names it."""

from __future__ import annotations

from typing import Any

# Perceptrons without a gate, by transformers' names of their activations.
GELUS = {"gelu": "gelu", "gelu_new": "gelu_tanh", "gelu_pytorch_tanh": "gelu_tanh", "relu": "relu"}


class Fields:
    """The fields of a foreign configuration; `where` is its path, for messages."""

    def __init__(self, values: dict[str, Any], where: str):
        self.values, self.where = values, where

    def get(self, name: str, default: Any) -> Any:
        """The field, or the value that transformers gives it where it is missing. A None that is there stays None."""
        return self.values.get(name, default)

    def size(self, name: str, default: int | None = None) -> int:
        """A positive int, or the default where it is missing or None; without a default it must be there."""
        value = self.values.get(name)
        value = default if value is None else value
        if value is None:
            raise ValueError(f"{self.where}: the field {name} is missing")
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise ValueError(f"{self.where}: {name} must be a positive int, got {value!r}")
        return value

    def number(self, name: str, default: float | None) -> float | None:
        """A number, 0 or more, or None."""
        value = self.get(name, default)
        if value is not None and (not isinstance(value, (int, float)) or isinstance(value, bool) or not value >= 0):
            raise ValueError(f"{self.where}: {name} must be a number, 0 or more, got {value!r}")
        return value

    def choose(self, name: str, table: dict[str, str], default: str) -> str:
        """What the table says of the field's value."""
        value = self.get(name, default)
        if value not in table:
            raise self.refusal(name, value, " or ".join(map(repr, table)))
        return table[value]

    def only(self, **honoured: Any) -> None:
        """Refuses fields that change the result, unless they are missing, None, or what we do anyway."""
        for name, value in honoured.items():
            found = self.values.get(name)
            if found is not None and found != value:
                raise self.refusal(name, found, repr(value))

    def refusal(self, name: str, found: Any, expected: str) -> ValueError:
        return ValueError(f"{self.where}: {name} is {found!r}, which is not supported; it must be {expected}")
