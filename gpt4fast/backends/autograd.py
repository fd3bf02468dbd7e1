"""What implementations ask of autograd."""

from __future__ import annotations

import torch
from torch import Tensor


def needs_grad(*tensors: Tensor | None) -> bool:
    """Whether a result of these tensors must be differentiable."""
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)
