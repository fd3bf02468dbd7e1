"""Everything that needs an NVIDIA GPU, in some eight minutes: tests, compute-sanitizer, speed. Called by `make gpu`.

First, side by side, the tests marked `gpu`, Triton's tests on the GPU, compute-sanitizer on the CUDA kernels, and
processes that compile what the speed table needs; then the table, alone. Logs and JSON go to --output; a short table
comes last. The exit code is 1 where a test failed or a check found something.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PYTHON = sys.executable
WARMING = 4  # processes
# -P: what is installed, not the source tree; -v: the names of tests that failed before it was stopped
PYTEST = [PYTHON, "-P", "-m", "pytest", "-v", "-p", "no:cacheprovider", "-p", "no:benchmark"]
TABLE = [PYTHON, "-P", "-m", "gpt4fast.benchmarks.gpu"]
TRITON = ["tests/backends/triton", "--ignore", "tests/backends/triton/test_machine_code.py"]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, required=True, help="folder for logs and JSON")
    parser.add_argument("--check-seconds", type=float, default=240.0, help="the tests are stopped after so many")
    parser.add_argument("--table-seconds", type=float, default=150.0, help="no cell is begun after so many")
    options = parser.parse_args()
    output = options.output.resolve()
    output.mkdir(parents=True, exist_ok=True)
    os.environ.setdefault("GPT4FAST_CACHE_DIR", str(output / "tuning"))
    codes = side_by_side(checks() | warming(output), output, options.check_seconds)
    run = [*TABLE, "--output", str(output), "--seconds", str(options.table_seconds)]
    codes["table"] = subprocess.run(run, cwd=ROOT).returncode
    for name, code in codes.items():
        log = output / f"{name}.log"
        lines = log.read_text(errors="replace").strip().splitlines() if log.is_file() else []
        print(f"{name}: exit {code}. {lines[-1] if lines else ''}")
    return int(any(code != 0 for code in codes.values()))


def checks() -> dict[str, list[str]]:
    workers = str(max(1, (len(os.sched_getaffinity(0)) - 2) // 2))
    commands = {
        "tests": [*PYTEST, "-m", "gpu", "-n", workers, "tests/gpu", "tests/csrc"],
        "triton": [*PYTEST, "-n", workers, *TRITON],
    }
    sanitizer, small = shutil.which("compute-sanitizer"), "tests/csrc/cuda_emulation"
    battery = [*PYTEST, "-m", "gpu", small]
    if sanitizer:
        commands["tests"] += ["--ignore", small]
        for tool in ("memcheck", "racecheck"):
            ours = ["--kernel-name", "kernel_substring=gpt4fast", "--error-exitcode", "9"]
            commands[tool] = [sanitizer, "--tool", tool, *ours, *battery]
    return commands


def warming(output: Path) -> dict[str, list[str]]:
    command = [*TABLE, "--output", str(output), "--seconds", "60"]
    return {f"warm{i}": [*command, "--warm", str(i), str(WARMING)] for i in range(WARMING)}


def side_by_side(commands: dict[str, list[str]], output: Path, seconds: float) -> dict[str, int | str]:
    """Exit codes; "stopped" for what took longer. A process's output goes to its log."""
    deadline, running = time.monotonic() + seconds, {}
    for name, command in commands.items():
        environment = os.environ | ({"GPT4FAST_CACHE_DIR": str(output / name)} if name.startswith("warm") else {})
        with open(output / f"{name}.log", "w") as log:
            running[name] = subprocess.Popen(
                command, stdout=log, stderr=log, cwd=ROOT, env=environment, start_new_session=True
            )
    codes: dict[str, int | str] = {}
    for name, process in running.items():
        try:
            codes[name] = process.wait(max(0.0, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            os.kill(process.pid, signal.SIGINT)  # pytest tells then what has failed so far
            codes[name] = "stopped"
    for name, process in running.items():
        if codes[name] == "stopped":
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(30)
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)  # with its workers
    return codes


if __name__ == "__main__":
    sys.exit(main())
