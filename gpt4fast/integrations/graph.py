"""Convolutions in free-form forwards, and what follows them there.

torch.fx traces each module that somebody wrote by itself, its children whole, where a trace keeps every statement of
its forward (``plain_forward``). The traced forward then serves the calls that it was traced for: with the arguments
that have no default, given by position, and with the attributes that it read unchanged. All other calls run the forward
as it was written. Which modules and hooks stand there is looked at in every call.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterator, Set
from types import FunctionType

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from .callers import names_in
from .fold import CONV
from .merge import (
    CONV_TRANSPOSE,
    DROPOUTS,
    FAST_CONV_TRANSPOSE,
    Merged,
    Run,
    activation_name,
    find_runs,
    merge,
    run_in_passes,
)
from .plain_forward import NotPlain, PlainForward
from .swap import own_code, swap_refusal
from .traced_forward import TracedForward, where

# Activations that are called as functions or methods: what follows the tensor, to the module that does the same.
_ACTIVATIONS: dict[object, Callable[..., nn.Module]] = {
    F.relu: lambda inplace=False: nn.ReLU(),
    F.leaky_relu: lambda negative_slope=0.01, inplace=False: nn.LeakyReLU(negative_slope),
    F.gelu: lambda approximate="none": nn.GELU(approximate),
    F.silu: lambda inplace=False: nn.SiLU(),
    torch.relu: nn.ReLU,
    torch.tanh: nn.Tanh,
    torch.sigmoid: nn.Sigmoid,
    "relu": nn.ReLU,
    "tanh": nn.Tanh,
    "sigmoid": nn.Sigmoid,
}
_KINDS = (*CONV, *CONV_TRANSPOSE, *FAST_CONV_TRANSPOSE)


def is_free_form(module: nn.Module, kinds: tuple[type, ...] = _KINDS) -> bool:
    """Whether a module with code of somebody's own has a convolution among its children, alone or in a list."""
    return own_code(module) and any(type(child) in kinds for child in _children(module))


def _children(module: nn.Module) -> Iterator[nn.Module]:
    for child in module.children():
        if type(child) in (nn.ModuleList, nn.ModuleDict):
            yield from _children(child)
        else:
            yield child


class _Tracer(fx.Tracer):
    """Records one forward: children are called, not entered, and parameters and buffers are looked up by name."""

    proxy_buffer_attributes = True

    def __init__(self, arguments: list[str]) -> None:
        super().__init__()
        self._arguments = arguments

    def is_leaf_module(self, module: nn.Module, path: str) -> bool:
        return True

    def create_args_for_root(self, forward, is_module, concrete_args=None):
        """Arguments that have a default keep it."""
        return forward, [self.root, *(self.create_proxy("placeholder", name, (), {}) for name in self._arguments)]

    def create_arg(self, value):
        if isinstance(value, Tensor):
            raise NotPlain("it computes a tensor that does not depend on its arguments")
        return super().create_arg(value)


def trace(module: nn.Module) -> tuple[PlainForward, fx.Graph]:
    """A module's forward, read and traced.

    Raises:
        NotPlain: it can't be; the message says why.
    """
    refusal = swap_refusal(module)
    if refusal is not None:
        raise NotPlain(refusal)
    plain = PlainForward(module)
    try:
        return plain, _Tracer(plain.arguments).trace(module)
    except NotPlain:
        raise
    except Exception as problem:  # whatever the code of others raises where a tensor is wanted and there is none
        raise NotPlain(str(problem).partition("\n")[0]) from problem


def foldable_runs(module: nn.Module, shared: Set[nn.Module]) -> list[Run]:
    """The convolutions in a module's forward that have a batch norm behind them.

    None where a flag decides what is called, which may be set otherwise later, and none that another method may call by
    itself.
    """
    try:
        plain, graph = trace(module)
    except NotPlain:
        return []
    named = _named_in_methods(type(module))
    runs = (run for run in _runs(module, graph, shared) if run.norm is not None and not plain.flags)
    return [run for run in runs if not any(node.target.partition(".")[0] in named for node, _ in run.items[:2])]


def _named_in_methods(cls: type) -> set[str]:
    """The names in all methods beside forward, and beside those that set parameters to begin with."""
    methods = ((name, value) for base in cls.__mro__ if base is not nn.Module for name, value in vars(base).items())
    codes = (
        value.__code__
        for name, value in methods
        if isinstance(value, FunctionType) and name != "forward" and "init" not in name and "reset" not in name
    )
    return {name for code in codes for name in names_in(code)}


def fold_batch_norms(module: nn.Module, shared: Set[nn.Module]) -> None:
    """Fold them into the convolutions, in place."""
    for run in foldable_runs(module, shared):
        parent, _, key = run.items[1][0].target.rpartition(".")
        merge(module.get_submodule(parent), Run([run.items[0], (key, run.norm)], run.conv, run.norm))


def _runs(module: nn.Module, graph: fx.Graph, shared: Set[nn.Module] = frozenset()) -> Iterator[Run]:
    """Runs of two or more modules in a traced forward, keyed by their nodes."""
    counts = Counter(node.target for node in graph.nodes if node.op == "call_module")
    for node in list(graph.nodes):
        if node.op != "call_module" or counts[node.target] > 1 or len(node.args) != 1 or node.kwargs:
            continue
        items = [(node, module.get_submodule(node.target))]
        while len(node.users) == 1:
            (user,) = node.users
            follower = _follower(module, node, user)
            if follower is None or (counts[user.target] > 1 and activation_name(follower) is None):
                break
            if type(follower) in DROPOUTS:  # its mode is looked at in every call
                items.append((user, nn.Dropout().eval()))
            elif type(follower) is not Merged:
                items.append((user, follower))
            node = user
        run = find_runs(items, shared)[0]
        if len(run.items) > 1 and type(run.conv) in _KINDS:
            yield run


def _follower(module: nn.Module, node: fx.Node, user: fx.Node) -> nn.Module | None:
    """The module that does what ``user`` does to ``node``, or None if it is more than that."""
    if user.args[:1] != (node,):
        return None
    if user.op == "call_module":
        return module.get_submodule(user.target) if len(user.args) == 1 and not user.kwargs else None
    if user.target not in _ACTIVATIONS:
        return None
    settings = [*user.args[1:], *user.kwargs.values()]
    if not all(type(setting) in (bool, int, float, str) for setting in settings):
        return None
    try:
        return _ACTIVATIONS[user.target](*user.args[1:], **user.kwargs)
    except TypeError:  # settings that it does not have: an out=, say
        return None


def merge_in_forward(module: nn.Module) -> TracedForward | None:
    """A module's forward with its transposed convolutions in one pass with what follows, or None where nothing does.

    Raises:
        NotPlain: it can't be traced.
    """
    plain, graph = trace(module)
    merged, functions = {}, []
    for run in [run for run in _runs(module, graph) if type(run.conv) in FAST_CONV_TRANSPOSE]:
        first, last = run.items[0][0], run.items[-1][0]
        # Where the convolution stood: its input may be written to before its activation is called.
        with graph.inserting_before(first):
            modules = []
            for node, follower in run.items:
                path = node.target
                if node.op != "call_module":
                    path = f"traced.function{len(functions)}"
                    functions.append(follower)
                modules.append(graph.create_node("get_attr", path))
            output = graph.call_function(run_modules, (first.args[0], *modules))
        last.replace_all_uses_with(output)
        while last is not first:
            last, done = last.args[0], last
            graph.erase_node(done)
        graph.erase_node(first)
        merged[first.target] = " and ".join(type(follower).__name__ for follower in run.followers)
    if not merged:
        return None
    for node in graph.nodes:
        node.type = None  # annotations, which would have to be imported
    code = graph.python_code("self")
    used = set(re.findall(r"\w+", code.src))
    imports = {name: where(value) for name, value in code.globals.items() if name in used}
    return TracedForward(code.src, imports, len(plain.arguments), plain.read, merged, functions)


def run_modules(input: Tensor, *modules: nn.Module) -> Tensor:
    """Called by traced forwards."""
    return run_in_passes(enumerate(modules), input)
