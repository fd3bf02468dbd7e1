"""A module whose forward runs as it was traced, for the calls that the trace is right for."""

from __future__ import annotations

import functools
import importlib
from types import ModuleType

from torch import nn

from .plain_forward import NotPlain, Plain, noted
from .swap import Swapped


class TracedForward:
    """The code of a traced forward: called like it, for calls that ``serves`` takes.

    ``merged`` tells of each transposed convolution, by its path, what is computed with it; ``functions`` are modules
    for the activations that the forward calls as functions.
    """

    def __init__(
        self,
        source: str,
        imports: dict[str, tuple[str, str]],
        arguments: int,
        read: dict[str, Plain],
        merged: dict[str, str],
        functions: list[nn.Module],
    ) -> None:
        self._made_of = source, imports, arguments, read, merged, functions
        self.merged, self._arguments, self._read = merged, arguments, read
        for i, function in enumerate(functions):
            setattr(self, f"function{i}", function)
        scope = {name: _imported(*place) for name, place in imports.items()}  # no __name__: Dynamo would import that
        exec(compile(source, "<traced forward>", "exec"), scope)
        self.forward = scope["forward"]

    def __reduce__(self):
        return TracedForward, self._made_of

    def serves(self, module: nn.Module, args: tuple, kwargs: dict) -> bool:
        if kwargs or len(args) != self._arguments:
            return False
        return all(noted(getattr(module, name, _MISSING)) == value for name, value in self._read.items())


_MISSING = object()


class GraphForward(Swapped):
    """A module whose forward runs as it was traced."""

    traced: TracedForward

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        base = cls.__bases__[-1]

        @functools.wraps(base.forward)  # keeps the signature, which callers inspect
        def forward(self, *args, **kwargs):
            if self.traced.serves(self, args, kwargs):
                return self.traced.forward(self, *args)
            return base.forward(self, *args, **kwargs)

        cls.forward = forward


def where(value: object) -> tuple[str, str]:
    """From where traced code has a name: the module's name, and the name in it or ""."""
    where = (value.__name__, "") if isinstance(value, ModuleType) else (value.__module__, value.__qualname__)
    if _imported(*where) is not value:
        raise NotPlain(f"{value!r} has no name")
    return where


def _imported(module: str, name: str) -> object:
    found = importlib.import_module(module)
    return getattr(found, name, None) if name else found
