"""Transposed convolution, batch norm and activation that stand together in a Sequential, computed in one pass; so are a
layer norm over channels and its activation."""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable, Iterable, Iterator, Set
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from .. import nn as fast_nn
from .channel_norms import ChannelNorm
from .fold import CONV, fold_batch_norm
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
    """Neighbours that can be computed in one pass: their keys and modules, and what these are."""

    items: list[tuple[Hashable, nn.Module]]
    conv: nn.Module  # or a layer norm over channels
    norm: nn.Module | None = None
    activation: nn.Module | None = None

    @property
    def followers(self) -> list[nn.Module]:
        return [module for module in (self.norm, self.activation) if module is not None]


def all_runs(model: nn.Module) -> Iterator[tuple[nn.Sequential, Run]]:
    """Every run of two or more modules in the Sequentials of a model."""
    shared = shared_modules(model)
    for module in model.modules():
        plain = isinstance(module, nn.Sequential) and type(module).forward is nn.Sequential.forward
        if plain and swap_refusal(module) is None:
            yield from ((module, run) for run in find_runs(module._modules.items(), shared) if len(run.items) > 1)


def find_runs(items: Iterable[tuple[Hashable, nn.Module]], shared: Set[nn.Module] = frozenset()) -> list[Run]:
    """Modules that are called one after the other: those that go together in one run, the others alone (``conv``)."""
    runs: list[Run] = []
    waiting: list[tuple[Hashable, nn.Module]] = []  # dropouts, which belong to the run if an activation follows
    for key, module in items:
        last = runs[-1] if runs else None
        if last is None or not _takes_followers(last.conv) or merge_refusal(last.conv, shared) is not None:
            runs.append(Run([(key, module)], module))
        elif not last.followers and not waiting and fits(last.conv, module) and not merge_refusal(module, shared):
            last.norm = module
            last.items.append((key, module))
        elif _may_activate(last, module, bool(waiting)) and not merge_refusal(module):
            last.activation = module
            last.items += [*waiting, (key, module)]
            waiting = []
        elif isinstance(module, DROPOUTS) and last.activation is None and is_passed(module):
            waiting.append((key, module))
        else:
            runs += [Run([item], item[1]) for item in (*waiting, (key, module))]
            waiting = []
    return runs + [Run([item], item[1]) for item in waiting]


def _takes_followers(module: nn.Module) -> bool:
    return is_conv(module) or type(module) in CONV or (isinstance(module, ChannelNorm) and module.merged[0] is None)


def _may_activate(run: Run, module: nn.Module, after_dropout: bool) -> bool:
    if run.activation is not None or type(run.conv) in CONV or activation_name(module) is None:
        return False
    # These scale with their input, so before or after dropout is the same, in training mode too.
    return not after_dropout or type(module) in (nn.ReLU, nn.LeakyReLU)


DROPOUTS = (nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d)


def is_passed(dropout: nn.Module) -> bool:
    """Whether it does nothing, as in eval mode, and nothing is tied to it."""
    return type(dropout) in DROPOUTS and not dropout.training and merge_refusal(dropout) is None


def is_conv(module: nn.Module) -> bool:
    if type(module) in FAST_CONV_TRANSPOSE:
        return module.norm is None and module.activation is None
    return type(module) in CONV_TRANSPOSE


def fits(conv: nn.Module, norm: nn.Module) -> bool:
    """Whether ``norm`` is a batch norm with running statistics for the output of ``conv``."""
    return (
        (is_conv(conv) or type(conv) in CONV)
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
    """Stands where ``replaced`` was, which is now computed by the module before it, one of ours or of torch's."""

    def __init__(self, replaced: nn.Module, runs_on: str = "gpt4fast") -> None:
        super().__init__()
        self.replaced = (replaced,)  # in a tuple: its parameters are no longer the model's
        self.runs_on = runs_on
        self.training = replaced.training

    def extra_repr(self) -> str:
        return f"{type(self.replaced[0]).__name__}, computed by the module before it"


def swap_conv(conv: nn.Module) -> None:
    """Make a torch transposed convolution one of ours, in place."""
    if type(conv) in CONV_TRANSPOSE:
        conv.__class__ = CONV_TRANSPOSE[type(conv)]
        conv.norm, conv.activation, conv.negative_slope = None, None, 0.01


def merge(parent: nn.Module, run: Run) -> None:
    """Fold a run's norm into the weights of its convolution and give that the activation; the run's keys are those of
    parent's children."""
    swap_conv(run.conv)
    if run.norm is not None:
        fold_batch_norm(run.conv, run.norm)
    if isinstance(run.conv, ChannelNorm):
        run.conv.merged = activation_name(run.activation), _slope(run.activation)
    elif run.activation is not None:
        run.conv.activation, run.conv.negative_slope = activation_name(run.activation), _slope(run.activation)
    for key, module in run.items[1:]:
        if module is run.norm or module is run.activation:
            parent._modules[key] = Merged(module, "torch" if type(run.conv) in CONV else "gpt4fast")


def run_in_passes(items: Iterable[tuple[Hashable, nn.Module]], input: Tensor) -> Tensor:
    """Call modules one after the other, a transposed convolution and what follows in one pass."""
    for run in find_runs(items):
        if len(run.items) > 1 and type(run.conv) in FAST_CONV_TRANSPOSE:
            name = None if run.activation is None else activation_name(run.activation)
            input = run.conv.fused(input, None, run.norm, name, _slope(run.activation))
        else:
            for _, module in run.items:
                input = module(input)
    return input


class MergedSequential(Swapped):
    """A Sequential that computes a transposed convolution and what follows in one pass; its children do not change."""

    def forward(self, input: Tensor) -> Tensor:
        return run_in_passes(self._modules.items(), input)
