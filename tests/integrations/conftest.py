"""Shared by the tests of models from libraries."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

import gpt4fast
from gpt4fast.backends import dispatch

OP_OF = {
    F.scaled_dot_product_attention: "attention",
    F.multi_head_attention_forward: "attention",
    F.conv_transpose1d: "conv_transpose",
    F.conv_transpose2d: "conv_transpose",
    F.conv_transpose3d: "conv_transpose",
}


class _Calls(TorchFunctionMode):
    """Counts the calls of torch that gpt4fast has an op for."""

    def __init__(self) -> None:
        self.counts = Counter()

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func in OP_OF:
            self.counts[OP_OF[func]] += 1
        return func(*args, **(kwargs or {}))


@pytest.fixture
def check_optimized() -> Callable:
    @torch.no_grad()
    def check(plain: nn.Module, run: Callable[[nn.Module], Tensor]) -> tuple[nn.Module, Counter]:
        """The optimized model gives the same, and every call that gpt4fast has an op for runs on that; gives the model
        and the number of calls of each op."""
        plain.eval()
        for p in plain.parameters():  # gates of zero would hide what they gate
            p.uniform_(0.1, 1) if p.dim() < 2 else p.normal_(0, p[0].numel() ** -0.5)
        fast, heard = gpt4fast.optimize(plain), Counter()
        with _Calls() as calls:
            expected = run(plain)
        with dispatch.listening(lambda op, implementation: heard.update([op.name])):
            got = run(fast)
        assert expected.std() > 1e-3
        torch.testing.assert_close(got, expected, rtol=1e-3, atol=1e-3 * float(expected.std()))
        assert heard == calls.counts
        return fast, heard

    return check
