"""Giving a module another class in place: attributes, parameters, hooks and state dict stay what they are."""

from __future__ import annotations

import functools

from torch import nn


def swap_refusal(module: nn.Module) -> str | None:
    """Why a module can't be given another class, or None."""
    if "forward" in vars(module):
        return "its forward was replaced"
    if type(module).__reduce_ex__ is not object.__reduce_ex__ or type(module).__reduce__ is not object.__reduce__:
        return "its class has its own way of being pickled"
    return None


def subclass(mixin: type, base: type) -> type:
    """``base`` with ``mixin`` before it, under base's name: isinstance, attributes and state dict stay as they are."""
    return base if issubclass(base, mixin) else _make_subclass(mixin, base)


@functools.cache
def _make_subclass(mixin: type, base: type) -> type:
    members = {"__module__": base.__module__, "__qualname__": base.__qualname__, "__doc__": base.__doc__}
    return type(base.__name__, (mixin, base), members)


def _rebuild(mixin: type, base: type) -> nn.Module:
    swapped = subclass(mixin, base)
    return swapped.__new__(swapped)


class Swapped:
    """A class made by ``subclass``: pickled as the two classes that it was made of."""

    def __reduce_ex__(self, protocol):
        _, _, *state = super().__reduce_ex__(max(protocol, 2))
        return _rebuild, type(self).__bases__, *state


def own_code(module: nn.Module) -> bool:
    """Written by someone else than torch or us."""
    return type(module).__module__.partition(".")[0] not in ("torch", "gpt4fast")
