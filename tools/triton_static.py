"""What the Triton kernels are compiled to for GPUs that this machine need not have, and what time that promises.

    python tools/triton_static.py --output benchmarks/results/triton_static.json

Some calls of the public ops are recorded at their launches, which are compiled as Triton's launcher would compile them
for sm_80 (A100), sm_89 (L4), sm_90 (H100) and sm_100 (B200). Of each kernel the file says:

    registers, spills        of a thread; bytes of local memory
    shared, warps            bytes of shared memory and warps of a program
    tensor cores             instructions that multiply matrices, and "loop FFMA": others beside them in the inner loop
    wide, narrow             instructions that read or write 16 bytes of global memory a thread, or fewer
    descriptors              instructions that fetch a tile through a tensor descriptor (TMA)
    programs, operations, bytes
                             the launch: its grid, multiply-adds times two, and what it reads and writes of its tensors
                             if nothing is read twice
    predicted us             on an H100: the larger of operations over 80% of the peak and bytes over 90% of what memory
                             gives, and 3 us for the launch. Not yet compared with a GPU.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

os.environ["TRITON_INTERPRET"] = "0"  # read when Triton is imported

import torch
import triton
from triton.tools.tensor_descriptor import TensorDescriptor

from gpt4fast.backends.triton import (
    attention,
    attention_decode,
    attention_decode_kernels,
    attention_kernels,
    attention_launch,
    batch_norm,
    batch_norm_kernels,
    conv_transpose,
    conv_transpose_kernels,
    conv_transpose_launch,
)

TENSOR_CORES = {80: r"HMMA\.", 89: r"HMMA\.", 90: r"(?:HGMMA|HMMA)\.", 100: r"(?:UTC\w*MMA|HMMA)\b"}
# H100 SXM, dense: operations a second by the type that products are computed in, and bytes a second of its memory.
PEAK = {"half": 989e12, "tf32": 495e12, "ieee": 67e12}
BANDWIDTH = 3.35e12

# Attention: (name, dtype, TF32, architecture, head_dim, features)
ATTENTION = [
    *(("bfloat16", False, arch, dim, ()) for arch in (80, 90, 100) for dim in (64, 128)),
    ("float16", False, 90, 64, ()),
    *(("bfloat16", False, arch, 256, ()) for arch in (89, 90)),
    *(("float32", False, 80, dim, ()) for dim in (64, 128)),
    ("float32", True, 90, 64, ()),
    ("float16", False, 90, 80, ("mask", "alibi", "softcap")),
    ("bfloat16", False, 89, 128, ("mask", "starts", "lengths", "offsets")),
    ("bfloat16", False, 80, 64, ("dropout",)),
    ("bfloat16", False, 90, 128, ("packed",)),
    *(("bfloat16", False, arch, dim, ("descriptors",)) for arch in (90, 100) for dim in (64, 128)),
    ("float16", False, 90, 80, ("descriptors", "packed")),
]
# Decoding: (dtype, architecture, head_dim, features)
DECODE = [
    *(("bfloat16", arch, 128, ("append", "rotary")) for arch in (80, 90, 100)),
    ("float16", 90, 64, ("append", "rotary", "paged")),
    ("bfloat16", 90, 128, ("append", "rotary", "paged", "int8")),
    *(("bfloat16", arch, 128, ("append", "float8")) for arch in (89, 90)),
    ("bfloat16", 89, 256, ("window", "softcap")),
    ("float32", 80, 64, ()),
]
SCALED = {"int8": torch.int8, "float8": torch.float8_e4m3fn}
# Transposed convolution: name: (batch, C, Cout, sizes, kernel, stride, groups, channels last)
LAYERS = {
    "dcgan": (64, 512, 256, (8, 8), 4, 2, 1, False),
    "dcgan channels last": (64, 512, 256, (8, 8), 4, 2, 1, True),
    "image": (16, 64, 3, (32, 32), 4, 2, 1, False),
    "vocoder": (4, 256, 128, (512,), 16, 8, 1, False),
    "video": (2, 128, 64, (4, 16, 16), 4, 2, 1, False),
    "depthwise": (8, 64, 64, (32, 32), 4, 2, 64, False),
    "depthwise channels last": (8, 64, 64, (32, 32), 4, 2, 64, True),
}
# (layer, dtype, TF32, architecture)
CONVOLUTIONS = [
    *(("dcgan", dtype, False, arch) for dtype in ("float16", "bfloat16") for arch in (80, 90, 100)),
    *(("dcgan", "float32", tf32, arch) for tf32 in (True, False) for arch in (80, 90)),
    *((layer, "float16", False, 90) for layer in LAYERS if layer != "dcgan"),
]
# Transposed convolution, batch norm and gelu in training: (layer, dtype, architecture)
TRAINING = [
    *(("dcgan", "bfloat16", arch) for arch in (80, 90, 100)),
    ("dcgan channels last", "bfloat16", 90),
    ("dcgan", "float32", 80),
]

Launch = tuple[str, object, tuple, tuple, dict]  # name, kernel, grid, args, kwargs


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--only", default="", help="compile the kernels whose title has this text")
    arguments = parser.parse_args()
    output, builds = arguments.output, {}
    for title, arch, kind, operations, launches in recorded():
        for name, kernel, grid, args, kwargs in launches:
            kernel_title = f"{title}, {name}"
            if kernel_title in builds:  # the gradient of the input after the output, values after keys
                kernel_title += " again"
            if arguments.only not in kernel_title:
                continue
            print(kernel_title, file=sys.stderr, flush=True)
            numbers, work = describe(compile_launch(kernel, args, kwargs, arch), arch), operations.get(name, 0)
            tensors = [value for value in (*args, *kwargs.values()) if torch.is_tensor(value)]
            if name == "append":  # of the cache as much as there is new
                tensors = [args[0], args[0]]
            traffic = sum(tensor.numel() * tensor.element_size() for tensor in tensors)
            seconds = 3e-6 + max(work / (0.8 * PEAK[kind]), traffic / (0.9 * BANDWIDTH))
            builds[kernel_title] = {
                **numbers, "programs": math.prod(grid), "operations": work, "bytes": traffic,
                "predicted us": round(seconds * 1e6, 1),
            }  # fmt: skip
    output.parent.mkdir(parents=True, exist_ok=True)
    partial = output.with_suffix(".partial")
    partial.write_text(json.dumps({"triton": triton.__version__, "kernels": builds}, indent=1) + "\n")
    partial.replace(output)


# Recording


class Recorder:
    """Stands where a kernel was and keeps its launches."""

    def __init__(self, name: str, kernel, launches: list[Launch]) -> None:
        self.name, self.kernel, self.launches = name, kernel, launches

    def __getitem__(self, grid: tuple):
        return lambda *args, **kwargs: self.launches.append((self.name, self.kernel, grid, args, kwargs))


def recorded() -> Iterator[tuple[str, int, str, dict[str, float], list[Launch]]]:
    """Of each call: its title, architecture, kind of products, operations by kernel, and launches."""
    launches: list[Launch] = []
    for module in (attention_kernels, attention_decode_kernels, batch_norm_kernels, conv_transpose_kernels):
        for name in [name for name in vars(module) if name.endswith("_kernel")]:
            setattr(module, name, Recorder(name.removesuffix("_kernel"), getattr(module, name), launches))

    def record(title: str, dtype: str, tf32: bool, arch: int, call: Callable[[], dict[str, float]]):
        for host in (attention_launch, attention_decode, batch_norm, conv_transpose_launch):
            for name, value in (("capability_of", divmod(arch, 10)), ("processors_of", 132)):
                if hasattr(host, name):
                    setattr(host, name, lambda tensor, value=value: value)
        torch.backends.cuda.matmul.allow_tf32 = tf32
        torch.backends.cudnn.conv.fp32_precision = "tf32" if tf32 else "ieee"
        launches.clear()
        operations = call()
        kind = "half" if dtype != "float32" else "tf32" if tf32 else "ieee"
        suffix = " TF32" if tf32 else ""
        return f"{title} {dtype}{suffix} sm_{arch}", arch, kind, operations, list(launches)

    for dtype, tf32, arch, dim, features in ATTENTION:
        title = " ".join(["attention", str(dim), *features])
        yield record(title, dtype, tf32, arch, partial(run_attention, getattr(torch, dtype), dim, features))
    for dtype, arch, dim, features in DECODE:
        title = " ".join(["decode", str(dim), *features])
        yield record(title, dtype, False, arch, partial(run_decode, getattr(torch, dtype), dim, features))
    for layer, dtype, tf32, arch in CONVOLUTIONS:
        yield record(layer, dtype, tf32, arch, partial(run_convolution, getattr(torch, dtype), layer))
    for layer, dtype, arch in TRAINING:
        call = partial(run_training, getattr(torch, dtype), layer)
        yield record(f"{layer} training", dtype, False, arch, call)


def run_attention(dtype: torch.dtype, dim: int, features: tuple[str, ...]) -> dict[str, float]:
    batch, heads, length = 4, 16, 256 if "mask" in features else 2048
    product = batch * heads * length * length / 2 * dim * 2  # of a causal matrix with one of vectors
    rows = (1, heads, batch * length) if "packed" in features else (batch, heads, length)
    query, key, value = torch.empty(3, *rows, dim, dtype=dtype)
    numbers = torch.zeros(batch, dtype=torch.int64)
    settings = [
        torch.empty(batch, heads, length, length, dtype=dtype) if "mask" in features else None,
        0.1 if "dropout" in features else 0.0,
        numbers[:1] if "dropout" in features else None,
        True,
        dim**-0.5,
        0,
        *(numbers if name in features else None for name in ("offsets", "lengths", "starts")),
        -1,
        -1,
        20.0 if "softcap" in features else 0.0,
        torch.empty(batch, heads) if "alibi" in features else None,
        *([torch.zeros(batch + 1, dtype=torch.int64)] * 2 if "packed" in features else [None, None]),
        *(length, length),
    ]
    if "descriptors" in features:
        pointers = attention_launch.tuning.fastest
        attention_launch.tuning.fastest = lambda name, shapes, tile, *_: {**tile, "DESCRIPTORS": 1}
        attention._forward(query, key, value, *settings, True)
        attention_launch.tuning.fastest = pointers
        return {"forward": 2 * product}
    out, lse = attention._forward(query, key, value, *settings, True)
    attention._backward(out, None, query, key, value, out, lse, "mask" in features, *settings)
    return {"forward": 2 * product, "backward_query": 3 * product, "backward_key_value": 4 * product}


def run_decode(dtype: torch.dtype, dim: int, features: tuple[str, ...]) -> dict[str, float]:
    batch, heads, kv_heads, capacity, block = 8, 32, 8, 4096, 16
    query = torch.empty(batch, heads, 1, dim, dtype=dtype)
    rows = (batch * capacity // block, kv_heads, block) if "paged" in features else (batch, kv_heads, capacity)
    stored = next((kind for name, kind in SCALED.items() if name in features), dtype)
    cache = torch.empty(2, *rows, dim, dtype=stored)
    scales = torch.empty(2, *rows) if stored != dtype else (None, None)
    new = torch.empty(2, batch, kv_heads, 1, dim, dtype=dtype) if "append" in features else (None, None)
    numbers = torch.zeros(batch, dtype=torch.int64)
    table = torch.zeros(batch, capacity // block, dtype=torch.int64) if "paged" in features else None
    tables = torch.empty(2, capacity, dim // 2) if "rotary" in features else (None, None)
    attention_decode._decode(
        query, *cache, numbers, *new, table, *tables, False, *scales, dim**-0.5, None,
        1000 if "window" in features else -1, 20.0 if "softcap" in features else 0.0, None,
    )  # fmt: skip
    return {"decode": 4.0 * batch * heads * capacity * dim}


def run_convolution(dtype: torch.dtype, layer: str) -> dict[str, float]:
    input, weight, bias, geometry, groups, ones = operands(dtype, layer)
    output = conv_transpose._forward(
        input, weight, bias, *geometry, [0] * len(ones), groups, ones, bias, bias, "gelu", 0.0
    )  # fmt: skip
    conv_transpose._input_gradient(output, input, weight, *geometry, groups, ones)
    conv_transpose._weight_gradient(output, input, weight, *geometry, groups, ones)
    work = 2.0 * input.numel() * weight[0].numel()
    return {"convolution": work, "weight_gradient": work}


def run_training(dtype: torch.dtype, layer: str) -> dict[str, float]:
    input, weight, bias, geometry, groups, ones = operands(dtype, layer)
    output, mean, rstd, _ = conv_transpose._forward_with_statistics(
        input, weight, bias, *geometry, [0] * len(ones), groups, ones, 1e-5
    )
    affine = bias.float(), bias.float()
    batch_norm._apply(output, mean, rstd, *affine, "gelu", 0.0)
    batch_norm._backward(output, output, *affine, mean, rstd, "gelu", 0.0)
    batch_norm._statistics(output, 1e-5)
    return {"convolution": 2.0 * input.numel() * weight[0].numel()}


def operands(dtype: torch.dtype, layer: str) -> tuple:
    """Input, weight, bias, (stride, padding), groups and dilation of a layer."""
    batch, channels, outputs, sizes, kernel, stride, groups, channels_last = LAYERS[layer]
    dims = len(sizes)
    input = torch.empty(batch, channels, *sizes, dtype=dtype)
    if channels_last:
        input = input.contiguous(memory_format=torch.channels_last)
    weight = torch.empty(channels, outputs // groups, *(kernel,) * dims, dtype=dtype)
    geometry = [stride] * dims, [(kernel - stride) // 2] * dims
    return input, weight, input.new_empty(outputs), geometry, groups, [1] * dims


# Compiling

TYPES = {
    torch.float16: "fp16", torch.bfloat16: "bf16", torch.float32: "fp32", torch.int64: "i64", torch.int8: "i8",
    torch.uint8: "u8", torch.float8_e4m3fn: "fp8e4nv",
}  # fmt: skip


def compile_launch(function, args: tuple, kwargs: dict, arch: int):
    """As Triton's launcher does it: integers of 1 are constants, and multiples of 16 are known to be."""
    kwargs = dict(kwargs)
    options = {name: kwargs.pop(name) for name in ("num_warps", "num_stages", "maxnreg") if name in kwargs}
    values = dict(zip(function.arg_names, args, strict=False)) | kwargs
    signature, constants, hints = {}, {}, {}

    def specialize(path: tuple[int, ...], value, fixed: bool):
        if isinstance(value, tuple):
            return tuple(specialize((*path, i), v, fixed) for i, v in enumerate(value))
        if value is None or (isinstance(value, int) and value == 1 and not fixed):
            constants[path] = value
            return "constexpr"
        if isinstance(value, float):
            return "fp32"
        if isinstance(value, int):
            if value % 16 == 0 and not fixed:
                hints[path] = [["tt.divisibility", 16]]
            return "i32" if -(2**31) <= value < 2**31 else "i64"
        if isinstance(value, TensorDescriptor):
            return f"tensordesc<{TYPES[value.base.dtype]}{value.block_shape}>"
        hints[path] = [["tt.divisibility", 16]]
        return "*" + TYPES[value.dtype]

    for i, parameter in enumerate(function.params):
        value = values[parameter.name]
        if parameter.is_constexpr:
            signature[parameter.name], constants[(i,)] = "constexpr", value
        else:
            signature[parameter.name] = specialize((i,), value, parameter.do_not_specialize)
    source = triton.compiler.ASTSource(fn=function, signature=signature, constexprs=constants, attrs=hints)
    return triton.compile(source, target=triton.backends.compiler.GPUTarget("cuda", arch, 32), options=options)


def describe(compiled, arch: int) -> dict[str, int]:
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        usage, code = (
            subprocess.run([tool, option, file.name], check=True, capture_output=True, text=True).stdout
            for option in ("-res-usage", "-sass")
        )
    numbers = {name: int(value) for name, value in re.findall(r"\b(REG|STACK|LOCAL):(\d+)", usage)}
    products = re.compile(rf"\b{TENSOR_CORES[arch]}")
    accesses = re.findall(r"\b(?:LDG|STG|LDGSTS)\.E\S*", code)
    wide = sum(".128" in access for access in accesses)
    return {
        "registers": numbers["REG"],
        "spills": numbers["LOCAL"] + numbers["STACK"],
        "shared": compiled.metadata.shared,
        "warps": compiled.metadata.num_warps,
        "tensor cores": len(products.findall(code)),
        "loop FFMA": inner_loop_multiplications(code, products),
        "wide": wide,
        "narrow": len(accesses) - wide,
        "descriptors": len(re.findall(r"\bUTMALDG\b", code)),
    }


def inner_loop_multiplications(code: str, products: re.Pattern) -> int:
    """Scalar multiply-adds in the shortest loop in which matrices are multiplied."""
    lines = [(int(m[1], 16), m[2]) for m in re.finditer(r"/\*([0-9a-f]{4,})\*/\s+([^;]*);", code)]
    loops = []
    for at, text in lines:
        jump = re.search(r"\bBRA\b.*?0x([0-9a-f]+)", text)
        if jump and int(jump[1], 16) < at:
            body = [t for a, t in lines if int(jump[1], 16) <= a <= at]
            if any(products.search(t) for t in body):
                loops.append(body)
    return sum("FFMA" in text for text in min(loops, key=len)) if loops else 0


if __name__ == "__main__":
    main()
