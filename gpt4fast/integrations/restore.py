"""``restore(model)``: what ``optimize`` did, undone."""

from __future__ import annotations

import copy

from torch import nn

from .. import nn as fast_nn
from .channel_norms import ChannelNorm
from .merge import CONV_TRANSPOSE, FAST_CONV_TRANSPOSE, Merged
from .optimize import for_transformers, kept
from .swap import Swapped

_TORCHS = {fast: torchs for torchs, fast in CONV_TRANSPOSE.items()}


def restore(model: nn.Module) -> nn.Module:
    """A new model that computes the same as ``model`` on torch's own modules; ``model`` itself is not changed.

    It undoes ``optimize``: all classes, and transformers' ``attn_implementation``, are what they were. The two models
    share their parameters and buffers; training and evaluation modes stay as they are.

    Raises:
        TypeError: ``model`` is not a module.
        ValueError: a batch norm was folded into the weight of a convolution, which can't be undone. Keep the model that
            was given to ``optimize``, or call that with ``training=True``, which folds nothing.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, but is {model!r} ({type(model).__name__})")
    for path, module in model.named_modules():
        if isinstance(module, Merged) and list(module.replaced[0].parameters()) + list(module.replaced[0].buffers()):
            what = type(module.replaced[0]).__name__
            raise ValueError(
                f"model must have no batch norm folded into a weight, but had {what} at {path}: keep the model "
                "that was given to optimize(), or optimize(model, training=True)"
            )
    plain = copy.deepcopy(model, kept(model, parameters=True))
    for module in plain.modules():
        _restore_activations(module)
        while isinstance(module, Swapped):
            for name in ("found_eps", "merged") if isinstance(module, ChannelNorm) else ():
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


def _restore_activations(sequential: nn.Module) -> None:
    """Put back what is computed by the module before it."""
    before = None
    for key, module in sequential._modules.items():
        if isinstance(module, Merged):
            sequential._modules[key] = module.replaced[0]
            if isinstance(before, ChannelNorm):
                before.merged = None, 0.0
            else:
                before.activation = None
        else:
            before = module
