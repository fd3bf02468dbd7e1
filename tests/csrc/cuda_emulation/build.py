"""Builds the CUDA kernels by g++ for their emulation: a library of operators ``torch.ops.NAMESPACE.*`` on the CPU."""

from __future__ import annotations

import fcntl
import hashlib
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
    return shutil.which("g++")  # clang has other names for these options


def build(sources: Iterable[Path], namespace: str, csrc: Path = ROOT / "csrc") -> Path:
    """The library of these .cu files, compiled against ``csrc``; kept until one of the files there changes."""
    cuda = csrc / "cuda"
    plain = [csrc / "library.cpp", cuda / "emulation" / "emulator.cpp", cuda / "emulation" / "memory.cpp"]
    own = sorted((cuda / "emulation").iterdir())
    headers = sorted(path for folder in (csrc, csrc / "common", cuda) for path in folder.glob("*.*h"))
    objects = [compiled(path, namespace, csrc, [*own, path], ["-O2"]) for path in plain]
    checked = ["-O1", "-Wno-unknown-pragmas", *CHECKED]
    objects += [compiled(path, namespace, csrc, [*own, *headers, path], checked) for path in sources]
    library = kept(f"{namespace}.so", objects)
    torch_libraries = [
        f"-L{Path(torch.__file__).parent / 'lib'}",
        "-Wl,--no-as-needed",
        "-ltorch",
        "-ltorch_cpu",
        "-lc10",
    ]
    return make(library, [compiler(), "-shared", *objects, *torch_libraries])


def compiled(source: Path, namespace: str, csrc: Path, read: Iterable[Path], options: list[str]) -> Path:
    """The object file of a source, which includes some of the files ``read``."""
    common = [
        "-std=c++20", "-fPIC", "-fvisibility=hidden", "-U_FORTIFY_SOURCE", "-Wall", "-Wextra",
        f"-Dgpt4fast={namespace}", "-DTORCH_TARGET_VERSION=0x020a000000000000", f"-I{csrc}",
        f"-isystem{Path(torch.__file__).parent / 'include'}", "-x", "c++", "-c",
    ]  # fmt: skip
    target = kept(f"{source.stem}.o", read, f"{torch.__version__} {namespace} {options}")
    return make(target, [compiler(), *common, *options, source])


def kept(name: str, read: Iterable[Path], text: str = "") -> Path:
    """Where a file lies that is made from what the files ``read`` hold."""
    digest = hashlib.sha256((text + Path(__file__).read_text()).encode())
    for path in read:
        digest.update(path.read_bytes())
    return FOLDER / digest.hexdigest()[:16] / name


def make(target: Path, command: list) -> Path:
    target.parent.mkdir(parents=True, exist_ok=True)
    with target.with_suffix(".lock").open("w") as lock:  # workers of pytest-xdist want the same files
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not target.exists():
            partial = target.with_suffix(".partial")
            result = subprocess.run([*command, "-o", partial], capture_output=True, text=True)
            assert result.returncode == 0, result.stderr
            partial.replace(target)
    return target
