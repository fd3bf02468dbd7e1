"""The Triton kernels of attention compiled for GPUs that this machine need not have: what the machine code says.

Run as a script, this file compiles (in a process of its own, since the tests' has Triton's interpreter on) and prints
what it finds as JSON.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

TENSOR_CORES = {80: "HMMA", 89: "HMMA", 90: "HGMMA", 100: "UTCHMMA"}
SHARED_MEMORY = {80: 163 * 1024, 89: 99 * 1024, 90: 227 * 1024, 100: 227 * 1024}
KERNELS = ("forward", "backward_query", "backward_key_value")
DTYPES = {"fp16": 2, "bf16": 2, "fp32": 4}

# (kernel, architecture, dtype, head_dim, features): causal, window and offset are no features, but numbers.
PLAIN = [
    (kernel, arch, dtype, head_dim, ())
    for kernel in KERNELS
    for arch in (80, 90, 100)
    for dtype in ("fp16", "bf16")
    for head_dim in (64, 128)
]
PLAIN += [(kernel, arch, "bf16", 256, ()) for kernel in KERNELS for arch in (89, 90)]
PLAIN += [(kernel, 80, "fp32", 64, ()) for kernel in KERNELS]
EXTRA = [(kernel, 90, "fp16", 80, ("Mask", "Slopes", "softcap")) for kernel in KERNELS]
EXTRA += [(kernel, 89, "bf16", 128, ("Mask", "Starts", "Lengths", "Offsets")) for kernel in KERNELS]
EXTRA += [(kernel, 80, "bf16", 64, ("Seed",)) for kernel in KERNELS]
# A few registers are spilled where features come together: at most so many instructions, of some thousand.
SPILLS_OF_EXTRA = 150


def compile_kernel(kernel: str, arch: int, dtype: str, head_dim: int, features: tuple[str, ...]) -> dict:
    """Registers, instructions that spill, shared memory, tensor-core instructions: what the machine code tells."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from gpt4fast.backends.triton import attention_config, attention_kernels

    capability, itemsize = divmod(arch, 10), DTYPES[dtype]
    extras = not {"Mask", "softcap", "Seed"}.isdisjoint(features)
    choose = getattr(attention_config, f"{kernel}_tile")
    tile = choose(itemsize, head_dim, head_dim, capability, extras=extras)
    options = {name: tile.pop(name) for name in ("num_warps", "num_stages")}
    width = attention_config.padded(head_dim)
    constants = {"D": head_dim, "DV": head_dim, "BLOCK_D": width, "BLOCK_DV": width, "PRECISION": "ieee", **tile}
    optional = {
        "Mask": f"*{dtype}", "Slopes": "*fp32", "Offsets": "*i64", "Starts": "*i64", "Lengths": "*i64", "Seed": "*i64",
        "GradMask": "*fp32", "softcap": "fp32",
    }  # fmt: skip
    features = (*features, "GradMask") if "Mask" in features else features
    function = getattr(attention_kernels, f"{kernel}_kernel")
    signature, attributes, values = {}, {}, {}
    for place, name in enumerate(function.arg_names):
        if name in constants or (name in optional and name not in features):
            signature[name], values[(place,)] = "constexpr", constants.get(name)
        elif name.endswith("_strides"):  # dense rows, aligned as those of any width that is a multiple of 16
            signature[name], values[(place, 3)] = ("i32", "i32", "i32", "constexpr"), 1
            attributes |= {(place, i): [["tt.divisibility", 16]] for i in range(3)}
        elif name[0].isupper():
            signature[name] = optional.get(name, "*fp32" if name in ("Lse", "Delta") else f"*{dtype}")
            attributes[(place,)] = [["tt.divisibility", 16]]
        else:
            signature[name] = "fp32" if name in ("scale", "softcap", "keep_scale") else "i32"
    source = ASTSource(fn=function, signature=signature, constexprs=values, attrs=attributes)
    compiled = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)

    code = Path(os.environ["TRITON_CACHE_DIR"], "kernel.cubin")
    code.write_bytes(compiled.asm["cubin"])
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    usage, machine_code = (
        subprocess.run([tool, flag, code], check=True, capture_output=True, text=True).stdout
        for flag in ("-res-usage", "-sass")
    )
    return {
        "registers": int(re.search(r"REG:(\d+)", usage)[1]),
        "spills": len(re.findall(r"\b(?:STL|LDL)\b", machine_code)),
        "shared": compiled.metadata.shared,
        "instructions": sorted(set(re.findall(r"\b(U\w*MMA|H\w*MMA)\b", machine_code))),
    }


def title(case) -> str:
    kernel, arch, dtype, head_dim, features = case
    return " ".join([kernel, f"sm_{arch}", dtype, str(head_dim), *features])


@pytest.fixture(scope="module")
def found(tmp_path_factory) -> dict[str, dict]:
    pytest.importorskip("triton")
    root = Path(__file__).parents[3]
    environment = {
        **os.environ,
        "TRITON_INTERPRET": "0",
        "TRITON_CACHE_DIR": str(tmp_path_factory.mktemp("triton")),
        "PYTHONPATH": os.pathsep.join([str(root), os.environ.get("PYTHONPATH", "")]),
    }
    run = subprocess.run([sys.executable, __file__], env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    return json.loads(run.stdout)


@pytest.mark.parametrize("case", PLAIN + EXTRA, ids=title)
def test_machine_code(found, case):
    """No spills, shared memory within the GPU's limit, and tensor cores at work."""
    name, arch, dtype, head_dim, features = case
    kernel = found[title(case)]
    assert kernel["spills"] <= (SPILLS_OF_EXTRA if features else 0)
    assert kernel["shared"] <= SHARED_MEMORY[arch]
    if dtype != "fp32":
        # Hopper's own instruction has 64 rows, for which the widest heads' gradients leave no registers.
        small = name == "backward_key_value" and head_dim > 128
        assert ("HMMA" if small else TENSOR_CORES[arch]) in kernel["instructions"]


if __name__ == "__main__":
    print(json.dumps({title(case): compile_kernel(*case) for case in PLAIN + EXTRA}))
