"""Shared by all tests: threads, and fresh random input each run.

GPT4FAST_TEST_SEED gives the seed (it is printed), GPT4FAST_TEST_EXAMPLES the number of random calls of each property
(200).
"""

from __future__ import annotations

import os
import random
import sys
from collections.abc import Iterator

import pytest
import torch
from hypothesis import HealthCheck, settings

if not torch.cuda.is_available():  # before anything reads it: Triton's kernels run in its interpreter
    os.environ.setdefault("TRITON_INTERPRET", "1")

from gpt4fast.backends import native  # noqa: E402

torch.set_num_threads(1 if "PYTEST_XDIST_WORKER" in os.environ else 2)
# Workers of pytest-xdist inherit the seed through the environment.
SEED = int(os.environ.setdefault("GPT4FAST_TEST_SEED", str(random.randrange(2**31))))

# A machine busy with something else must not fail a test: no deadline, no checks of how fast examples come.
settings.register_profile(
    "gpt4fast",
    max_examples=int(os.environ.get("GPT4FAST_TEST_EXAMPLES", "200")),
    deadline=None,
    suppress_health_check=list(HealthCheck),
)
settings.load_profile("gpt4fast")


def pytest_report_header() -> list[str]:
    native.load()
    library = native.cpu_library_error() or "loaded"
    return [f"gpt4fast: native library: {library}; GPT4FAST_TEST_SEED={SEED}"]


@pytest.fixture(autouse=True)
def _seed() -> Iterator[None]:
    torch.manual_seed(SEED)
    yield
    if torch.cuda.is_initialized():
        try:
            torch.cuda.synchronize()
        except RuntimeError as error:  # no kernel runs in this process any more: let pytest-xdist blame this test
            sys.stderr.write(f"{error}\n")
            sys.stderr.flush()
            os._exit(70)


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


@pytest.fixture(params=["scalar", "avx2", "avx512", "avx512_bf16"])
def level(request, needs_native):
    """Runs the test at each CPU level that the processor has."""
    before = native.cpu_level()
    try:
        native.force_cpu_level(request.param)
    except ValueError as reason:
        pytest.skip(str(reason))
    yield request.param
    native.force_cpu_level(before)


@pytest.fixture
def every_call_dispatched():
    """Calls of transposed convolution go through dispatch even when the same was seen before."""
    from gpt4fast.backends import dispatch

    with dispatch.listening(lambda op, name: None):
        yield


@pytest.fixture
def exact_float32() -> Iterator[None]:
    """Products of float32 on a GPU are exact, torch's too."""
    convolutions, products = torch.backends.cudnn.conv, torch.backends.cuda.matmul
    before = convolutions.fp32_precision, products.allow_tf32
    convolutions.fp32_precision, products.allow_tf32 = "ieee", False
    yield
    convolutions.fp32_precision, products.allow_tf32 = before
