"""What implementations ask of autograd, and of what records or transforms a program."""

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
    """Where our kernels have no part: under torch.func and forward-mode differentiation, for which they have no rules,
    and in what torch.export, torch.onnx and torch.jit.trace record, since that runs where gpt4fast is not installed."""
    if torch.compiler.is_compiling():
        return torch.compiler.is_exporting()
    return (
        torch._C._are_functorch_transforms_active()
        or forward_ad._current_level >= 0
        or torch._C._get_tracing_state() is not None
    )


def known(condition: bool | torch.SymBool) -> bool:
    """Whether a condition on sizes holds; in an exported program, whether it does for all sizes that it leaves open,
    which a mere question would narrow."""
    if not torch.compiler.is_exporting():
        return bool(condition)
    from torch.fx.experimental.symbolic_shapes import statically_known_true  # takes 0.3 s to import

    return statically_known_true(condition)
