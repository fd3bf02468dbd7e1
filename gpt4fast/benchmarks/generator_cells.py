"""Whole generators, as people write them, on torch in both layouts and through ``optimize``."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import gpt4fast

from ..backends import dispatch
from . import generators
from .harness import Candidate, Tolerance

BOTH = (torch.float32, torch.bfloat16)
# Largest root mean square of the error / that of right values. In bfloat16 some thirty layers add theirs up.
ERRORS = {torch.float32: 1e-3, torch.bfloat16: 0.1}


@dataclass(frozen=True)
class GeneratorCell:
    """A generator at inference, or with ``backward`` the gradients of a training step.

    ``judge`` makes a discriminator for the step: its gradients then count too. ``size`` is that of the input.
    """

    name: str
    make: Callable[[], nn.Module]
    size: tuple[int, ...]
    backward: bool = False
    judge: Callable[[], nn.Module] | None = None
    dtypes: tuple[torch.dtype, ...] = BOTH
    quick: tuple[torch.dtype, ...] = (torch.float32,)

    op = "generators"

    def tolerance(self, dtype: torch.dtype) -> Tolerance:
        # Gradients jump where rounding moves an activation across a kink.
        return Tolerance(ERRORS[dtype] * (3 if self.backward else 1), "rms")

    @cached_property
    def _models(self) -> tuple[nn.Module, nn.Module | None]:
        with torch.random.fork_rng():
            torch.manual_seed(0)
            model = self.make().train(self.backward)
            return model, None if self.judge is None else self.judge()

    def input(self) -> Tensor:
        return torch.randn(self.size, generator=torch.Generator().manual_seed(0))

    def operations(self) -> int:
        """Multiplications and additions, counted where torch runs on tensors without numbers."""
        with FlopCounterMode(display=False) as counter:
            self._runner(*(m and copy.deepcopy(m).to("meta") for m in self._models), self.input().to("meta"))()
        return counter.get_total_flops()

    def bytes(self, dtype: torch.dtype) -> int:
        """Every parameter read once, and for training its gradient written; the rest could stay in the cache."""
        parameters = sum(p.numel() for model in self._models if model is not None for p in model.parameters())
        return parameters * (2 if self.backward else 1) * dtype.itemsize

    def candidates(self, dtype: torch.dtype, compile: bool = False) -> tuple[list[Candidate], tuple[Tensor, ...]]:
        """Torch first, each in both layouts, and the reference values in float64."""
        exact = self._runner(*(m and copy.deepcopy(m).double() for m in self._models), self.input().double())()
        found = []
        for layout in ("channels first", "channels last") if self._has_images() else ("",):
            models = [m and _in_layout(copy.deepcopy(m).to(dtype), layout) for m in self._models]
            x = _in_layout(self.input().to(dtype), layout)
            fast = [m and gpt4fast.optimize(copy.deepcopy(m), training=self.backward) for m in models]
            found.append(Candidate("torch", self._runner(*models, x), layout))
            if compile:
                found.append(Candidate("torch.compile", self._runner(*map(_compiled, models), x), layout))
            run = self._runner(*fast, x)
            found.append(Candidate("gpt4fast", run, layout, _what_runs(run)))
        found.sort(key=lambda candidate: candidate.name != "torch")
        return found, exact if isinstance(exact, tuple) else (exact,)

    def _has_images(self) -> bool:
        return any(p.dim() == 4 for p in self._models[0].parameters())

    def _runner(
        self, model: nn.Module, judge: nn.Module | None, x: Tensor
    ) -> Callable[[], Tensor | tuple[Tensor, ...]]:
        if not self.backward:
            return lambda: model(x)
        if judge is None:
            parameters = list(model.parameters())
            return lambda: torch.autograd.grad(model(x).square().mean(), parameters)
        return lambda: _gan_step(model, judge, x)


def _gan_step(model: nn.Module, judge: nn.Module, x: Tensor) -> tuple[Tensor, ...]:
    """The gradients of a step: of the discriminator, then of the generator."""
    fake = model(x)
    real = torch.ones_like(fake).cumsum(-1).sin()
    verdicts = judge(real), judge(fake.detach())
    loss = sum(F.binary_cross_entropy(v, torch.full_like(v, t)) for v, t in zip(verdicts, (1, 0), strict=True))
    judged = torch.autograd.grad(loss, list(judge.parameters()))
    verdict = judge(fake)
    loss = F.binary_cross_entropy(verdict, torch.ones_like(verdict))
    return *judged, *torch.autograd.grad(loss, list(model.parameters()))


def _in_layout(thing, layout: str):
    """A tensor or a module, its images and their weights in a memory layout."""
    if layout == "channels last" and isinstance(thing, Tensor) and thing.dim() == 4:
        return thing.to(memory_format=torch.channels_last)
    if isinstance(thing, nn.Module):
        for parameter in thing.parameters():
            parameter.data = _in_layout(parameter.data, layout)
    return thing


def _compiled(model: nn.Module | None) -> nn.Module | None:
    return model and torch.compile(copy.deepcopy(model), dynamic=False)


def _what_runs(run: Callable[[], object]) -> str:
    """The implementations that our ops take in a call."""
    ran: set[str] = set()
    with dispatch.listening(lambda op, name: ran.add(name)):
        run()
    return ", ".join(sorted(ran)) or "torch"


CELLS = [
    GeneratorCell("DCGAN-64 b1", generators.DCGAN, (1, 100, 1, 1), quick=BOTH),
    GeneratorCell("DCGAN-64 b16", generators.DCGAN, (16, 100, 1, 1)),
    GeneratorCell("pix2pix U-Net 256² b1", generators.Pix2pix, (1, 3, 256, 256)),
    GeneratorCell("CycleGAN 256² b1", generators.CycleGAN, (1, 3, 256, 256), quick=()),
    GeneratorCell("StyleGAN2 64² b4", generators.StyleGAN2, (4, 512), quick=()),
    GeneratorCell("HiFi-GAN V1 80·100 b1", generators.HiFiGAN, (1, 80, 100)),
    GeneratorCell("WaveGAN 16384 b8", generators.WaveGAN, (8, 100)),
    GeneratorCell(
        "DCGAN-64 step b16", generators.DCGAN, (16, 100, 1, 1), True, generators.DCGANDiscriminator, quick=()
    ),
    GeneratorCell("WaveGAN 16384 fwd+bwd b8", generators.WaveGAN, (8, 100), True, quick=()),
]


def select(quick: bool) -> list[tuple[GeneratorCell, torch.dtype]]:
    """Pairs of a cell and a dtype, all or the quick subset."""
    return [(cell, dtype) for cell in CELLS for dtype in (cell.quick if quick else cell.dtypes)]
