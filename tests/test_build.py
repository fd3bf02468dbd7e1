"""setup.py on machines that have everything, lack something, or are told not to build; and a light, quick import."""

from __future__ import annotations

import os
import shutil
import statistics
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from gpt4fast.backends import native

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture
def source(tmp_path) -> Path:
    """A copy of what is built, without the libraries of this tree."""
    target = tmp_path / "source"
    target.mkdir()
    names = ("setup.py", "pyproject.toml", "CMakeLists.txt", "LICENSE")
    for path in [*(ROOT / name for name in names), *ROOT.glob("*.md")]:
        shutil.copy(path, target)
    for name in ("gpt4fast", "csrc"):
        shutil.copytree(ROOT / name, target / name, ignore=shutil.ignore_patterns("*.so", "*.pyc", "pure_python.txt"))
    return target


def run_setup(source: Path, *arguments: str, **environment: str) -> subprocess.CompletedProcess:
    """setup.py in a session of its own: with no terminal, its warning goes to stderr."""
    command = [sys.executable, "setup.py", *arguments]
    environment = {**os.environ, **environment}
    return subprocess.run(
        command, cwd=source, env=environment, capture_output=True, text=True, timeout=600, start_new_session=True
    )


def built_package(source: Path) -> Path:
    (package,) = (source / "build").glob("lib*/gpt4fast")
    return package


def test_a_build_that_failed_is_not_taken_for_a_missing_compiler():
    error = native.cpu_library_error()
    assert error is None or "GPT4FAST_BUILD=off" in error or "missing" in error


NOTHING = {"PATH": "/nonexistent", "CXX": "/nonexistent/g++"}


def test_without_a_compiler_pure_python_is_installed_with_one_warning(source):
    result = run_setup(source, "-q", "build", GPT4FAST_BUILD="auto", CXX="/nonexistent/g++")
    assert result.returncode == 0, result.stderr
    warnings = [line for line in result.stderr.splitlines() if "WARNING" in line]
    assert len(warnings) == 1 and "pure Python" in warnings[0] and "missing a C++20 compiler" in warnings[0]
    package = built_package(source)
    assert not list(package.rglob("*.so"))
    assert "missing a C++20 compiler" in (package / "pure_python.txt").read_text()


def test_pure_python_install_works_and_keeps_the_reason(source):
    assert run_setup(source, "-q", "build", GPT4FAST_BUILD="auto", CXX="/nonexistent/g++").returncode == 0
    code = (
        "import torch, gpt4fast\n"
        "from gpt4fast.backends import native\n"
        "q = torch.randn(1, 2, 5, 8)\n"
        "torch.testing.assert_close(gpt4fast.attention(q, q, q, impl='reference'), "
        "torch.nn.functional.scaled_dot_product_attention(q, q, q))\n"
        "print(gpt4fast.__file__)\n"
        "print(native.build_info(), native.cpu_level())\n"
        "print(native.cpu_library_error())\n"
    )
    package = built_package(source)
    result = subprocess.run(  # python -c looks for modules in the working folder first
        [sys.executable, "-c", code], cwd=package.parent, capture_output=True, text=True, timeout=120
    )
    assert result.returncode == 0, result.stderr
    where, info, error = result.stdout.splitlines()
    assert Path(where).parent == package
    assert info == "{} none"
    assert error.startswith("gpt4fast was installed as pure Python: missing a C++20 compiler")


def test_compiler_too_old_for_cxx20_counts_as_none(source, tmp_path):
    old = tmp_path / "old-g++"
    old.write_text("#!/bin/sh\nexit 1\n")
    old.chmod(0o755)
    result = run_setup(source, "-q", "build", GPT4FAST_BUILD="on", CXX=str(old))
    assert result.returncode != 0 and "C++20 compiler" in result.stderr


@pytest.mark.parametrize("hidden", [NOTHING, {"CXX": "/nonexistent/g++"}], ids=["everything", "compiler"])
def test_build_on_says_what_is_missing(source, hidden):
    result = run_setup(source, "-q", "build", GPT4FAST_BUILD="on", **hidden)
    last = result.stderr.strip().splitlines()[-1]
    assert result.returncode != 0
    assert last.startswith("GPT4FAST_BUILD=on, but the native libraries cannot be built: missing a C++20 compiler")


def test_build_off_is_silent_and_its_wheel_fits_every_machine(source, tmp_path):
    result = run_setup(source, "-q", "bdist_wheel", "--dist-dir", str(tmp_path), GPT4FAST_BUILD="off")
    assert result.returncode == 0 and "WARNING: gpt4fast" not in result.stderr, result.stderr
    (wheel,) = tmp_path.glob("*.whl")
    assert wheel.name.endswith("-py3-none-any.whl")
    names = zipfile.ZipFile(wheel).namelist()
    assert not [name for name in names if name.endswith(".so")]
    assert "gpt4fast/pure_python.txt" in names


def test_unknown_setting_is_an_error(source):
    result = run_setup(source, "--version", GPT4FAST_BUILD="yes")
    assert result.returncode != 0 and "GPT4FAST_BUILD: expected auto, on or off, but it is 'yes'" in result.stderr


def test_stale_libraries_in_the_source_tree_are_not_packed(source):
    (source / "gpt4fast/libgpt4fast_cpu.so").write_bytes(b"stale")
    assert run_setup(source, "-q", "build", GPT4FAST_BUILD="off").returncode == 0
    assert not list(built_package(source).rglob("*.so"))


@pytest.mark.usefixtures("needs_native")
def test_wheel_carries_the_libraries_and_the_data(tmp_path):
    cuda = "auto" if (native.PACKAGE / "libgpt4fast_cuda.so").is_file() else "off"
    command = ("-q", "bdist_wheel", "--dist-dir", str(tmp_path))
    result = run_setup(ROOT, *command, GPT4FAST_BUILD="on", GPT4FAST_CUDA=cuda)
    assert result.returncode == 0, result.stderr
    (wheel,) = tmp_path.glob("*.whl")
    assert "none-any" not in wheel.name
    names = zipfile.ZipFile(wheel).namelist()
    built = {path.name for path in native.PACKAGE.glob("*.so")}
    assert {name.partition("/")[2] for name in names if name.endswith(".so")} == built
    assert any(name.startswith("gpt4fast/data/samples/") for name in names)
    assert "gpt4fast/demo/report.html.j2" in names
    assert not [name for name in names if name.startswith(("tests", "csrc", "benchmarks"))]


def measure_import() -> tuple[float, set[str]]:
    code = (
        "import sys, time, torch\n"
        "before = set(sys.modules)\n"
        "begin = time.perf_counter()\n"
        "import gpt4fast, gpt4fast.ops, gpt4fast.nn\n"
        "print(time.perf_counter() - begin)\n"
        "print(*(set(sys.modules) - before))\n"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=120)
    seconds, modules = result.stdout.splitlines()
    return float(seconds), {name.partition(".")[0] for name in modules.split()}


def test_import_is_quick_and_light():
    runs = [measure_import() for _ in range(5)]
    heavy = {"triton", "transformers", "matplotlib", "typer", "rich", "safetensors", "tokenizers", "PIL", "sklearn"}
    assert not heavy & runs[0][1]
    seconds = statistics.median(run[0] for run in runs)
    assert seconds < 0.3, f"import gpt4fast took {seconds:.2f} s beyond torch"
