"""The Triton kernels of transposed convolution as GPUs would get them, compiled without one: registers, shared memory,
tensor-core instructions. What is compiled is what the public functions launch for some layers.

Triton decides when it is imported whether to interpret, so this file runs itself in a process that compiles."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

# name: (batch, C, Cout, sizes, kernel, stride, groups, channels last)
LAYERS = {
    "dcgan": (64, 512, 256, (8, 8), 4, 2, 1, False),
    "dcgan channels last": (64, 512, 256, (8, 8), 4, 2, 1, True),
    "image": (16, 64, 3, (32, 32), 4, 2, 1, False),
    "vocoder": (4, 256, 128, (512,), 16, 8, 1, False),
    "video": (2, 128, 64, (4, 16, 16), 4, 2, 1, False),
    "depthwise": (8, 64, 64, (32, 32), 4, 2, 64, False),
    "depthwise channels last": (8, 64, 64, (32, 32), 4, 2, 64, True),
}
# One line: (layer, dtype, whether float32 may be rounded to TF32, architecture). Compiling takes a second or two each.
BUILDS = [
    *(("dcgan", dtype, True, arch) for dtype in ("float16", "bfloat16") for arch in (80, 90, 100)),
    *(("dcgan", "float32", tf32, arch) for tf32 in (True, False) for arch in (80, 90)),
    *((layer, "float16", True, 90) for layer in LAYERS if layer != "dcgan"),
]
KERNELS = "forward", "input gradient", "weight gradient"
TENSOR_CORES = {80: r"\bHMMA\.", 90: r"\bHGMMA\.", 100: r"\bUTC\w*MMA\b"}
SHARED_MEMORY = {80: 163 * 1024, 90: 227 * 1024, 100: 227 * 1024}


@pytest.fixture(scope="module")
def builds() -> dict[str, dict]:
    """What became of each kernel of each build."""
    pytest.importorskip("triton")
    root = Path(__file__).parents[3]
    environment = {**os.environ, "TRITON_INTERPRET": "0", "PYTHONPATH": str(root), "TRITON_DEFAULT_FP_FUSION": "1"}
    run = subprocess.run([sys.executable, __file__], env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    return json.loads(run.stdout.splitlines()[-1])


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("build", BUILDS, ids=lambda build: " ".join(map(str, build)))
def test_resources_and_instructions(builds, build, kernel):
    layer, dtype, tf32, arch = build
    got = builds[repr((*build, kernel))]
    assert got["local"] == got["stack"] == 0, "registers were spilled"
    assert got["shared"] <= SHARED_MEMORY[arch]
    assert got["registers"] * 32 * got["warps"] <= 65536
    if not layer.startswith("depthwise") and (dtype != "float32" or tf32):
        assert got["tensor cores"]


# The process that compiles


def compile_all() -> dict[str, dict]:
    import torch
    import triton

    from gpt4fast.backends.triton import conv_transpose as host
    from gpt4fast.backends.triton import conv_transpose_kernels as kernels

    torch.set_num_threads(1)
    launches: list[tuple] = []

    class Recorder:
        def __init__(self, kernel):
            self.kernel = kernel

        def __getitem__(self, grid):
            return lambda *args, **kwargs: launches.append((self.kernel, args, kwargs))

    kernels.convolution_kernel = Recorder(kernels.convolution_kernel)
    kernels.weight_gradient_kernel = Recorder(kernels.weight_gradient_kernel)
    host._processors = lambda tensor: 132
    results = {}
    for layer, dtype, tf32, arch in BUILDS:
        batch, channels, outputs, sizes, kernel, stride, groups, channels_last = LAYERS[layer]
        host._capability = lambda tensor, arch=arch: (arch // 10, arch % 10)
        torch.backends.cudnn.conv.fp32_precision = "tf32" if tf32 else "ieee"
        dims = len(sizes)
        input = torch.empty(batch, channels, *sizes, dtype=getattr(torch, dtype))
        if channels_last:
            input = input.contiguous(memory_format=torch.channels_last)
        weight = torch.empty(channels, outputs // groups, *(kernel,) * dims, dtype=input.dtype)
        bias, padding = input.new_empty(outputs), (kernel - stride) // 2
        ones = [1] * dims
        strides, paddings = [stride] * dims, [padding] * dims
        launches.clear()
        output = host._forward(
            input, weight, bias, strides, paddings, [0] * dims, groups, ones, bias, bias, "gelu", 0.0
        )
        host._input_gradient(output, input, weight, strides, paddings, groups, ones)
        host._weight_gradient(output, input, weight, strides, paddings, groups, ones)
        for name, (function, args, kwargs) in zip(KERNELS, launches, strict=True):
            compiled = compile_launch(triton, function, args, kwargs, arch)
            results[repr((layer, dtype, tf32, arch, name))] = describe(triton, compiled, arch)
    return results


def compile_launch(triton, function, args, kwargs, arch):
    """As Triton's launcher does it: integers of 1 are constants, and multiples of 16 are known to be."""
    options = {name: kwargs.pop(name) for name in ("num_warps", "num_stages")}
    signature, constants, hints = {}, {}, {}

    def specialize(path, value):
        if value is None or (isinstance(value, int) and value == 1):
            constants[path] = value
            return "constexpr"
        if isinstance(value, tuple):
            return tuple(specialize((*path, i), v) for i, v in enumerate(value))
        if isinstance(value, float):
            return "fp32"
        if isinstance(value, int):
            if value % 16 == 0:
                hints[path] = [["tt.divisibility", 16]]
            return "i32"
        hints[path] = [["tt.divisibility", 16]]
        return "*" + {"float16": "fp16", "bfloat16": "bf16", "float32": "fp32"}[str(value.dtype).removeprefix("torch.")]

    for i, value in enumerate(args):
        signature[function.arg_names[i]] = specialize((i,), value)
    for name, value in kwargs.items():
        signature[name] = "constexpr"
        constants[(function.arg_names.index(name),)] = value
    source = triton.compiler.ASTSource(fn=function, signature=signature, constexprs=constants, attrs=hints)
    return triton.compile(source, target=triton.backends.compiler.GPUTarget("cuda", arch, 32), options=options)


def describe(triton, compiled, arch: int) -> dict:
    tools = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()

        def dump(option: str) -> str:
            return subprocess.run(
                [tools / "cuobjdump", option, file.name], check=True, capture_output=True, text=True
            ).stdout

        usage, sass = dump("-res-usage"), dump("-sass")
    numbers = {name: int(value) for name, value in re.findall(r"\b(REG|STACK|LOCAL):(\d+)", usage)}
    return {
        "registers": numbers["REG"],
        "stack": numbers["STACK"],
        "local": numbers["LOCAL"],
        "shared": compiled.metadata.shared,
        "warps": compiled.metadata.num_warps,
        "tensor cores": len(re.findall(TENSOR_CORES[arch], sass)),
    }


if __name__ == "__main__":
    print(json.dumps(compile_all()))
