"""``restore(model)``: what ``optimize`` did, undone."""

from __future__ import annotations

import copy

from torch import nn

from .. import nn as fast_nn
from .channel_norms import ChannelNorm
from .merge import CONV_TRANSPOSE, FAST_CONV_TRANSPOSE, Merged, activation_name
from .optimize import for_transformers, kept
from .swap import Swapped
from .traced_forward import GraphForward

_ATTRIBUTES = {ChannelNorm: ("found_eps", "merged"), GraphForward: ("traced",)}  # that optimize() gave a module
_TORCHS = {fast: torchs for torchs, fast in CONV_TRANSPOSE.items()}


def restore(model: nn.Module) -> nn.Module:
    """A new model that computes the same as ``model`` on torch's own modules; ``model`` itself is not changed.

    It undoes ``optimize``: all classes, and transformers' ``attn_implementation``, are what they were. The two models
    share their parameters and buffers; training and evaluation modes stay as they are.

    Raises:
        TypeError: ``model`` is not a module.
        ValueError: a batch norm, a weight norm or a parametrization was folded into a weight, which can't be undone.
            Keep the model that was given to ``optimize``, or call that with ``training=True``, which folds nothing.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, but is {model!r} ({type(model).__name__})")
    for path, module in model.named_modules():
        what = None
        if isinstance(module, Merged) and list(module.replaced[0].parameters()) + list(module.replaced[0].buffers()):
            what = f"{type(module.replaced[0]).__name__} at {path}"
        elif "folded" in vars(module):
            what = f"{', '.join(module.folded.values())} at {path or '(the model)'}"
        if what is not None:
            raise ValueError(
                f"model must have nothing folded into a weight, but had {what}: keep the model that was given to "
                "optimize(), or optimize(model, training=True)"
            )
    return plain_copy(model)


def plain_copy(model: nn.Module) -> nn.Module:
    """A copy on torch's modules, which shares parameters and buffers.

    Of what was folded into weights it has the batch norms back, but not the weights: only its time is the old one.
    """
    plain = copy.deepcopy(model, kept(model, parameters=True))
    for module in plain.modules():
        _restore_activations(module)
        while isinstance(module, Swapped):
            for name in _ATTRIBUTES.get(type(module).__bases__[0], ()):
                vars(module).pop(name, None)
            _, module.__class__ = type(module).__bases__
        if type(module) in FAST_CONV_TRANSPOSE and module.norm is module.activation is None:
            module.__class__ = _TORCHS[type(module)]
            for name in ("activation", "negative_slope", "norm"):
                vars(module).pop(name, None)
        elif type(module) is fast_nn.MultiheadAttention:
            module.__class__ = nn.MultiheadAttention
    if for_transformers() is not None:
        for_transformers().switch_back(plain)
    return plain


def _restore_activations(parent: nn.Module) -> None:
    """Put back what is computed by the module before it."""
    before = None
    for key, module in parent._modules.items():
        if isinstance(module, Merged):
            parent._modules[key] = module.replaced[0]
            if isinstance(before, ChannelNorm):
                before.merged = None, 0.0
            elif activation_name(module.replaced[0]) is not None:
                before.activation = None
        elif isinstance(module, (ChannelNorm, *FAST_CONV_TRANSPOSE)):
            before = module
