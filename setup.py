"""Builds the native libraries with CMake, or installs pure Python where that cannot be done.

GPT4FAST_BUILD=auto builds where a compiler and torch are found, else warns; on makes that an error; off does not build.
GPT4FAST_CUDA=auto|on|off and GPT4FAST_SANITIZE=1 are for CMakeLists.txt. Everything else is in pyproject.toml.
"""

from __future__ import annotations

import functools
import importlib.util
import os
import re
import shutil
import site
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import Command, Distribution, setup
from setuptools.command.build import build

ROOT = Path(__file__).resolve().parent
TORCH_MINIMUM = (2, 10)
MODE = os.environ.get("GPT4FAST_BUILD") or "auto"
CUDA = os.environ.get("GPT4FAST_CUDA") or "auto"
SANITIZE = os.environ.get("GPT4FAST_SANITIZE") or "off"
# Kept, so that a second build compiles only what changed.
FOLDER = ROOT / "build" / f"cmake-{sys.implementation.cache_tag}-sanitize-{SANITIZE}"
for name, value in {"GPT4FAST_BUILD": MODE, "GPT4FAST_CUDA": CUDA}.items():
    if value not in ("auto", "on", "off"):
        sys.exit(f"{name}: expected auto, on or off, but it is {value!r}")


@functools.cache
def torch_folder() -> Path | None:
    """The user's torch, found without importing it. pip's isolated build environment hides it from sys.path only."""
    folders = [sysconfig.get_path("purelib"), sysconfig.get_path("platlib"), *site.getsitepackages()]
    if sys.prefix == sys.base_prefix:
        folders.append(site.getusersitepackages())
    spec = importlib.util.find_spec("torch")
    if spec and spec.origin:
        folders.insert(0, Path(spec.origin).parents[1])
    for folder in (Path(folder) / "torch" for folder in folders):
        if (folder / "include/torch/csrc/stable/library.h").is_file():
            version = re.search(r"__version__ = '(\d+)\.(\d+)", (folder / "version.py").read_text())
            if version and tuple(map(int, version.groups())) >= TORCH_MINIMUM:
                return folder.resolve()
    return None


def find_program(*names: str) -> str | None:
    """The first of `names` on the PATH or beside this Python (a virtual environment need not be activated)."""
    path = os.pathsep.join([os.environ.get("PATH", os.defpath), os.path.dirname(sys.executable)])
    return next(filter(None, (shutil.which(name, path=path) for name in names)), None)


@functools.cache
def compiler() -> str | None:
    """A C++ compiler that knows C++20: $CXX where it is set, and no other then."""
    program = find_program(*(os.environ.get("CXX", "").split()[:1] or ["c++", "g++", "clang++"]))
    if program:
        probe = [program, "-std=c++20", "-x", "c++", "-fsyntax-only", "-"]
        if subprocess.run(probe, input=b"#include <concepts>\n", capture_output=True, check=False).returncode:
            return None
    return program


def missing_tools() -> list[str]:
    """What a native build needs besides torch and is not here."""
    found = {
        "a C++20 compiler (g++ 10 or clang++ 12, or later; CXX names one)": compiler(),
        "cmake": find_program("cmake"),
        "ninja": find_program("ninja"),
        "pybind11": importlib.util.find_spec("pybind11"),
        "Python's headers (python3-dev)": (Path(sysconfig.get_path("include")) / "Python.h").is_file(),
    }
    return [name for name in found if not found[name]]


def jobs() -> int:
    """Parallel compilations: one a core, but no more than memory holds at 1.5 GiB each."""
    meminfo = Path("/proc/meminfo")
    if not meminfo.is_file():
        return os.cpu_count() or 1
    available = re.search(r"MemAvailable:\s+(\d+) kB", meminfo.read_text())
    return max(1, min(len(os.sched_getaffinity(0)), int(available[1]) // (3 << 19)))


class BuildNative(Command):
    """Sub-command of build: puts the libraries, or the reason why there are none, into the package's folder."""

    user_options: list = []
    editable_mode = False  # set by setuptools for pip install -e

    def initialize_options(self) -> None:
        self.build_lib = None

    def finalize_options(self) -> None:
        self.set_undefined_options("build", ("build_lib", "build_lib"))

    def get_source_files(self) -> list[str]:  # for the source distribution
        return ["CMakeLists.txt", *(str(path.relative_to(ROOT)) for path in (ROOT / "csrc").rglob("*.*"))]

    def run(self) -> None:
        reason = self.build()
        if reason and MODE != "off" and "on" in (MODE, CUDA):
            asked = "GPT4FAST_BUILD" if MODE == "on" else "GPT4FAST_CUDA"
            sys.exit(f"{asked}=on, but the native libraries cannot be built: {reason}")
        package = (ROOT if self.editable_mode else ROOT / self.build_lib) / "gpt4fast"
        for stale in [*package.glob("*.so"), *package.glob("pure_python.txt")]:
            stale.unlink()
        if reason:
            (package / "pure_python.txt").write_text(reason + "\n")
        else:
            subprocess.run([find_program("cmake"), "--install", FOLDER, "--prefix", package], check=True)
        if reason and MODE == "auto":
            text = f"\nWARNING: gpt4fast installs as pure Python, slower, without native kernels: {reason}\n"
            try:  # on the terminal itself where there is one, because pip hides what a successful build prints
                Path("/dev/tty").write_text(text)
            except OSError:
                sys.stderr.write(text)

    def build(self) -> str | None:
        """Build the libraries in FOLDER; returns the reason where that cannot be done."""
        if MODE == "off":
            return "GPT4FAST_BUILD=off"
        if missing := missing_tools() + ([] if torch_folder() else ["torch>=2.10"]):
            return "missing " + ", ".join(missing)
        import pybind11

        # A copy, because pip isolates a build in a folder of another name every time, and that would recompile.
        headers = FOLDER / f"pybind11-{pybind11.__version__}"
        if not headers.is_dir():
            shutil.copytree(pybind11.get_include(), headers)
        options = {
            "CMAKE_MAKE_PROGRAM": find_program("ninja"),
            "Python_EXECUTABLE": sys.executable,
            "TORCH_DIR": torch_folder(),
            "PYBIND11_INCLUDE": headers,
            "GPT4FAST_CUDA": CUDA,
            "GPT4FAST_SANITIZE": SANITIZE,
        }
        define = [f"-D{name}={value}" for name, value in options.items()]
        steps = {
            "configure": ["-G", "Ninja", "-S", ROOT, "-B", FOLDER, *define],
            "build": ["--build", FOLDER, "-j", os.environ.get("CMAKE_BUILD_PARALLEL_LEVEL") or str(jobs())],
        }
        for step, arguments in steps.items():
            if subprocess.run([find_program("cmake"), *arguments], check=False).returncode:
                return f"CMake could not {step} (pip install -v shows why)"
        return None


class NativeDistribution(Distribution):
    def has_ext_modules(self) -> bool:  # decides the wheel's tag: this platform's, or any
        return MODE != "off" and not missing_tools()


build.sub_commands = [*build.sub_commands, ("build_native", None)]
setup(
    distclass=NativeDistribution,
    cmdclass={"build_native": BuildNative},
    # pip installs these into the build environment only, and only where the user has no torch to build against.
    setup_requires=[] if MODE == "off" or not compiler() or torch_folder() else ["torch>=2.10"],
)
