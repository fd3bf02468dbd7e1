"""What implementations ask of autograd."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd import forward_ad


def needs_grad(*tensors: Tensor | None) -> bool:
    """Whether a result of these tensors must be differentiable."""
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)


def in_forward_mode() -> bool:
    return not torch.compiler.is_compiling() and forward_ad._current_level >= 0


def in_transform() -> bool:
    """Under torch.func or forward-mode differentiation, for which a kernel of ours has no rules."""
    return in_forward_mode() or (not torch.compiler.is_compiling() and torch._C._are_functorch_transforms_active())
