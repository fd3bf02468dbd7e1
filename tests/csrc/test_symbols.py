"""The built libraries: LibTorch's stable ABI only, nothing exported by accident, and what is in the CUDA kernel."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest
import torch

from gpt4fast.backends import native

pytestmark = pytest.mark.usefixtures("needs_native")

ROOT = Path(__file__).resolve().parents[2]
ARCHITECTURES = ("sm_80", "sm_90a", "sm_100")


def library(name: str) -> Path:
    path = native.PACKAGE / name
    if not path.is_file():
        pytest.skip(f"{name} was not built: no nvcc")
    return path


def symbols(path: Path, *options: str) -> list[str]:
    if shutil.which("nm") is None:
        pytest.skip("no nm (binutils)")
    result = subprocess.run(["nm", "-D", *options, str(path)], capture_output=True, text=True, check=True)
    return [line.split()[-1].partition("@")[0] for line in result.stdout.splitlines()]


LIBRARIES = pytest.mark.parametrize("name", ["libgpt4fast_cpu.so", "libgpt4fast_cuda.so"])


@LIBRARIES
def test_no_cxx_symbol_of_torch(name):
    undefined = symbols(library(name), "--undefined-only")
    # Mangled names carry each namespace with its length; plain C names of torch are the stable shims.
    mangled = [symbol for symbol in undefined if re.search(r"_Z.*(2at|3c10|5torch|5caffe)", symbol)]
    assert mangled == []
    shims = {symbol for symbol in undefined if "torch" in symbol}
    assert shims and all(re.fullmatch(r"(aoti_torch|torch)_\w+", symbol) for symbol in shims)


@LIBRARIES
def test_no_library_of_openmp_cuda_or_python_is_linked(name):
    readelf = shutil.which("readelf")
    if readelf is None:
        pytest.skip("no readelf (binutils)")
    text = subprocess.run([readelf, "-d", str(library(name))], capture_output=True, text=True, check=True).stdout
    needed = set(re.findall(r"\(NEEDED\).*\[(.+?)\.so", text))
    system = {"libstdc++", "libm", "libgcc_s", "libc", "ld-linux-x86-64", "librt", "libpthread", "libdl"}
    assert needed <= {"libtorch", "libtorch_cpu", "libc10"} | system
    assert "RPATH" not in text and "RUNPATH" not in text


def test_only_the_cpu_level_is_exported():
    exported = symbols(library("libgpt4fast_cpu.so"), "--defined-only")
    ours = [symbol for symbol in exported if "gpt4fast" in symbol]
    assert ours and all(re.search(r"gpt4fast(7name_of|12cpu_features|\d+\w*cpu_level)", symbol) for symbol in ours)


@pytest.fixture(scope="module")
def assembly(tmp_path_factory) -> dict[str, tuple[str, str]]:
    """{architecture: (ptxas's report, PTX)} of the CUDA kernel, for the architectures that this nvcc knows."""
    nvcc = shutil.which("nvcc")
    if nvcc is None:
        pytest.skip("no nvcc")
    folder = tmp_path_factory.mktemp("ptx")
    known = subprocess.run([nvcc, "--list-gpu-code"], capture_output=True, text=True, check=True).stdout.split()
    include = Path(torch.__file__).parent / "include"
    found = {}
    for architecture in [name for name in ARCHITECTURES if name in known]:
        output = folder / f"{architecture}.ptx"
        command = [nvcc, f"-arch={architecture.replace('sm', 'compute')}", "-ptx", "-std=c++20", "-O3", "-DUSE_CUDA"]
        command += ["-DTORCH_TARGET_VERSION=0x020a000000000000", f"-I{ROOT / 'csrc'}", f"-isystem={include}"]
        subprocess.run([*command, str(ROOT / "csrc/cuda/affine_activation.cu"), "-o", str(output)], check=True)
        ptxas = shutil.which("ptxas") or str(Path(nvcc).resolve().parent / "ptxas")
        command = [ptxas, f"-arch={architecture}", "-v", str(output), "-o", str(folder / "kernel.cubin")]
        report = subprocess.run(command, capture_output=True, text=True, check=True)
        found[architecture] = (report.stdout + report.stderr, output.read_text())
    return found


def test_cuda_kernels_do_not_spill(assembly):
    for architecture, (report, _) in assembly.items():
        frames = re.findall(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", report)
        registers = [int(count) for count in re.findall(r"Used (\d+) registers", report)]
        assert len(frames) == len(registers) == 2, architecture  # float32, and either half type
        assert set(frames) == {("0", "0", "0")}, architecture
        assert max(registers) <= 64, architecture  # 4 blocks of 256 threads fill a multiprocessor's threads at 64


def test_cuda_kernels_move_16_bytes_at_a_time(assembly):
    for architecture, (_, ptx) in assembly.items():
        bodies = re.findall(r"\.entry .*?^\}", ptx, re.DOTALL | re.MULTILINE)
        assert len(bodies) == 2, architecture
        for body in bodies:
            wide = r"\.global(?:\.\w+)*\.v(?:4\.[buf]32|2\.[buf]64|8\.[buf]16)"
            assert re.search("ld" + wide, body) and re.search("st" + wide, body), architecture


def test_device_code_of_every_architecture_is_in_the_library():
    path = library("libgpt4fast_cuda.so")
    cuobjdump = shutil.which("cuobjdump")
    if cuobjdump is None:
        pytest.skip("no cuobjdump")
    elf = subprocess.run([cuobjdump, "--list-elf", str(path)], capture_output=True, text=True, check=True).stdout
    ptx = subprocess.run([cuobjdump, "--list-ptx", str(path)], capture_output=True, text=True, check=True).stdout
    built = native.build_info()["cuda_architectures"].split()
    assert {f"sm_{arch}" for arch in re.findall(r"\.sm_(\w+)\.cubin", elf)} == {x for x in built if x.startswith("sm_")}
    assert "sm_80" in ptx
