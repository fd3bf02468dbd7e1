"""The CUDA kernel of affine_activation, emulated, against float64: the cases of ../test_affine_activation.py."""

from __future__ import annotations

import pytest
import torch

from ..test_affine_activation import DTYPES, SHAPES, check, layouts, parameters


@pytest.fixture(autouse=True)
def _cuda_ops(cuda_ops, monkeypatch):
    monkeypatch.setattr(torch.ops, "gpt4fast", cuda_ops)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("activation", ["none", "leaky_relu", "gelu"])
def test_values(activation, dtype):
    for shape in SHAPES:
        for layout in layouts(shape):
            x = (3 * torch.randn(shape)).to(dtype).contiguous(memory_format=layout)
            check(x, *parameters(shape[1]), activation)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_start_that_is_not_aligned_and_tails(dtype):
    for offset, length in ((0, 5), (1, 9), (3, 16)):
        x = torch.randn(offset + 2 * 3 * length).to(dtype)[offset:].view(2, 3, length)
        check(x, *parameters(3), "relu")
        check(x, None, None, None, "relu")
