"""Giving a module another class in place: attributes, parameters, hooks and state dict stay what they are."""

from __future__ import annotations

import functools

from torch import nn


class Swapped:
    """A class made by ``subclass``: pickled as the classes that it was made of."""

    def __reduce_ex__(self, protocol):
        _, _, *state = super().__reduce_ex__(max(protocol, 2))
        return _rebuild, classes(type(self)), *state


def classes(swapped: type) -> tuple[type, ...]:
    """The mixins that a class was made of, the last one first, and the class that somebody wrote."""
    mixins = []
    while issubclass(swapped, Swapped):
        mixin, swapped = swapped.__bases__
        mixins.append(mixin)
    return *mixins, swapped


def _rebuild(*made_of: type) -> nn.Module:
    *mixins, swapped = made_of
    for mixin in reversed(mixins):
        swapped = subclass(mixin, swapped)
    return swapped.__new__(swapped)


def swap_refusal(module: nn.Module) -> str | None:
    """Why a module can't be given another class, or None."""
    if "forward" in vars(module):
        return "its forward was replaced"
    base = classes(type(module))[-1]
    if base.__reduce_ex__ is not object.__reduce_ex__ or base.__reduce__ is not object.__reduce__:
        return "its class has its own way of being pickled"
    return None


def subclass(mixin: type, base: type) -> type:
    """``base`` with ``mixin`` before it, under base's name: isinstance, attributes and state dict stay as they are."""
    return base if issubclass(base, mixin) else _make_subclass(mixin, base)


@functools.cache
def _make_subclass(mixin: type, base: type) -> type:
    members = {"__module__": base.__module__, "__qualname__": base.__qualname__, "__doc__": base.__doc__}
    return type(base.__name__, (mixin, base), members)


# Not benchmarks, whose generators are as others write them.
OURS = tuple(f"gpt4fast.{part}." for part in ("ops", "backends", "nn", "models", "integrations"))


def own_code(module: nn.Module) -> bool:
    """Written by someone else than torch or us."""
    return not f"{type(module).__module__}.".startswith(("torch.", *OURS))
