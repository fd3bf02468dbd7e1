"""The operators of csrc/cuda, emulated: ``torch.ops.gpt4fast_emulation.*`` on CPU tensors. The same tests run on a GPU
where there is one."""

from __future__ import annotations

import sys

import pytest
import torch

from .build import CUDA_SOURCES, build, compiler


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if compiler() is None or sys.platform != "linux":
        for item in items:
            if "cuda_emulation" in item.path.parts and "gpu" not in item.keywords:
                item.add_marker(pytest.mark.skip(reason="the emulation of CUDA needs g++ and Linux"))


@pytest.fixture(scope="session", params=["emulation", pytest.param("gpu", marks=pytest.mark.gpu)])
def cuda_ops(request):
    """The operators of csrc/cuda as functions of CPU tensors: emulated, or on a GPU."""
    if request.param == "gpu":
        return OnGpu()
    torch.ops.load_library(str(build(CUDA_SOURCES, "gpt4fast_emulation")))
    return torch.ops.gpt4fast_emulation


class OnGpu:
    """``torch.ops.gpt4fast`` for copies of its arguments on a GPU; what it writes into them is copied back."""

    def __init__(self) -> None:
        self.ops = torch.ops.gpt4fast

    def __getattr__(self, name: str):
        op = getattr(self.ops, name).default

        def run(*arguments):
            copies = [x.cuda() if isinstance(x, torch.Tensor) else x for x in arguments]
            results = op(*copies)
            for given, copy, argument in zip(arguments, copies, op._schema.arguments, strict=False):
                if given is not None and argument.alias_info is not None:  # written to
                    given.copy_(copy)
            return results.cpu() if isinstance(results, torch.Tensor) else tuple(x.cpu() for x in results)

        return run
