"""Transposed convolution, batch norm and activation that stand together in a Sequential, computed in one pass; so are a
layer norm over channels and its activation."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Iterator, Set
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from .. import nn as fast_nn
from ..nn.conv_transpose import inference_affine
from .channel_norms import ChannelNorm
from .swap import Swapped, swap_refusal

CONV_TRANSPOSE = {
    nn.ConvTranspose1d: fast_nn.ConvTranspose1d,
    nn.ConvTranspose2d: fast_nn.ConvTranspose2d,
    nn.ConvTranspose3d: fast_nn.ConvTranspose3d,
}
FAST_CONV_TRANSPOSE = tuple(CONV_TRANSPOSE.values())
_ACTIVATIONS = {
    nn.ReLU: "relu",
    nn.LeakyReLU: "leaky_relu",
    nn.Tanh: "tanh",
    nn.Sigmoid: "sigmoid",
    nn.GELU: "gelu",
    nn.SiLU: "silu",
}


def merge_refusal(module: nn.Module, shared: Set[nn.Module] = frozenset()) -> str | None:
    """Why a module can't be computed together with its neighbours, or None."""
    if module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks:
        return "it has hooks"
    if "forward" in vars(module):
        return "its forward was replaced"
    if module in shared:
        return "it is used in several places"
    return None


def shared_modules(model: nn.Module) -> set[nn.Module]:
    """The modules that occur in several places."""
    counts = Counter(module for _, module in model.named_modules(remove_duplicate=False))
    return {module for module, count in counts.items() if count > 1}


@dataclass
class Run:
    """Neighbours in a Sequential that can be computed in one pass: their keys, and what they are."""

    sequential: nn.Sequential
    keys: list[str]
    conv: nn.Module  # or a layer norm over channels
    norm: nn.Module | None = None
    activation: nn.Module | None = None


def all_runs(model: nn.Module) -> Iterator[Run]:
    """Every run of two or three modules in the Sequentials of a model."""
    shared = shared_modules(model)
    for module in model.modules():
        plain = isinstance(module, nn.Sequential) and type(module).forward is nn.Sequential.forward
        if plain and swap_refusal(module) is None:
            yield from (run for run in find_runs(module, shared) if len(run.keys) > 1)


def find_runs(sequential: nn.Sequential, shared: Set[nn.Module] = frozenset()) -> list[Run]:
    """The children of a Sequential in order: those that go together in one run, the others alone (as ``conv``)."""
    runs: list[Run] = []
    for key, module in sequential._modules.items():
        last = runs[-1] if runs else None
        if last is None or not _takes_followers(last.conv) or merge_refusal(last.conv, shared) is not None:
            runs.append(Run(sequential, [key], module))
            continue
        if last.norm is last.activation is None and fits(last.conv, module) and not merge_refusal(module, shared):
            last.norm = module
            last.keys.append(key)
        elif last.activation is None and activation_name(module) and not merge_refusal(module):
            last.activation = module
            last.keys.append(key)
        else:
            runs.append(Run(sequential, [key], module))
    return runs


def _takes_followers(module: nn.Module) -> bool:
    return is_conv(module) or (isinstance(module, ChannelNorm) and module.merged[0] is None)


def is_conv(module: nn.Module) -> bool:
    if type(module) in FAST_CONV_TRANSPOSE:
        return module.norm is None and module.activation is None
    return type(module) in CONV_TRANSPOSE


def fits(conv: nn.Module, norm: nn.Module) -> bool:
    """Whether ``norm`` is a batch norm with running statistics for the output of ``conv``."""
    return (
        is_conv(conv)
        and type(norm) is (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)[len(conv.kernel_size) - 1]
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


class Merged(nn.Identity):
    """Stands where ``replaced`` was, which is now computed by the module before it."""

    def __init__(self, replaced: nn.Module) -> None:
        super().__init__()
        self.replaced = (replaced,)  # in a tuple: its parameters are no longer the model's

    def extra_repr(self) -> str:
        return f"{type(self.replaced[0]).__name__}, computed by the module before it"


def swap_conv(conv: nn.Module) -> None:
    """Make a torch transposed convolution one of ours, in place."""
    if type(conv) in CONV_TRANSPOSE:
        conv.__class__ = CONV_TRANSPOSE[type(conv)]
        conv.norm, conv.activation, conv.negative_slope = None, None, 0.01


def merge(run: Run) -> None:
    """Fold a run's norm into the weights of its convolution and give that the activation."""
    swap_conv(run.conv)
    if run.norm is not None:
        _fold(run.conv, run.norm)
    if isinstance(run.conv, ChannelNorm):
        run.conv.merged = activation_name(run.activation), _slope(run.activation)
    elif run.activation is not None:
        run.conv.activation, run.conv.negative_slope = activation_name(run.activation), _slope(run.activation)
    followers = [module for module in (run.norm, run.activation) if module is not None]
    for key, module in zip(run.keys[1:], followers, strict=True):
        run.sequential._modules[key] = Merged(module)


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


class MergedSequential(Swapped):
    """A Sequential that computes a transposed convolution and what follows in one pass; its children do not change."""

    def forward(self, input: Tensor) -> Tensor:
        for run in find_runs(self):
            if len(run.keys) > 1 and type(run.conv) in FAST_CONV_TRANSPOSE:
                name = None if run.activation is None else activation_name(run.activation)
                input = run.conv.fused(input, None, run.norm, name, _slope(run.activation))
            else:
                for key in run.keys:
                    input = self._modules[key](input)
        return input
