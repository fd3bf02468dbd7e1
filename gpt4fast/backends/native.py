"""Loads the native libraries and keeps the reason where one is not loaded.

The libraries lie beside the package's own files and register their kernels with torch when they are loaded. The CUDA
library is loaded only where torch sees a GPU. Nothing is compiled here, and nothing here raises for a library that is
missing or does not fit: `dispatch` falls back and tells the reason kept here.
"""

from __future__ import annotations

import functools
import importlib
import platform
from pathlib import Path
from types import ModuleType

import torch

PACKAGE = Path(__file__).resolve().parent.parent


@functools.cache
def load() -> tuple[str | None, str | None]:
    """Load the libraries, once. Returns for the CPU library and the CUDA library None or the reason it is not loaded.

    Raises ValueError where GPT4FAST_CPU_LEVEL names a level that is unknown, not compiled or not supported here.
    """
    cpu_error = _load_library("libgpt4fast_cpu.so") or _load_bindings()
    if cpu_error is not None:
        return cpu_error, cpu_error
    _bindings().cpu_level()  # a bad GPT4FAST_CPU_LEVEL is an error now and not in the middle of a kernel
    if not torch.cuda.is_available():
        return None, "torch sees no CUDA device"
    return None, _load_library("libgpt4fast_cuda.so")


def _load_library(name: str) -> str | None:
    path = PACKAGE / name
    if not path.is_file():
        note = PACKAGE / "pure_python.txt"
        if note.is_file():
            return f"gpt4fast was installed as pure Python: {note.read_text().strip()}"
        if name == "libgpt4fast_cuda.so":
            return "gpt4fast was built without CUDA: nvcc was not found then, or GPT4FAST_CUDA=off"
        return f"{name} is not in {PACKAGE}: gpt4fast is used from a source tree that was not built (pip install -e .)"
    try:
        torch.ops.load_library(str(path))
    except OSError as error:  # built for another machine, or for a torch whose ABI does not fit
        return f"{name} does not load with torch {torch.__version__}: {error}"
    return None


def _load_bindings() -> str | None:
    try:
        _bindings()
    except ImportError as error:  # also where it was built for another Python version
        return f"the module gpt4fast._C does not load with Python {platform.python_version()}: {error}"
    return None


def _bindings() -> ModuleType:
    return importlib.import_module("gpt4fast._C")


def cpu_library_error() -> str | None:
    """None where the CPU library is loaded, else the reason why not."""
    return load()[0]


def cuda_library_error() -> str | None:
    """None where the CUDA library is loaded, else the reason why not."""
    return load()[1]


def build_info() -> dict:
    """What the libraries were built with: compiler, nvcc, torch, CPU levels. {} where the CPU library is not loaded."""
    return {} if cpu_library_error() else _bindings().build_info()


def cpu_level() -> str:
    """The instruction set that native CPU kernels run at, or "none" where the CPU library is not loaded."""
    return "none" if cpu_library_error() else _bindings().cpu_level()


def force_cpu_level(name: str) -> None:
    """Run native CPU kernels at level `name` from now on.

    Raises ValueError where the level is unknown, not compiled or not supported, RuntimeError without the CPU library.
    """
    if cpu_library_error():
        raise RuntimeError(f"expected the CPU library to be loaded, but {cpu_library_error()}")
    _bindings().force_cpu_level(name)
