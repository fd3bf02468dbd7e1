"""``optimize(model)``: the same model, faster."""

from __future__ import annotations

import copy
import functools
import sys

from torch import Tensor, nn

from .. import nn as fast_nn
from .callers import FastForward, calls_routed, hidden_callers
from .channel_norms import ChannelNorm, channel_norm_eps
from .fold import CONV, computed_weights, fold_computed_weights
from .graph import fold_batch_norms, foldable_runs, is_free_form, merge_in_forward
from .merge import (
    CONV_TRANSPOSE,
    FAST_CONV_TRANSPOSE,
    MergedSequential,
    all_runs,
    is_conv,
    merge,
    shared_modules,
    swap_conv,
)
from .plain_forward import NotPlain
from .swap import own_code, subclass, swap_refusal
from .traced_forward import GraphForward
from .transformer_layers import Encoder, EncoderLayer


def optimize(model: nn.Module, *, training: bool = False, example_inputs: object = None) -> nn.Module:
    """A new model that computes the same, faster; ``model`` itself is not changed.

    - A transposed convolution and the batch norm and activation after it run in one pass: in an ``nn.Sequential``, and
      in forwards of your own that torch.fx can trace without losing anything (``gpt4fast.explain`` says why not).
    - At inference, batch norms behind any convolution, weight norm, spectral norm and other parametrizations are folded
      into weights, and dropout is seen through.
    - Layer norms over channels (``LayerNorm2d`` of any library) run in one pass, with the activation behind them, at
      inference.
    - Other transposed convolutions and ``nn.MultiheadAttention`` (where weights are not asked for) run on gpt4fast;
      in large layers of ``nn.TransformerEncoder`` also where torch would take a fused op or nested tensors.
    - Modules whose ``forward`` calls ``scaled_dot_product_attention`` or ``conv_transpose*`` run under ``fast_ops()``.
    - transformers' models have ``attn_implementation="gpt4fast"`` (``gpt4fast.integrations.transformers``).
    - For training, convolutions with a stride have their gradients from the kernels of transposed convolution.

    Modules with hooks, and ones used in several places, are not merged with their neighbours; subclasses with code of
    their own stay as they are. ``gpt4fast.explain`` tells which part runs on what, and why.

    Args:
        model: any module, on any device.
        training: False gives a model for inference, in eval mode. Where something was folded the result has its own
            copy of all parameters, so later training of ``model`` does not reach it; otherwise parameters are shared.
            True gives a model that can be trained: all parameters, buffers, hooks and state-dict keys are ``model``'s
            own, its optimizers stay valid, and batch norms are merged only while in eval mode.
        example_inputs: a tensor, or a tuple of arguments, for which the new model is run once, in eval mode, to find
            calls that its source does not show (a function picked from a table, say).

    Raises:
        TypeError: ``model`` is not a module.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, but is {model!r} ({type(model).__name__})")
    fast = copy.deepcopy(model, kept(model, parameters=training or not _folds(model)))
    if not training:
        _prepare_inference(fast.eval())
    for sequential in {sequential for sequential, run in all_runs(fast) if is_conv(run.conv)}:
        sequential.__class__ = subclass(MergedSequential, type(sequential))
    for module in fast.modules():
        _swap(module)
    for module in fast.modules():
        _merge_in_forward(module)
    for module in fast.modules():
        _route(module, training)
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


def _folds(model: nn.Module) -> bool:
    """Whether a model for inference has other weights."""
    if any(computed_weights(module) for module in model.modules()):
        return True
    shared = shared_modules(model)
    return any(run.norm is not None for _, run in all_runs(model)) or any(
        foldable_runs(module, shared) for module in model.modules() if is_free_form(module)
    )


def _prepare_inference(fast: nn.Module) -> None:
    for module in list(fast.modules()):
        fold_computed_weights(module)
    for module in fast.modules():
        eps = channel_norm_eps(module)
        if eps is not None:
            module.__class__ = subclass(ChannelNorm, type(module))
            module.found_eps = eps
    shared = shared_modules(fast)
    for sequential, run in list(all_runs(fast)):
        merge(sequential, run)
    for module in list(fast.modules()):
        if is_free_form(module):
            fold_batch_norms(module, shared)


def _swap(module: nn.Module) -> None:
    """Give a module of torch's its faster class, in place."""
    if swap_refusal(module) is not None:
        return
    if type(module) in CONV_TRANSPOSE:
        swap_conv(module)
    elif type(module) is nn.MultiheadAttention:
        module.__class__ = fast_nn.MultiheadAttention
    elif type(module) in _TRANSFORMER:
        module.__class__ = subclass(_TRANSFORMER[type(module)], type(module))


_TRANSFORMER = {nn.TransformerEncoderLayer: EncoderLayer, nn.TransformerEncoder: Encoder}


def _merge_in_forward(module: nn.Module) -> None:
    if not is_free_form(module, FAST_CONV_TRANSPOSE):
        return
    try:
        traced = merge_in_forward(module)
    except NotPlain:
        return
    if traced is not None:
        module.__class__ = subclass(GraphForward, type(module))
        module.traced = traced


def _route(module: nn.Module, training: bool) -> None:
    """Run a module's forward under ``fast_ops()`` where that has something to do."""
    strided = training and type(module) in CONV and min(module.stride) > 1  # its gradients are transposed convolutions
    if swap_refusal(module) is None and (strided or (own_code(module) and calls_routed(type(module)))):
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
