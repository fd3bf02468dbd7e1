"""What is computed once for inference: weights with a norm or parametrization of their own, and batch norms behind
convolutions, folded into plain weights."""

from __future__ import annotations

import copy

import torch
from torch import nn
from torch.nn.utils import parametrizations, parametrize, remove_spectral_norm, remove_weight_norm
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm

from ..nn.conv_transpose import inference_affine

CONV = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_OLD_STYLE = {WeightNorm: remove_weight_norm, SpectralNorm: remove_spectral_norm}  # by hooks


def computed_weights(module: nn.Module) -> dict[str, str]:
    """The tensors that a module computes anew at every call: their names, and what computes them."""
    hooks = module._forward_pre_hooks.values()
    found = {hook.name: type(hook).__name__ for hook in hooks if type(hook) in _OLD_STYLE}
    if parametrize.is_parametrized(module):
        for name, steps in module.parametrizations.items():
            found[name] = " and ".join(type(step).__name__.lstrip("_") for step in steps)
    return found


@torch.no_grad()
def fold_computed_weights(module: nn.Module) -> None:
    """Replace them, in place, by what they are in eval mode, to the bit; ``folded`` of the module has what they were.

    Parametrizations that give another weight at every call (they draw noise) stay.
    """
    found = computed_weights(module)
    for hook in list(module._forward_pre_hooks.values()):
        if type(hook) in _OLD_STYLE:
            _OLD_STYLE[type(hook)](module, hook.name)
            getattr(module, hook.name).requires_grad_(False)
    if parametrize.is_parametrized(module):
        parametrized = dict(module.parametrizations.items())
        weights = {name: compute() for name, compute in parametrized.items()}
        if not all(torch.equal(weights[name], parametrized[name]()) for name in weights):
            return
        # Not remove_parametrizations(): that changes the class, which is also that of the module this was copied from,
        # and writes into the original tensor, which may be another module's too.
        module.__class__ = parametrize.type_before_parametrizations(module)
        del module.parametrizations
        for name, weight in weights.items():
            setattr(module, name, nn.Parameter(weight.clone(), requires_grad=False))
        for key, hook in list(module._load_state_dict_pre_hooks.items()):  # of weight_norm; it can't be pickled
            if getattr(getattr(hook, "hook", hook), "__module__", None) == parametrizations.__name__:
                del module._load_state_dict_pre_hooks[key]
    if found:
        module.folded = found


@torch.no_grad()
def fold_batch_norm(conv: nn.Module, norm: nn.Module) -> None:
    """Scale the convolution's weight and bias as the norm would scale its output; in float64, rounded once."""
    scale, shift = inference_affine(copy.deepcopy(norm).double())
    weight, dtype = conv.weight.double(), conv.weight.dtype
    ones = (1,) * len(conv.kernel_size)
    if isinstance(conv, CONV):
        scaled = weight * scale.view(-1, 1, *ones)
    else:
        # (C, Cout / groups, *kernel): input channels of group g meet output channels of group g only.
        scaled = (weight.unflatten(0, (conv.groups, -1)) * scale.view(conv.groups, 1, -1, *ones)).flatten(0, 1)
    bias = shift if conv.bias is None else conv.bias.double() * scale + shift
    conv.weight = nn.Parameter(scaled.to(dtype), requires_grad=False)
    conv.bias = nn.Parameter(bias.to(dtype), requires_grad=False)
