"""``explain_model(model)``: a table of what became of each part of a model."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn
from torch.nn.utils.parametrize import is_parametrized

from .. import nn as fast_nn
from .callers import FastForward, calls_routed
from .channel_norms import ChannelNorm, channel_norm_eps
from .fold import CONV, computed_weights
from .gains import measure_gains
from .graph import is_free_form, trace
from .merge import (
    CONV_TRANSPOSE,
    FAST_CONV_TRANSPOSE,
    Merged,
    MergedSequential,
    activation_name,
    find_runs,
    fits,
    is_conv,
    merge_refusal,
    shared_modules,
)
from .optimize import for_transformers
from .plain_forward import NotPlain
from .swap import own_code, swap_refusal
from .traced_forward import GraphForward

_WOULD_TAKE = "optimize() would take it"
Row = tuple[str, str]  # runs on, why


@dataclass(frozen=True)
class Part:
    """One row: the part's path in the model, what it runs on now, why, and torch's time / its own, where measured."""

    part: str
    runs_on: str
    why: str
    gain: float | None = None


class ModelExplanation(list):
    """Rows (``Part``) that print as a table."""

    def __str__(self) -> str:
        rows = [("part", "runs on", "why"), *((row.part, row.runs_on, row.why) for row in self)]
        if any(row.gain is not None for row in self):
            gains = ["gain", *("" if row.gain is None else f"{row.gain:.2f}" for row in self)]
            rows = [(*row[:2], gain, row[2]) for row, gain in zip(rows, gains, strict=True)]
        widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]) - 1)]
        return "\n".join("  ".join((*map(str.ljust, row, widths), row[-1])).rstrip() for row in rows)


def explain_model(model: nn.Module, *, example_inputs: object = None) -> ModelExplanation:
    """For every part that is or could be accelerated: what it runs on now, and why. The rest of the model is torch's.

    Which implementation an op takes depends on the call: ``gpt4fast.explain(op, ...)`` tells it for given inputs.

    Args:
        example_inputs: a tensor, or a tuple of arguments, on which the model is run once, in eval mode. Then each
            part that is not within another is timed beside the same part on torch's modules, and its row has the ratio:
            above 1 is faster. It is measured in some seconds, on this machine as busy as it is.
    """
    shared = shared_modules(model)
    found: dict[nn.Module, Row] = {}
    for module in model.modules():
        if isinstance(module, nn.Sequential):
            found.update(_explain_sequential(module, shared))
        elif isinstance(module, GraphForward) or is_free_form(module, (*CONV_TRANSPOSE, *FAST_CONV_TRANSPOSE)):
            found.update(_explain_forward(module))
    gains = {} if example_inputs is None else measure_gains(model, example_inputs)
    rows = ModelExplanation()
    for path, module in model.named_modules():
        row = found.get(module) or _explain_module(module)
        if row is None and module in gains:
            row = "gpt4fast", "its parts, together"
        if row is not None:
            rows.append(Part(path or "(the model)", *row, gains.get(module)))
    return rows


def _explain_sequential(sequential: nn.Sequential, shared: set[nn.Module]) -> dict[nn.Module, Row]:
    """Rows for the convolutions of a Sequential and for what follows them."""
    rows = {}
    children = list(sequential._modules.values())
    merged = isinstance(sequential, MergedSequential)
    for run in find_runs(sequential._modules.items(), frozenset() if merged else shared):
        what = " and ".join(type(module).__name__ for module in run.followers)
        if type(run.conv) in CONV:
            if run.followers and not merged:
                rows[run.conv] = "torch", f"optimize() would fold {what} into it, at inference"
        elif run.followers and merged:
            late = "; the norm is torch's while in training mode" if run.norm is not None else ""
            rows[run.conv] = (_op_name(run.conv), f"{what} in the same pass{late}")
            for module in run.followers:
                rows[module] = (_op_name(run.conv), f"computed with {run.items[0][0]}")
        elif run.followers and _explain_module(run.conv) == ("torch", _WOULD_TAKE):
            rows[run.conv] = ("torch", f"{_WOULD_TAKE}, with {what}")
        elif isinstance(run.conv, (*CONV_TRANSPOSE, *FAST_CONV_TRANSPOSE)):
            after = children.index(run.conv) + len(run.items)
            reason = merge_refusal(run.conv, shared)
            follower = children[after] if after < len(children) else None
            if reason is None and follower is not None and is_conv(run.conv):
                mergeable = activation_name(follower) or fits(run.conv, follower)
                reason = merge_refusal(follower, shared) if mergeable else None
                reason = reason and f"{sequential._get_name()}[{after}]: {reason}"
            runs_on, why = _explain_module(run.conv)
            rows[run.conv] = (runs_on, f"{why}; not merged with what follows: {reason}" if reason else why)
    return rows


def _explain_forward(module: nn.Module) -> dict[nn.Module, Row]:
    """Rows for the transposed convolutions that the forward of somebody's module calls."""
    rows = {}
    if isinstance(module, GraphForward):
        for path, what in module.traced.merged.items():
            conv = module.get_submodule(path)
            rows[conv] = _op_name(conv), f"{what} in the same pass, in the forward of {_name(module)}"
        return rows
    try:
        trace(module)
    except NotPlain as reason:
        for child in module.modules():
            row = _explain_module(child) if isinstance(child, (*CONV_TRANSPOSE, *FAST_CONV_TRANSPOSE)) else None
            if row is not None:
                rows[child] = row[0], f"{row[1]}; alone, as the forward of {_name(module)} can't be traced: {reason}"
    return rows


def _explain_module(module: nn.Module) -> Row | None:
    """(runs on, why) of one module by itself, or None if it is nothing that gpt4fast accelerates."""
    if isinstance(module, FAST_CONV_TRANSPOSE):
        extras = [name for name in (module.norm and "batch norm", module.activation) if name]
        why = f"with {' and '.join(extras)} in the same pass" if extras else "transposed convolution"
        return _op_name(module), f"{why}; {_folded(module)}" if _folded(module) else why
    if isinstance(module, Merged):
        return module.runs_on, module.extra_repr()
    if isinstance(module, ChannelNorm):
        activation = module.merged[0]
        return "gpt4fast", "layer norm over channels" + (f" with {activation} in the same pass" if activation else "")
    if channel_norm_eps(module) is not None:
        return "torch", f"{_WOULD_TAKE}, at inference"
    if isinstance(module, fast_nn.MultiheadAttention):
        return "gpt4fast.attention", "torch's formula where weights are asked for"
    if isinstance(module, FastForward) and isinstance(module, CONV):
        return "torch", "its gradients on gpt4fast, as transposed convolutions"
    if isinstance(module, FastForward):
        return "fast_ops()", "its forward calls attention or transposed convolution"
    computed = computed_weights(module)
    if computed:
        kind = "has parametrizations" if is_parametrized(module) else "has hooks"
        return "torch", f"it {kind}: optimize() would fold {_listed(computed)}, at inference"
    if isinstance(module, (*CONV_TRANSPOSE, nn.MultiheadAttention)):
        if type(module) not in (*CONV_TRANSPOSE, nn.MultiheadAttention):
            return "torch", f"{type(module).__name__} is a subclass with code of its own"
        return "torch", swap_refusal(module) or _WOULD_TAKE
    if own_code(module) and calls_routed(type(module)):
        return "torch", swap_refusal(module) or _WOULD_TAKE
    if _folded(module):
        return "torch", _folded(module)
    return None if for_transformers() is None else for_transformers().explain(module)


def _listed(computed: dict[str, str]) -> str:
    return ", ".join(f"{what} of its {name}" for name, what in computed.items())


def _folded(module: nn.Module) -> str | None:
    computed = vars(module).get("folded")
    return computed and f"{_listed(computed)} folded"


def _name(module: nn.Module) -> str:
    return type(module).__name__


def _op_name(conv: nn.Module) -> str:
    return f"gpt4fast.conv_transpose{len(conv.kernel_size)}d"
