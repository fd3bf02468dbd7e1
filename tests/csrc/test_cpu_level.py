"""The CPU level: what is detected, what runs, and that it can be forced."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from gpt4fast.backends import native

pytestmark = pytest.mark.usefixtures("needs_native")

LEVELS = ("scalar", "avx2", "avx512", "avx512_bf16")
# The names of the kernel's feature list that each level is made of.
FLAGS = {
    "avx2": {"avx2", "fma", "f16c"},
    "avx512": {"avx512f", "avx512dq", "avx512bw", "avx512vl"},
    "avx512_bf16": {"avx512_bf16"},
}


def in_subprocess(code: str, level: str) -> subprocess.CompletedProcess:
    environment = {**os.environ, "GPT4FAST_CPU_LEVEL": level}
    return subprocess.run(  # python -c looks for modules in the working folder first: that of the package under test
        [sys.executable, "-c", code],
        env=environment,
        cwd=native.PACKAGE.parent,
        capture_output=True,
        text=True,
        timeout=120,
    )


@pytest.mark.skipif(not Path("/proc/cpuinfo").is_file(), reason="the kernel lists no features here")
def test_detected_level_agrees_with_the_kernel():
    line = next((x for x in Path("/proc/cpuinfo").read_text().splitlines() if x.startswith("flags")), "flags:")
    present = set(line.partition(":")[2].split())
    expected = "scalar"
    for level in LEVELS[1:]:
        if not FLAGS[level] <= present:
            break
        expected = level
    info = native.build_info()
    assert info["cpu_level_detected"] == expected
    assert set(info["cpu_features"]) == present & set().union(*FLAGS.values())


def test_active_level_is_the_highest_compiled_and_supported():
    info = native.build_info()
    supported = LEVELS[: LEVELS.index(info["cpu_level_detected"]) + 1]
    result = in_subprocess("from gpt4fast.backends import native; print(native.cpu_level())", "")
    assert result.stdout.strip() == max(set(info["cpu_levels_compiled"]) & set(supported), key=LEVELS.index)


def test_every_compiled_level_up_to_the_machines_can_be_forced():
    info = native.build_info()
    supported = LEVELS[: LEVELS.index(info["cpu_level_detected"]) + 1]
    for level in set(info["cpu_levels_compiled"]) & set(supported):
        result = in_subprocess("from gpt4fast.backends import native; print(native.cpu_level())", level)
        assert result.stdout.strip() == level, result.stderr


@pytest.mark.parametrize(("level", "reason"), [("sse9", "is not a CPU level"), ("Scalar", "is not a CPU level")])
def test_unknown_level_in_the_environment_is_a_clear_error(level, reason):
    code = "import torch\nfrom gpt4fast.backends import native\nnative.load()"
    result = in_subprocess(code, level)
    last = result.stderr.strip().splitlines()[-1]
    assert result.returncode == 1
    assert last.startswith(f"ValueError: GPT4FAST_CPU_LEVEL: '{level}' {reason}; expected one of: scalar"), last


def test_level_without_kernels_or_support_is_refused_and_changes_nothing():
    info = native.build_info()
    before = native.cpu_level()
    for level in set(LEVELS) - set(info["cpu_levels_compiled"]):
        supported = LEVELS.index(level) <= LEVELS.index(info["cpu_level_detected"])
        reason = "has no kernels in this build" if supported else "is not supported by this processor"
        with pytest.raises(ValueError, match=f"force_cpu_level: '{level}' {reason}.*expected one of: scalar"):
            native.force_cpu_level(level)
    with pytest.raises(ValueError, match="'' is not a CPU level"):
        native.force_cpu_level("")
    assert native.cpu_level() == before
    native.force_cpu_level(before)
    assert native.cpu_level() == before
