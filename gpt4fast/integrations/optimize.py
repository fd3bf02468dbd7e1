"""``optimize(model)``: the same model, faster; ``explain_model(model)``: a table of what became of each part."""

from __future__ import annotations

import copy
import functools
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Set
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import is_parametrized
from torch.overrides import TorchFunctionMode

from .. import nn as fast_nn
from ..nn.conv_transpose import inference_affine
from .fast_ops import ROUTED, fast_ops

_CONV_TRANSPOSE = {
    nn.ConvTranspose1d: fast_nn.ConvTranspose1d,
    nn.ConvTranspose2d: fast_nn.ConvTranspose2d,
    nn.ConvTranspose3d: fast_nn.ConvTranspose3d,
}
_FAST_CONV_TRANSPOSE = tuple(_CONV_TRANSPOSE.values())
_ACTIVATIONS = {
    nn.ReLU: "relu",
    nn.LeakyReLU: "leaky_relu",
    nn.Tanh: "tanh",
    nn.Sigmoid: "sigmoid",
    nn.GELU: "gelu",
    nn.SiLU: "silu",
}
_ROUTED_NAMES = {function.__name__ for function in ROUTED}


def optimize(model: nn.Module, *, training: bool = False, example_inputs: object = None) -> nn.Module:
    """A new model that computes the same, faster; ``model`` itself is not changed.

    - In an ``nn.Sequential``, a transposed convolution and the batch norm and activation after it run in one pass.
    - Other transposed convolutions and ``nn.MultiheadAttention`` (where weights are not asked for) run on gpt4fast.
    - Modules whose ``forward`` calls ``scaled_dot_product_attention`` or ``conv_transpose*`` run under ``fast_ops()``.

    Modules with hooks or parametrizations, and ones used in several places, are not merged with their neighbours;
    subclasses with code of their own stay as they are. ``gpt4fast.explain`` tells which part runs on what, and why.

    Args:
        model: any module, on any device.
        training: False gives a model for inference, in eval mode, with batch norms folded into weights. Where something
            was folded the result has its own copy of all parameters, so later training of ``model`` does not reach it;
            otherwise parameters are shared. True gives a model that can be trained: all parameters, buffers, hooks and
            state-dict keys are ``model``'s own, its optimizers stay valid, and batch norms are merged only while in
            eval mode.
        example_inputs: a tensor, or a tuple of arguments, for which the new model is run once, in eval mode, to find
            calls that its source does not show (a function picked from a table, say).

    Raises:
        TypeError: ``model`` is not a module.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, but is {model!r} ({type(model).__name__})")
    folds = not training and any(run.norm is not None for run in _all_runs(model))
    fast = copy.deepcopy(model, _kept(model, parameters=not folds))
    if not training:
        fast.eval()
        for run in list(_all_runs(fast)):
            _merge(run)
    for sequential in {run.sequential for run in _all_runs(fast)}:
        sequential.__class__ = _subclass(MergedSequential, type(sequential))
    for module in fast.modules():
        _swap(module)
    if example_inputs is not None:
        for module in _hidden_callers(fast, example_inputs):
            module.__class__ = _subclass(FastForward, type(module))
    return fast


def _kept(model: nn.Module, parameters: bool) -> dict[int, object]:
    """The memo for ``copy.deepcopy``: what the copy has in common with the model."""
    kept: list[object] = []
    for module in model.modules():
        for name, value in vars(module).items():
            # Tensors that were computed (the weight of the old weight_norm) can't be copied, and will be computed anew.
            if isinstance(value, Tensor) and (parameters or not value.is_leaf):
                kept.append(value)
            # A hook must go on telling the object that the user knows, not a copy of it.
            if name.endswith("_hooks") and isinstance(value, dict):
                targets = (getattr(hook, "__self__", hook) for hook in value.values())
                kept.extend(t for t in targets if not isinstance(t, (nn.Module, functools.partial)))
    if parameters:
        kept += [*model.parameters(), *model.buffers()]
    return {id(value): value for value in kept}


def _swap(module: nn.Module) -> None:
    """Give one module its faster class, in place."""
    if _swap_refusal(module) is not None:
        return
    if type(module) in _CONV_TRANSPOSE:
        module.__class__ = _CONV_TRANSPOSE[type(module)]
        module.norm, module.activation, module.negative_slope = None, None, 0.01
    elif type(module) is nn.MultiheadAttention:
        module.__class__ = fast_nn.MultiheadAttention
    elif _own_code(module) and _calls_routed(type(module)):
        module.__class__ = _subclass(FastForward, type(module))


def _own_code(module: nn.Module) -> bool:
    """Written by someone else than torch or us."""
    return type(module).__module__.partition(".")[0] not in ("torch", "gpt4fast")


# Which modules can be taken


def _swap_refusal(module: nn.Module) -> str | None:
    """Why a module can't be given another class, or None."""
    if "forward" in vars(module):
        return "its forward was replaced"
    if type(module).__reduce_ex__ is not object.__reduce_ex__ or type(module).__reduce__ is not object.__reduce__:
        return "its class has its own way of being pickled"
    return None


def _merge_refusal(module: nn.Module, shared: Set[nn.Module] = frozenset()) -> str | None:
    """Why a module can't be computed together with its neighbours, or None."""
    if module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks:
        return "it has hooks"
    if "forward" in vars(module):
        return "its forward was replaced"
    if module in shared:
        return "it is used in several places"
    return None


def _shared(model: nn.Module) -> set[nn.Module]:
    """The modules that occur in several places."""
    counts = Counter(module for _, module in model.named_modules(remove_duplicate=False))
    return {module for module, count in counts.items() if count > 1}


@dataclass
class _Run:
    """Neighbours in a Sequential that can be computed in one pass: their keys, and what they are."""

    sequential: nn.Sequential
    keys: list[str]
    conv: nn.Module
    norm: nn.Module | None = None
    activation: nn.Module | None = None


def _all_runs(model: nn.Module) -> Iterator[_Run]:
    """Every run of two or three modules in the Sequentials of a model."""
    shared = _shared(model)
    for module in model.modules():
        plain = isinstance(module, nn.Sequential) and type(module).forward is nn.Sequential.forward
        if plain and _swap_refusal(module) is None:
            yield from (run for run in _runs(module, shared) if len(run.keys) > 1)


def _runs(sequential: nn.Sequential, shared: Set[nn.Module] = frozenset()) -> list[_Run]:
    """The children of a Sequential in order: those that go together in one run, the others alone (as ``conv``)."""
    runs: list[_Run] = []
    for key, module in sequential._modules.items():
        last = runs[-1] if runs else None
        if last is None or not _is_conv(last.conv) or _merge_refusal(last.conv, shared) is not None:
            runs.append(_Run(sequential, [key], module))
            continue
        if last.norm is last.activation is None and _fits(last.conv, module) and not _merge_refusal(module, shared):
            last.norm = module
            last.keys.append(key)
        elif last.activation is None and activation_name(module) and not _merge_refusal(module):
            last.activation = module
            last.keys.append(key)
        else:
            runs.append(_Run(sequential, [key], module))
    return runs


def _is_conv(module: nn.Module) -> bool:
    if type(module) in _FAST_CONV_TRANSPOSE:
        return module.norm is None and module.activation is None
    return type(module) in _CONV_TRANSPOSE


def _fits(conv: nn.Module, norm: nn.Module) -> bool:
    """Whether ``norm`` is a batch norm with running statistics for the output of ``conv``."""
    return (
        type(norm) is (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)[len(conv.kernel_size) - 1]
        and norm.running_mean is not None
        and norm.num_features == conv.out_channels
        and norm.running_mean.device == conv.weight.device
        and norm.running_mean.dtype in (conv.weight.dtype, _float32_of_half(conv.weight.dtype))
    )


def _float32_of_half(dtype: torch.dtype) -> torch.dtype:
    return torch.float32 if dtype in (torch.float16, torch.bfloat16) else dtype


def activation_name(module: nn.Module) -> str | None:
    """gpt4fast's name of an activation module that a transposed convolution can compute in its pass, or None."""
    if type(module) is nn.GELU and module.approximate != "none":
        return None
    return _ACTIVATIONS.get(type(module))


def _slope(activation: nn.Module | None) -> float:
    return activation.negative_slope if type(activation) is nn.LeakyReLU else 0.01


# Inference: one module per run


class Merged(nn.Identity):
    """Stands where a module was that is now computed by the transposed convolution before it."""

    def __init__(self, what: str) -> None:
        super().__init__()
        self.what = what

    def extra_repr(self) -> str:
        return f"{self.what}, computed by the convolution before it"


def _merge(run: _Run) -> None:
    """Fold a run's norm into the weights of its convolution and give that the activation."""
    _swap(run.conv)
    if run.norm is not None:
        _fold(run.conv, run.norm)
    if run.activation is not None:
        run.conv.activation, run.conv.negative_slope = activation_name(run.activation), _slope(run.activation)
    followers = [module for module in (run.norm, run.activation) if module is not None]
    for key, module in zip(run.keys[1:], followers, strict=True):
        run.sequential._modules[key] = Merged(type(module).__name__)


@torch.no_grad()
def _fold(conv: nn.Module, norm: nn.Module) -> None:
    """Scale the convolution's weight and bias as the norm would scale its output; in float64, rounded once."""
    scale, shift = inference_affine(copy.deepcopy(norm).double())
    weight, dtype = conv.weight.double(), conv.weight.dtype
    # (C, Cout / groups, *kernel): input channels of group g meet output channels of group g only.
    grouped = weight.unflatten(0, (conv.groups, -1)) * scale.view(conv.groups, 1, -1, *(1,) * len(conv.kernel_size))
    bias = shift if conv.bias is None else conv.bias.double() * scale + shift
    conv.weight = nn.Parameter(grouped.flatten(0, 1).to(dtype), requires_grad=False)
    conv.bias = nn.Parameter(bias.to(dtype), requires_grad=False)


# The same modules, under another class


def _subclass(mixin: type, base: type) -> type:
    """``base`` with ``mixin`` before it, under base's name: isinstance, attributes and state dict stay as they are."""
    return base if issubclass(base, mixin) else _make_subclass(mixin, base)


@functools.cache
def _make_subclass(mixin: type, base: type) -> type:
    members = {"__module__": base.__module__, "__qualname__": base.__qualname__, "__doc__": base.__doc__}
    if mixin is FastForward:
        members["forward"] = _fast_forward(base.forward)
    return type(base.__name__, (mixin, base), members)


def _fast_forward(forward: Callable) -> Callable:
    @functools.wraps(forward)  # keeps the signature, which callers inspect
    def fast_forward(self, *args, **kwargs):
        with fast_ops():
            return forward(self, *args, **kwargs)

    return fast_forward


def _rebuild(mixin: type, base: type) -> nn.Module:
    subclass = _subclass(mixin, base)
    return subclass.__new__(subclass)


class _Swapped:
    """A class made by ``_subclass``: pickled as the two classes that it was made of."""

    def __reduce_ex__(self, protocol):
        _, _, *state = super().__reduce_ex__(max(protocol, 2))
        return _rebuild, type(self).__bases__, *state


class FastForward(_Swapped):
    """A module whose forward runs under ``fast_ops()``."""


class MergedSequential(_Swapped):
    """A Sequential that computes a transposed convolution and what follows in one pass; its children do not change."""

    def forward(self, input: Tensor) -> Tensor:
        for run in _runs(self):
            if len(run.keys) > 1 and type(run.conv) in _FAST_CONV_TRANSPOSE:
                name = None if run.activation is None else activation_name(run.activation)
                input = run.conv.fused(input, None, run.norm, name, _slope(run.activation))
            else:
                for key in run.keys:
                    input = self._modules[key](input)
        return input


# Who calls attention?


def _calls_routed(cls: type) -> bool:
    """Whether forward's code names a routed function, itself or through methods and functions of its module."""
    seen, todo = set(), [getattr(cls, "forward", None)]
    while todo:
        function = todo.pop()
        code = getattr(function, "__code__", None)
        if code is None or code in seen:
            continue
        seen.add(code)
        for name in _names(code):
            if name in _ROUTED_NAMES:
                return True
            # Only code next to the class: what lies further away has modules of its own, or belongs to a library.
            for found in (getattr(cls, name, None), function.__globals__.get(name)):
                if getattr(found, "__module__", None) == cls.__module__ and not isinstance(found, type):
                    todo.append(found)
    return False


def _names(code) -> Iterator[str]:
    yield from code.co_names
    for constant in code.co_consts:
        if hasattr(constant, "co_names"):  # a function defined inside
            yield from _names(constant)


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


@torch.no_grad()
def _hidden_callers(fast: nn.Module, example_inputs: object) -> list[nn.Module]:
    """Modules that call a routed function for the example although nothing of ours is in charge there."""
    modes = {module: module.training for module in fast.modules()}
    fast.eval()
    caller = _Caller(fast)
    with torch.random.fork_rng(), caller:
        fast(*example_inputs) if isinstance(example_inputs, (tuple, list)) else fast(example_inputs)
    for module, training in modes.items():
        module.training = training
    ours = (FastForward, MergedSequential, fast_nn.MultiheadAttention, *_FAST_CONV_TRANSPOSE)
    return [m for m in caller.found if not isinstance(m, ours) and _own_code(m) and _swap_refusal(m) is None]


# Explaining


@dataclass(frozen=True)
class Part:
    """One row: the part's path in the model, what it runs on now, and why."""

    part: str
    runs_on: str
    why: str


class ModelExplanation(list):
    """Rows (``Part``) that print as a table."""

    def __str__(self) -> str:
        rows = [("part", "runs on", "why"), *((row.part, row.runs_on, row.why) for row in self)]
        first, second = (max(len(row[i]) for row in rows) for i in (0, 1))
        return "\n".join(f"{a:<{first}}  {b:<{second}}  {c}".rstrip() for a, b, c in rows)


def explain_model(model: nn.Module) -> ModelExplanation:
    """For every part that is or could be accelerated: what it runs on now, and why. The rest of the model is torch's.

    Which implementation an op takes depends on the call: ``gpt4fast.explain(op, ...)`` tells it for given inputs.
    """
    shared = _shared(model)
    rows = ModelExplanation()
    merged: dict[nn.Module, tuple[str, str]] = {}
    for path, module in model.named_modules():
        if isinstance(module, nn.Sequential):
            merged.update(_explain_sequential(module, shared))
        row = merged.get(module) or _explain_module(module)
        if row is not None:
            rows.append(Part(path or "(the model)", *row))
    return rows


def _explain_sequential(sequential: nn.Sequential, shared: set[nn.Module]) -> dict[nn.Module, tuple[str, str]]:
    """Rows for the transposed convolutions of a Sequential and for what follows them."""
    rows = {}
    children = list(sequential._modules.values())
    for run in _runs(sequential, frozenset() if isinstance(sequential, MergedSequential) else shared):
        followers = [module for module in (run.norm, run.activation) if module is not None]
        what = " and ".join(type(module).__name__ for module in followers)
        if followers and isinstance(sequential, MergedSequential):
            late = "; the norm is torch's while in training mode" if run.norm is not None else ""
            rows[run.conv] = (_op_name(run.conv), f"{what} in the same pass{late}")
            for module in followers:
                rows[module] = (_op_name(run.conv), f"computed with {run.keys[0]}")
        elif followers and _explain_module(run.conv) == ("torch", _WOULD_TAKE):
            rows[run.conv] = ("torch", f"{_WOULD_TAKE}, with {what}")
        elif isinstance(run.conv, (*_CONV_TRANSPOSE, *_FAST_CONV_TRANSPOSE)):
            after = children.index(run.conv) + len(run.keys)
            reason = _merge_refusal(run.conv, shared)
            follower = children[after] if after < len(children) else None
            if reason is None and follower is not None and _is_conv(run.conv):
                mergeable = activation_name(follower) or _fits(run.conv, follower)
                reason = _merge_refusal(follower, shared) if mergeable else None
                reason = reason and f"{run.sequential._get_name()}[{after}]: {reason}"
            runs_on, why = _explain_module(run.conv)
            rows[run.conv] = (runs_on, f"{why}; not merged with what follows: {reason}" if reason else why)
    return rows


_WOULD_TAKE = "optimize() would take it"


def _explain_module(module: nn.Module) -> tuple[str, str] | None:
    """(runs on, why) of one module by itself, or None if it is nothing that gpt4fast accelerates."""
    if isinstance(module, _FAST_CONV_TRANSPOSE):
        extras = [name for name in (module.norm and "batch norm", module.activation) if name]
        return _op_name(module), f"with {' and '.join(extras)} in the same pass" if extras else "transposed convolution"
    if isinstance(module, Merged):
        return "gpt4fast", module.extra_repr()
    if isinstance(module, fast_nn.MultiheadAttention):
        return "gpt4fast.attention", "torch's formula where weights are asked for"
    if isinstance(module, FastForward):
        return "fast_ops()", "its forward calls attention or transposed convolution"
    if isinstance(module, (*_CONV_TRANSPOSE, nn.MultiheadAttention)):
        if is_parametrized(module):
            return "torch", "it has parametrizations"
        if type(module) not in (*_CONV_TRANSPOSE, nn.MultiheadAttention):
            return "torch", f"{type(module).__name__} is a subclass with code of its own"
        return "torch", _swap_refusal(module) or _WOULD_TAKE
    if _own_code(module) and _calls_routed(type(module)):
        return "torch", _swap_refusal(module) or _WOULD_TAKE
    return None


def _op_name(conv: nn.Module) -> str:
    return f"gpt4fast.conv_transpose{len(conv.kernel_size)}d"
