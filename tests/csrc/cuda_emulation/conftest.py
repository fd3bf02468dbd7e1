"""The operators of csrc/cuda, emulated: ``torch.ops.gpt4fast_emulation.*`` on CPU tensors."""

from __future__ import annotations

import sys

import pytest
import torch

from .build import CUDA_SOURCES, build, compiler


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if compiler() is None or sys.platform != "linux":
        for item in items:
            if "cuda_emulation" in item.path.parts:
                item.add_marker(pytest.mark.skip(reason="the emulation of CUDA needs g++ and Linux"))


@pytest.fixture(scope="session")
def emulated():
    torch.ops.load_library(str(build(CUDA_SOURCES, "gpt4fast_emulation")))
    return torch.ops.gpt4fast_emulation
