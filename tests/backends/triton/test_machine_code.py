"""What tools/triton_static.py finds in the Triton kernels, compiled for GPUs that this machine need not have: what must
hold on any version of Triton, and, on that of the committed file, no more registers or memory than it says."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]
BUDGET = ROOT / "benchmarks" / "results" / "triton_static.json"
SHARED_MEMORY = {"sm_80": 163 * 1024, "sm_89": 99 * 1024, "sm_90": 227 * 1024, "sm_100": 227 * 1024}
# Bytes of a thread. Later versions spill none.
SPILLING_BEFORE_3_9 = {"attention 128": 24}
# 64 x 64 by four warps, which are faster on an H200 nevertheless (benchmarks/LOG.md).
SPILLING = {"attention 128 bfloat16 sm_90": 48}

SUMS_AND_COPIES = ("delta", "append", "combine", "statistics", "apply", "gradient_sums", "input_gradient")


def multiplies_matrices(title: str) -> bool:
    name = title.partition(", ")[2].removesuffix(" again")
    return name not in SUMS_AND_COPIES and not title.startswith("depthwise")


def faults(title: str, kernel: dict, spilling: dict[str, int]) -> Iterator[str]:
    """What is wrong with a kernel."""
    architecture = next(word for word in title.replace(",", "").split() if word.startswith("sm_"))
    allowed = max([spilling[feature] for feature in spilling if feature in title], default=0)
    if kernel["spills"] > allowed:
        yield f"{kernel['spills']} bytes spilled"
    if kernel["shared"] > SHARED_MEMORY[architecture]:
        yield f"{kernel['shared']} bytes of shared memory"
    if kernel["registers"] * 32 * kernel["warps"] > 65536:
        yield f"{kernel['registers']} registers of {kernel['warps']} warps"
    if multiplies_matrices(title) and ("float32" not in title or "TF32" in title):
        if kernel["tensor cores"] == 0:
            yield "no tensor cores"
        if kernel["wide"] == 0 and not title.startswith("image"):  # of three channels
            yield "no access of 16 bytes"
        if "descriptors" in title and kernel["descriptors"] == 0:
            yield "no tensor descriptor"
        softmax = title.startswith(("attention", "decode"))  # which multiplies, too
        if kernel["loop FFMA"] > 0 and not softmax:
            yield f"{kernel['loop FFMA']} scalar products in the inner loop"


def test_kernels_and_budget(tmp_path):
    """One test, since all kernels are compiled by one process."""
    triton = pytest.importorskip("triton")
    environment = {**os.environ, "TRITON_CACHE_DIR": str(tmp_path / "cache"), "PYTHONPATH": str(ROOT)}
    command = [sys.executable, ROOT / "tools" / "triton_static.py", "--output", tmp_path / "static.json"]
    run = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    found, budget = (json.loads(path.read_text()) for path in (tmp_path / "static.json", BUDGET))
    assert found["triton"] == triton.__version__
    kernels, allowed = found["kernels"], budget["kernels"]
    spilling = SPILLING | (SPILLING_BEFORE_3_9 if found["triton"] < "3.9" else {})
    wrong = {title: list(faults(title, kernel, spilling)) for title, kernel in kernels.items()}
    assert not {title: messages for title, messages in wrong.items() if messages}
    assert list(kernels) == list(allowed), "run tools/triton_static.py again"
    if found["triton"] == budget["triton"]:
        over = {
            title: (name, kernel[name], allowed[title][name])
            for title, kernel in kernels.items()
            for name in ("registers", "spills", "shared", "narrow", "loop FFMA")
            if kernel[name] > allowed[title][name]
        }
        assert not over, "if that is meant, run tools/triton_static.py again"
