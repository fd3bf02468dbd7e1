"""Shared by all tests: threads, and fresh random input each run (the seed is printed, and can be given)."""

from __future__ import annotations

import os
import random

import pytest
import torch

from gpt4fast.backends import native

torch.set_num_threads(1 if "PYTEST_XDIST_WORKER" in os.environ else 2)
# Workers of pytest-xdist inherit the seed through the environment.
SEED = int(os.environ.setdefault("GPT4FAST_TEST_SEED", str(random.randrange(2**31))))


def pytest_report_header() -> list[str]:
    native.load()
    library = native.cpu_library_error() or "loaded"
    return [f"gpt4fast: native library: {library}; GPT4FAST_TEST_SEED={SEED}"]


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(SEED)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if not torch.cuda.is_available():
        skip = pytest.mark.skip(reason="needs a GPU")
        for item in items:
            if "gpu" in item.keywords:
                item.add_marker(skip)


@pytest.fixture
def needs_native() -> None:
    """Skips the test where no native library is installed (GPT4FAST_BUILD=off)."""
    if native.cpu_library_error() is not None:
        pytest.skip(f"no native library: {native.cpu_library_error()}")
