"""What the text training loops share: optimizers, the learning-rate schedule, clipped steps."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable

import torch
from torch import nn


class Muon(torch.optim.Optimizer):
    """Momentum whose every step is made orthogonal (Jordan et al. 2024), for matrices.

    A step is scaled by 0.2 · sqrt(larger side), the size of AdamW's (Liu et al. 2025): one learning rate serves both.
    torch.optim.Muon works in bfloat16, which a CPU without such instructions computes 40 times slower than float32;
    here it is the parameter's own dtype on a CPU.
    """

    def __init__(self, params: Iterable[torch.Tensor], lr: float, weight_decay: float = 0.1, momentum: float = 0.95):
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay, "momentum": momentum})

    @torch.no_grad()
    def step(self) -> None:
        for group in self.param_groups:
            by_shape: dict[tuple[int, ...], list[torch.Tensor]] = {}
            for parameter in group["params"]:
                if parameter.grad is not None:
                    by_shape.setdefault(tuple(parameter.shape), []).append(parameter)
            for shape, parameters in by_shape.items():
                directions = torch.stack([self._nesterov(p, group["momentum"]) for p in parameters])
                rate = group["lr"] * 0.2 * max(shape) ** 0.5
                for parameter, direction in zip(parameters, orthogonalize(directions), strict=True):
                    parameter.mul_(1 - group["lr"] * group["weight_decay"]).add_(direction, alpha=-rate)

    def _nesterov(self, parameter: torch.Tensor, momentum: float) -> torch.Tensor:
        state = self.state[parameter]
        average = state.setdefault("momentum", torch.zeros_like(parameter))
        average.lerp_(parameter.grad, 1 - momentum)
        return parameter.grad.lerp(average, momentum)


def orthogonalize(matrices: torch.Tensor) -> torch.Tensor:
    """Nearly U Vᵀ of each of the matrices (n, rows, columns) = U S Vᵀ: singular values come out between 0.7 and 1.2.

    Five Newton-Schulz steps with the coefficients of Jordan et al., in bfloat16 on a GPU.
    """
    x = matrices.bfloat16() if matrices.is_cuda else matrices
    tall = x.shape[1] > x.shape[2]
    if tall:
        x = x.mT
    x = x / x.norm(dim=(1, 2), keepdim=True).clamp_min(1e-7)
    for _ in range(5):
        gram = x @ x.mT
        x = 3.4445 * x + (-4.7750 * gram + 2.0315 * gram @ gram) @ x
    return (x.mT if tall else x).to(matrices.dtype)


def make_optimizers(model: nn.Module, lr: float, weight_decay: float) -> dict[str, torch.optim.Optimizer]:
    """Muon for the matrices within the blocks, AdamW for embeddings, heads, norms and biases.

    On Shakespeare this reaches AdamW's validation loss in half the steps. beta2 is 0.95: in a short run the second
    moment must follow faster than torch's 0.999 lets it.
    """
    linear = {id(m.weight) for n, m in model.named_modules() if isinstance(m, nn.Linear) and not n.endswith("head")}
    # A head may share its weight with the embedding under another name: an embedding is never Muon's.
    linear -= {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
    parameters = [p for p in model.parameters() if p.requires_grad]
    matrices = [p for p in parameters if id(p) in linear]
    rest = [p for p in parameters if id(p) not in linear]
    adamw = torch.optim.AdamW(rest, lr=lr, betas=(0.9, 0.95), weight_decay=0.0)
    return {"muon": Muon(matrices, lr, weight_decay), "adamw": adamw}


def warmup_cosine(step: int, steps: int, warmup: float = 0.05, floor: float = 0.05) -> float:
    """Share of the peak learning rate at `step` (from 0): linear up to the share `warmup`, then a half cosine.

    Ends at `floor`. The warm-up is at least one step, so step 0 never has rate 0.
    """
    warm = max(1, int(warmup * steps))
    if step < warm:
        return (step + 1) / warm
    done = (step - warm) / max(1, steps - 1 - warm)
    return floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * min(1.0, done)))


def clipped_step(optimizers: Collection[torch.optim.Optimizer], lr: float, max_norm: float) -> float:
    """One step at the given rate with the joint gradient norm clipped; clears the gradients, returns the old norm."""
    groups = [group for optimizer in optimizers for group in optimizer.param_groups]
    norm = nn.utils.clip_grad_norm_([p for group in groups for p in group["params"]], max_norm)
    for group in groups:
        group["lr"] = lr
    for optimizer in optimizers:
        optimizer.step()
        optimizer.zero_grad()
    return float(norm)


def positive(**values: float) -> None:
    """ValueError naming the first value that is not above 0."""
    for name, value in values.items():
        if not value > 0:
            raise ValueError(f"{name} must be above 0, was {value}")
