"""The tests of this folder run on an NVIDIA GPU, at real sizes: what the emulation and the interpreter cannot show."""

from __future__ import annotations

import fcntl
import gc
import tempfile
from pathlib import Path

import pytest
import torch

from gpt4fast.backends import refusals
from gpt4fast.backends.triton import availability, tuning


@pytest.fixture(params=["cuda", "triton"])
def impl(request):
    """Each implementation for GPUs that is installed."""
    request.getfixturevalue(f"needs_{request.param}")
    return request.param


@pytest.fixture
def needs_cuda() -> None:
    if refusals.CUDA_LIBRARY_ERROR is not None:
        pytest.skip(refusals.CUDA_LIBRARY_ERROR)


@pytest.fixture
def needs_triton() -> None:
    if not availability.INSTALLED:
        pytest.skip("triton is not installed")


@pytest.fixture(autouse=True)
def _heuristic_tiles(monkeypatch):
    """Tiles are not tuned: five compilations instead of one, and other sums of the same call."""
    monkeypatch.setattr(tuning, "fastest", lambda kernel, shape_class, tile, *_: tile)


@pytest.fixture(autouse=True)
def _exact_float32(exact_float32) -> None:
    """Products of float32 are exact at first; a test that says otherwise says it for itself alone."""


@pytest.fixture
def room():
    """``room(gibibytes)`` skips the test where the GPU has less memory free. One test at a time may ask: workers of
    pytest-xdist share the GPU."""
    with (Path(tempfile.gettempdir()) / "gpt4fast_gpu_memory.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        gc.collect()
        torch.cuda.empty_cache()

        def require(gibibytes: float) -> None:
            free = torch.cuda.mem_get_info()[0] / 2**30
            if free < gibibytes:
                pytest.skip(f"needs {gibibytes} GiB of the GPU's memory, and {free:.1f} are free")

        yield require
        gc.collect()
        torch.cuda.empty_cache()
