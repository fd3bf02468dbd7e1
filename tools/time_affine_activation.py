"""Speed of affine_activation against torch eager and torch.compile: a table, and JSON. Called by `make gpu`.

The kernel reads and writes every element once, so the figure that matters is its share of the bandwidth that a plain
copy of the same tensor reaches in the same run. `--device cpu` times the CPU kernel in the same way.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch
from torch import Tensor

from gpt4fast.backends import native
from gpt4fast.benchmarks import report
from gpt4fast.benchmarks.harness import Candidate, CpuTimer, CudaTimer, Monitor, Tolerance, measure

SHAPES = [(64, 512, 8, 8), (64, 256, 16, 16), (64, 128, 32, 32), (64, 64, 64, 64), (16, 64, 16384)]
TOLERANCES = {torch.float32: Tolerance(1e-5), torch.bfloat16: Tolerance(2e-2)}  # torch eager rounds after every step
SHOWN = ("torch", "torch.compile", "gpt4fast")


def plain(x: Tensor, bias: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    bias, scale, shift = (p.view(-1, *[1] * (x.dim() - 2)) for p in (bias, scale, shift))
    return torch.relu((x + bias) * scale + shift)


def fused(x: Tensor, bias: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    return torch.ops.gpt4fast.affine_activation(x, bias, scale, shift, "relu", 0.0)


def time_shape(shape: tuple[int, ...], dtype: torch.dtype, device: str) -> dict:
    """One row: the medians in microseconds, and what they are worth."""
    x = torch.randn(shape, device=device).to(dtype)
    parameters = [torch.randn(shape[1], device=device).to(dtype) for _ in range(3)]
    arguments = [x, *(p.float() for p in parameters)]
    expected = plain(*(tensor.double() for tensor in (x, *parameters)))
    out = torch.empty_like(x)
    compiled = torch.compile(plain)
    candidates = [
        Candidate("torch", lambda: plain(x, *parameters)),
        Candidate("torch.compile", lambda: compiled(x, *parameters)),
        Candidate("gpt4fast", lambda: fused(*arguments)),
        Candidate("copy", lambda: out.copy_(x), check=lambda: expected),
    ]
    timer = CpuTimer() if device == "cpu" else CudaTimer()
    timings = measure(candidates, expected, TOLERANCES[dtype], timer=timer, monitor=Monitor(), rounds=9, seconds=2.0)
    medians = {t.candidate.name: t.median * 1e6 if t.samples else None for t in timings}
    row = {"shape": list(shape), "dtype": str(dtype).removeprefix("torch."), "microseconds": medians}
    row["status"] = {t.candidate.name: t.status for t in timings}
    if medians["gpt4fast"] and medians["torch"]:
        row["gb_s"] = 2 * x.numel() * x.element_size() / medians["gpt4fast"] / 1e3
        row["share_of_copy"] = medians["copy"] / medians["gpt4fast"]
        row["speedup"] = medians["torch"] / medians["gpt4fast"]
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--output", type=Path, required=True, help="the JSON file to write")
    options = parser.parse_args()
    error = native.cpu_library_error() if options.device == "cpu" else native.cuda_library_error()
    if error:
        raise SystemExit(f"affine_activation was not timed: {error}")
    origin = report.provenance(options.device, torch.get_num_threads())
    print(f"affine_activation (bias, scale, shift, relu) on {origin['device']}, microseconds")
    print(f"{'shape':>22} {'dtype':>9}", *(f"{name:>13}" for name in SHOWN), "   GB/s  of copy  speedup")
    rows = []
    for shape in SHAPES:
        for dtype in TOLERANCES:
            rows.append(row := time_shape(shape, dtype, options.device))
            times = [f"{t:13.1f}" if (t := row["microseconds"][name]) else "       failed" for name in SHOWN]
            print(f"{'x'.join(map(str, shape)):>22} {row['dtype']:>9}", *times, end=" ")
            print(f"{row['gb_s']:7.0f} {row['share_of_copy']:8.0%} {row['speedup']:7.2f}x" if "gb_s" in row else "")
    options.output.parent.mkdir(parents=True, exist_ok=True)
    options.output.write_text(json.dumps({**origin, "rows": rows}, indent=1))
    print(f"Written: {options.output}")


if __name__ == "__main__":
    main()
