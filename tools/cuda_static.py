"""What the CUDA kernels are compiled to, for GPUs that this machine need not have.

    python tools/cuda_static.py --output benchmarks/results/cuda_static.json

Of each kernel in libgpt4fast_cuda.so, for each architecture:

    registers, spills    of a thread; bytes of local memory
    tensor cores         instructions that multiply matrices
    wide, narrow         instructions that read or write 16 bytes of global memory a thread, or fewer
    asynchronous         of the wide ones, those that copy to shared memory without the thread waiting
    matrices             instructions that read matrices from shared memory
    waits                instructions that wait for wgmma's products
    beside               shuffles behind a wait that leaves products going on, up to the next one
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import re
import shutil
import subprocess
from pathlib import Path

LIBRARY = Path(__file__).resolve().parents[1] / "gpt4fast" / "libgpt4fast_cuda.so"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--library", type=Path, default=LIBRARY)
    parser.add_argument("--output", type=Path, required=True)
    arguments = parser.parse_args()
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    partial = arguments.output.with_suffix(".partial")
    partial.write_text(json.dumps(describe(arguments.library), indent=1) + "\n")
    partial.replace(arguments.output)


def tool(name: str) -> str | None:
    """A program of the CUDA toolkit: on the PATH, or the one that the triton wheel carries."""
    spec = importlib.util.find_spec("triton")
    carried = Path(spec.origin).parent / "backends" / "nvidia" / "bin" / name if spec else None
    return shutil.which(name) or (str(carried) if carried and carried.is_file() else None)


def describe(library: Path) -> dict[str, dict[str, int]]:
    """{architecture and kernel: numbers}, sorted."""
    usage = run(tool("cuobjdump"), "-res-usage", library)
    code = run(tool("cuobjdump"), "-sass", library)
    resources: dict[tuple[str, str], dict[str, int]] = {}
    for architecture, name, text in functions(usage, r"^\s*Function (\S+):"):
        resources[architecture, name] = {key: int(value) for key, value in re.findall(r"\b([A-Z]+):(\d+)", text)}
    found = {}
    for architecture, name, text in functions(code, r"^\s*Function : (\S+)"):
        used = resources[architecture, name]
        accesses = re.findall(r"\b(?:LDG|STG|LDGSTS)\.E\S*", text)
        wide = [access for access in accesses if ".128" in access]
        found[f"{architecture} {title(name)}"] = {
            "registers": used["REG"],
            "spills": used["LOCAL"] + used["STACK"],
            "tensor cores": len(re.findall(r"\bHG?MMA\.", text)),
            "wide": len(wide),
            "narrow": len(accesses) - len(wide),
            "asynchronous": sum(access.startswith("LDGSTS") for access in wide),
            "matrices": len(re.findall(r"\bLDSM\.", text)),
            "waits": len(re.findall(r"\bWARPGROUP\.DEPBAR\.", text)),
            "beside": sum(
                part.count("SHFL") for part in re.findall(r"gsb0, 0x1 ;(.*?)WARPGROUP\.DEPBAR", text, re.DOTALL)
            ),
        }
    return dict(sorted(found.items()))


def functions(text: str, pattern: str):
    """(architecture, mangled name, what is said of it) of each function in cuobjdump's text."""
    for part in re.split(r"^Fatbin elf code:", text, flags=re.MULTILINE)[1:]:
        architecture = re.search(r"arch = (\S+)", part)[1]
        pieces = re.split(pattern, part, flags=re.MULTILINE)
        yield from ((architecture, *pair) for pair in zip(pieces[1::2], pieces[2::2], strict=True))


def title(mangled: str) -> str:
    """The kernel's name and template arguments."""
    name = run("c++filt", mangled).strip()
    name = re.sub(r"\(anonymous namespace\)::|gpt4fast::|c10::|torch::headeronly::|^void ", "", name)
    return name[: name.rindex("(")] if name.endswith(")") else name


def run(*command) -> str:
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


if __name__ == "__main__":
    main()
