"""The machine code of the CUDA kernels, which needs no GPU, and the budget in benchmarks/results/cuda_static.json."""

from __future__ import annotations

import json
import re
import shutil
import sys
from pathlib import Path

import pytest

from gpt4fast.backends import native

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "tools"))
import cuda_static  # noqa: E402

MOST_KERNELS = 81  # of one architecture: more would take long to compile, and to read
# Bytes of local memory: a few numbers more than the 255 registers hold, stored and read once in 256 products.
SPILLING = {f"attention_forward_kernel<{dtype}, 128, false>": 32 for dtype in ("BFloat16", "Half")}


@pytest.fixture(scope="module")
def kernels() -> dict[str, dict[str, int]]:
    library = native.PACKAGE / "libgpt4fast_cuda.so"
    if not library.is_file():
        pytest.skip("libgpt4fast_cuda.so was not built: no nvcc")
    if cuda_static.tool("cuobjdump") is None or shutil.which("c++filt") is None:
        pytest.skip("no cuobjdump or c++filt")
    return cuda_static.describe(library)


def faults(name: str, kernel: dict[str, int]):
    """What is wrong with a kernel whatever the budget says."""
    attends = re.search(r"attention_(forward|decode|query_gradient|key_gradient)\w*_kernel<(\w+), .*?(\d+)", name)
    multiplies = attends or "conv_transpose" in name
    exact = attends[2] == "float" if attends else "(Products)2" in name  # float32, not as TF32
    threads = 128
    if attends and attends[1] == "key_gradient" and attends[3] == "256":
        threads = 128 if exact else 256
    elif attends and exact:
        threads = 64 if attends[1].endswith("gradient") or attends[3] == "256" else 128
    if re.search("affine|rows|batch|sum_parts|hopper", name):
        threads = 384 if "hopper" in name and attends[3] == "64" else 256
    if kernel["spills"] > max((allowed for part, allowed in SPILLING.items() if part in name), default=0):
        yield f"{kernel['spills']} bytes of local memory"
    if kernel["registers"] * threads > 65536:
        yield f"{kernel['registers']} registers"
    if multiplies and (kernel["tensor cores"] == 0) != exact:
        yield f"{kernel['tensor cores']} instructions of tensor cores"
    # Which turns no numbers of 32 bits, that a gradient of the weight reads one by one. Hopper reads for itself.
    reads_alone = re.search("weight_gradient_kernel<float|hopper", name)
    if multiplies and not exact and not reads_alone and kernel["matrices"] == 0:
        yield "no ldmatrix"
    if "hopper" in name and kernel["waits"] > 5:  # where ptxas cannot follow what registers hold, it waits for each
        yield f"{kernel['waits']} waits for products"
    if "hopper" in name and kernel["beside"] == 0:  # nvcc moved what it could
        yield "weights are taken behind the products, not beside them"
    if multiplies and kernel["asynchronous"] == 0:
        yield "no asynchronous copies of 16 bytes"
    if re.search("affine_activation|batch_(norm|statistics)", name) and kernel["wide"] < 2:
        yield "no accesses of 16 bytes"


def test_kernels(kernels):
    wrong = {name: list(faults(name, kernel)) for name, kernel in kernels.items()}
    assert not {name: messages for name, messages in wrong.items() if messages}
    for architecture in {name.split()[0] for name in kernels}:
        assert sum(name.startswith(f"{architecture} ") for name in kernels) <= MOST_KERNELS


def test_budget(kernels):
    budget = json.loads((ROOT / "benchmarks" / "results" / "cuda_static.json").read_text())
    built = {name.split()[0] for name in kernels}
    assert set(kernels) == {name for name in budget if name.split()[0] in built}, "run tools/cuda_static.py again"
    over = {
        name: (number, kernel[number], budget[name][number])
        for name, kernel in kernels.items()
        for number in ("registers", "spills", "narrow")
        if kernel[number] > budget[name][number] * (1.1 if number == "registers" else 1)  # nvcc of another version
    }
    assert not over, "if that is meant, run tools/cuda_static.py again"
