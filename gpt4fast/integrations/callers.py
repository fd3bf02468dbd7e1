"""Modules that call attention or transposed convolution as functions: found, and run under ``fast_ops()``."""

from __future__ import annotations

import functools
import inspect
import sys
from collections.abc import Iterator

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from .fast_ops import ROUTED, fast_ops
from .swap import Swapped, own_code, swap_refusal

_ROUTED_NAMES = {function.__name__ for function in ROUTED}


class FastForward(Swapped):
    """A module whose forward runs under ``fast_ops()``."""

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        _, base = cls.__bases__

        @functools.wraps(base.forward)  # keeps the signature, which callers inspect
        def forward(self, *args, **kwargs):
            with fast_ops():
                return base.forward(self, *args, **kwargs)

        cls.forward = forward


def calls_routed(cls: type) -> bool:
    """Whether forward's code names a routed function, itself or through methods and functions of its module, or leaves
    attention to a processor of diffusers, which is no module and may be changed."""
    if hasattr(cls, "set_processor"):
        return True
    seen, todo = set(), [getattr(cls, "forward", None)]
    while todo:
        function = inspect.unwrap(todo.pop())
        code = getattr(function, "__code__", None)
        if code is None or code in seen:
            continue
        seen.add(code)
        for name in names_in(code):
            if name in _ROUTED_NAMES:
                return True
            # Only code next to the class: what lies further away has modules of its own, or belongs to a library.
            for found in (getattr(cls, name, None), function.__globals__.get(name)):
                if getattr(found, "__module__", None) == cls.__module__ and not isinstance(found, type):
                    todo.append(found)
    return False


def names_in(code) -> Iterator[str]:
    """The names of globals and attributes in a function's code."""
    yield from code.co_names
    for constant in code.co_consts:
        if hasattr(constant, "co_names"):  # a function defined inside
            yield from names_in(constant)


class _Caller(TorchFunctionMode):
    """Finds the modules from which routed functions are called: the nearest ``self`` on the stack."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.modules = set(model.modules())
        self.found: dict[nn.Module, None] = {}

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func in ROUTED:
            frame = sys._getframe(1)
            while frame is not None:
                module = frame.f_locals.get("self")
                if isinstance(module, nn.Module) and module in self.modules:
                    break
                frame = frame.f_back
            self.found[self.model if frame is None else module] = None
        return func(*args, **(kwargs or {}))


def hidden_callers(fast: nn.Module, example_inputs: object) -> list[nn.Module]:
    """Modules with code of their own that call a routed function for the example, but not yet under fast_ops()."""
    caller = _Caller(fast)
    with caller:
        run_example(fast, example_inputs)
    return [m for m in caller.found if own_code(m) and not isinstance(m, FastForward) and swap_refusal(m) is None]


@torch.no_grad()
def run_example(model: nn.Module, example_inputs: object) -> None:
    """Run a model once in eval mode; its modes and torch's generator stay what they are."""
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        with torch.random.fork_rng():
            model(*example_inputs) if isinstance(example_inputs, (tuple, list)) else model(example_inputs)
    finally:
        for module, training in modes.items():
            module.training = training
