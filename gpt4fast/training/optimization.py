"""What the text training loops share: optimizers, the learning-rate schedule, clipped steps."""

from __future__ import annotations

import math
from collections.abc import Collection

import torch
from torch import nn


def make_optimizers(model: nn.Module, lr: float, weight_decay: float) -> dict[str, torch.optim.Optimizer]:
    """Muon (Jordan et al. 2024) for the matrices within the blocks, AdamW for all else: embeddings, heads, norms, biases.

    Muon takes steps with orthogonal matrices; scaled to the size of AdamW's steps ("match_rms_adamw", Liu et al. 2025)
    one learning rate serves both. On Shakespeare it reaches AdamW's validation loss in half the steps. beta2 is 0.95:
    in a short run the second moment must follow faster than torch's 0.999 lets it.
    """
    linear = {id(m.weight) for n, m in model.named_modules() if isinstance(m, nn.Linear) and not n.endswith("head")}
    # A head may share its weight with the embedding under another name: an embedding is never Muon's.
    linear -= {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
    parameters = [p for p in model.parameters() if p.requires_grad]
    matrices = [p for p in parameters if id(p) in linear]
    rest = [p for p in parameters if id(p) not in linear]
    muon = torch.optim.Muon(matrices, lr=lr, weight_decay=weight_decay, adjust_lr_fn="match_rms_adamw")
    return {"muon": muon, "adamw": torch.optim.AdamW(rest, lr=lr, betas=(0.9, 0.95), weight_decay=0.0)}


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
    """One step at the given rate with the joint gradient norm clipped; clears the gradients, returns the norm before."""
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
