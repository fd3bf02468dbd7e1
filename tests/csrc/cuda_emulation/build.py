"""Builds the CUDA kernels by g++ for their emulation, as a library of operators ``torch.ops.NAMESPACE.*`` on the CPU."""

from __future__ import annotations

import fcntl
import hashlib
import os
import shutil
import subprocess
from collections.abc import Iterable
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[3]
FOLDER = ROOT / "build" / "emulation"
CUDA_SOURCES = sorted((ROOT / "csrc" / "cuda").glob("*.cu"))
# Calls a function of csrc/cuda/emulation/memory.cpp before every access to memory.
CHECKED = [
    "-fsanitize=kernel-address",
    *(f"--param={name}=0" for name in ("asan-instrumentation-with-call-threshold", "asan-stack", "asan-globals")),
]


def compiler() -> str | None:
    return shutil.which(os.environ.get("CXX", "g++"))


def build(sources: Iterable[Path], namespace: str, csrc: Path = ROOT / "csrc") -> Path:
    """The library of these .cu files, compiled against ``csrc``; kept until one of the files there changes."""
    include, cuda = Path(torch.__file__).parent / "include", csrc / "cuda"
    plain = [csrc / "library.cpp", cuda / "emulation" / "emulator.cpp", cuda / "emulation" / "memory.cpp"]
    sources = [*plain, *sources]
    digest = hashlib.sha256(f"{torch.__version__} {namespace} {sources}".encode())
    headers = [path for folder in (csrc, csrc / "common", cuda, cuda / "emulation") for path in folder.glob("*.*h")]
    for path in [*sources, *sorted(headers), Path(__file__)]:
        digest.update(path.read_bytes())
    folder = FOLDER / digest.hexdigest()[:16]
    folder.mkdir(parents=True, exist_ok=True)
    library = folder / f"{namespace}.so"
    with (folder / "lock").open("w") as lock:  # workers of pytest-xdist want the same library
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not library.exists():
            options = [
                "-std=c++20", "-fPIC", "-fvisibility=hidden", "-U_FORTIFY_SOURCE", "-Wall", "-Wextra",
                f"-Dgpt4fast={namespace}", "-DTORCH_TARGET_VERSION=0x020a000000000000", f"-I{csrc}",
                f"-isystem{include}",
            ]  # fmt: skip
            objects = []
            for source in sources:
                objects.append(folder / f"{source.stem}.o")
                how = ["-O2"] if source in plain else ["-O1", "-Wno-unknown-pragmas", *CHECKED]
                run([compiler(), *options, *how, "-x", "c++", "-c", source, "-o", objects[-1]])
            partial = library.with_suffix(".partial")
            torch_libraries = [f"-L{include.parent / 'lib'}", "-Wl,--no-as-needed", "-ltorch", "-ltorch_cpu", "-lc10"]
            run([compiler(), "-shared", *objects, *torch_libraries, "-o", partial])
            partial.replace(library)
    return library


def run(command: list) -> None:
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
