"""How much faster the parts of an optimized model are than the same on torch's modules."""

from __future__ import annotations

import copy
import statistics
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from .. import nn as fast_nn
from ..benchmarks.harness import CpuTimer, CudaTimer, calibrate
from .callers import run_example
from .merge import FAST_CONV_TRANSPOSE, Merged
from .restore import plain_copy
from .swap import Swapped

_TURNS, _SLOT = 7, 0.01  # of each of the two; least seconds of a turn


@torch.no_grad()
def measure_gains(model: nn.Module, example_inputs: object) -> dict[nn.Module, float]:
    """Torch's time / its own of every accelerated part that is not within another, on what it is given in the example.

    The two take turns; the figure is the median of the ratios.
    """
    calls = _recorded_calls(model, list(_parts(model)), example_inputs)
    return {part: _gain(part, *call) for part, call in calls.items()}


def _parts(module: nn.Module) -> Iterator[nn.Module]:
    """The outermost modules that are not torch's any more; one whose children are merged is one part."""
    ours = isinstance(module, (Swapped, fast_nn.MultiheadAttention, *FAST_CONV_TRANSPOSE))
    if ours or any(isinstance(child, Merged) for child in module.children()):
        yield module
    else:
        for child in module.children():
            yield from _parts(child)


def _recorded_calls(model: nn.Module, parts: list[nn.Module], example_inputs: object) -> dict[nn.Module, tuple]:
    calls: dict[nn.Module, tuple] = {}

    def record(part: nn.Module, args: tuple, kwargs: dict) -> None:
        if part not in calls:  # copies: what follows may write into them
            calls[part] = copy.deepcopy((args, kwargs))

    hooks = [part.register_forward_pre_hook(record, with_kwargs=True) for part in parts]
    try:
        run_example(model, example_inputs)
    finally:
        for hook in hooks:
            hook.remove()
    return calls


def _gain(part: nn.Module, args: tuple, kwargs: dict) -> float:
    fast, plain = copy.deepcopy(part).eval(), plain_copy(part).eval()
    on_gpu = any(isinstance(value, Tensor) and value.is_cuda for value in (*args, *kwargs.values()))
    timer = CudaTimer(graphs=False) if on_gpu else CpuTimer()
    runs = [lambda module=module: module(*args, **kwargs) for module in (plain, fast)]
    repeats = [calibrate(timer, run, _SLOT) for run in runs]
    turns = ([timer.slot(run, n) for run, n in zip(runs, repeats, strict=True)] for _ in range(_TURNS))
    return statistics.median(torchs / ours for torchs, ours in turns)
