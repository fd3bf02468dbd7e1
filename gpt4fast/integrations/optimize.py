"""``optimize(model)``: the same model, faster; ``explain_model(model)``: a table of what became of each part."""

from __future__ import annotations

import copy
import functools
import sys
from dataclasses import dataclass

from torch import Tensor, nn
from torch.nn.utils.parametrize import is_parametrized

from .. import nn as fast_nn
from .callers import FastForward, calls_routed, hidden_callers
from .channel_norms import ChannelNorm, channel_norm_eps
from .merge import (
    CONV_TRANSPOSE,
    FAST_CONV_TRANSPOSE,
    Merged,
    MergedSequential,
    activation_name,
    all_runs,
    find_runs,
    fits,
    is_conv,
    merge,
    merge_refusal,
    shared_modules,
    swap_conv,
)
from .swap import own_code, subclass, swap_refusal


def optimize(model: nn.Module, *, training: bool = False, example_inputs: object = None) -> nn.Module:
    """A new model that computes the same, faster; ``model`` itself is not changed.

    - In an ``nn.Sequential``, a transposed convolution and the batch norm and activation after it run in one pass.
    - Layer norms over channels (``LayerNorm2d`` of any library) run in one pass, with the activation behind them, at
      inference.
    - Other transposed convolutions and ``nn.MultiheadAttention`` (where weights are not asked for) run on gpt4fast.
    - Modules whose ``forward`` calls ``scaled_dot_product_attention`` or ``conv_transpose*`` run under ``fast_ops()``.
    - transformers' models have ``attn_implementation="gpt4fast"`` (``gpt4fast.integrations.transformers``).
    - For training, convolutions with a stride have their gradients from the kernels of transposed convolution.

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
    folds = not training and any(run.norm is not None for run in all_runs(model))
    fast = copy.deepcopy(model, kept(model, parameters=not folds))
    if not training:
        fast.eval()
        for module in fast.modules():
            eps = channel_norm_eps(module)
            if eps is not None:
                module.__class__ = subclass(ChannelNorm, type(module))
                module.found_eps = eps
        for run in list(all_runs(fast)):
            merge(run)
    for sequential in {run.sequential for run in all_runs(fast)}:
        sequential.__class__ = subclass(MergedSequential, type(sequential))
    for module in fast.modules():
        _swap(module, training)
    if for_transformers() is not None:
        for_transformers().switch(fast)
    if example_inputs is not None:
        for module in hidden_callers(fast, example_inputs):
            module.__class__ = subclass(FastForward, type(module))
    return fast


def kept(model: nn.Module, parameters: bool) -> dict[int, object]:
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


def _swap(module: nn.Module, training: bool) -> None:
    """Give one module its faster class, in place."""
    if swap_refusal(module) is not None:
        return
    if type(module) in CONV_TRANSPOSE:
        swap_conv(module)
    elif type(module) is nn.MultiheadAttention:
        module.__class__ = fast_nn.MultiheadAttention
    elif (own_code(module) and calls_routed(type(module))) or (training and _is_strided(module)):
        module.__class__ = subclass(FastForward, type(module))


def for_transformers():
    """``gpt4fast.integrations.transformers``, where transformers is in use and new enough, or None."""
    if "transformers.modeling_utils" not in sys.modules:
        return None
    try:
        from . import transformers
    except ImportError:
        return None
    return transformers


def _is_strided(module: nn.Module) -> bool:
    """Whether it is a convolution whose gradients are transposed convolutions with a stride."""
    return type(module) in (nn.Conv1d, nn.Conv2d, nn.Conv3d) and min(module.stride) > 1


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
    shared = shared_modules(model)
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
    for run in find_runs(sequential, frozenset() if isinstance(sequential, MergedSequential) else shared):
        followers = [module for module in (run.norm, run.activation) if module is not None]
        what = " and ".join(type(module).__name__ for module in followers)
        if followers and isinstance(sequential, MergedSequential):
            late = "; the norm is torch's while in training mode" if run.norm is not None else ""
            rows[run.conv] = (_op_name(run.conv), f"{what} in the same pass{late}")
            for module in followers:
                rows[module] = (_op_name(run.conv), f"computed with {run.keys[0]}")
        elif followers and _explain_module(run.conv) == ("torch", _WOULD_TAKE):
            rows[run.conv] = ("torch", f"{_WOULD_TAKE}, with {what}")
        elif isinstance(run.conv, (*CONV_TRANSPOSE, *FAST_CONV_TRANSPOSE)):
            after = children.index(run.conv) + len(run.keys)
            reason = merge_refusal(run.conv, shared)
            follower = children[after] if after < len(children) else None
            if reason is None and follower is not None and is_conv(run.conv):
                mergeable = activation_name(follower) or fits(run.conv, follower)
                reason = merge_refusal(follower, shared) if mergeable else None
                reason = reason and f"{run.sequential._get_name()}[{after}]: {reason}"
            runs_on, why = _explain_module(run.conv)
            rows[run.conv] = (runs_on, f"{why}; not merged with what follows: {reason}" if reason else why)
    return rows


_WOULD_TAKE = "optimize() would take it"


def _explain_module(module: nn.Module) -> tuple[str, str] | None:
    """(runs on, why) of one module by itself, or None if it is nothing that gpt4fast accelerates."""
    if isinstance(module, FAST_CONV_TRANSPOSE):
        extras = [name for name in (module.norm and "batch norm", module.activation) if name]
        return _op_name(module), f"with {' and '.join(extras)} in the same pass" if extras else "transposed convolution"
    if isinstance(module, Merged):
        return "gpt4fast", module.extra_repr()
    if isinstance(module, ChannelNorm):
        activation = module.merged[0]
        return "gpt4fast", "layer norm over channels" + (f" with {activation} in the same pass" if activation else "")
    if channel_norm_eps(module) is not None:
        return "torch", f"{_WOULD_TAKE}, at inference"
    if isinstance(module, fast_nn.MultiheadAttention):
        return "gpt4fast.attention", "torch's formula where weights are asked for"
    if isinstance(module, FastForward) and isinstance(module, (nn.Conv1d, nn.Conv2d, nn.Conv3d)):
        return "torch", "its gradients on gpt4fast, as transposed convolutions"
    if isinstance(module, FastForward):
        return "fast_ops()", "its forward calls attention or transposed convolution"
    if isinstance(module, (*CONV_TRANSPOSE, nn.MultiheadAttention)):
        if is_parametrized(module):
            return "torch", "it has parametrizations"
        if type(module) not in (*CONV_TRANSPOSE, nn.MultiheadAttention):
            return "torch", f"{type(module).__name__} is a subclass with code of its own"
        return "torch", swap_refusal(module) or _WOULD_TAKE
    if own_code(module) and calls_routed(type(module)):
        return "torch", swap_refusal(module) or _WOULD_TAKE
    return None if for_transformers() is None else for_transformers().explain(module)


def _op_name(conv: nn.Module) -> str:
    return f"gpt4fast.conv_transpose{len(conv.kernel_size)}d"
