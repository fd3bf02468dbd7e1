"""``python -m gpt4fast.benchmarks.gpu``: both GPU backends against torch's kernels, cuDNN and torch.compile.

Every time is the GPU's, of a call replayed in a CUDA graph with an empty L2 cache; ``eager_ms`` beside it has the gaps
between launches too. `make gpu` calls it, first with ``--warm``: processes that compile and time nothing.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import os
import statistics
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from unittest import mock

import torch

from . import candidates, gpu_shapes, report
from .ceilings import measure_ceilings
from .harness import Candidate, CudaTimer, Monitor, Timing, Tolerance, check, fastest_variants, measure
from .shapes import AttentionCell, ConvTransposeCell

BACKENDS = ("triton", "cuda")
HOPPER = "cuda wgmma"  # attention by Hopper's own instructions, which GPT4FAST_WGMMA asks for
SHOWN = (candidates.BASELINE, "torch.compile", *(f"{candidates.SUBJECT} {name}" for name in (*BACKENDS, HOPPER)))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, required=True, help="folder for gpu.json")
    parser.add_argument("--warm", type=int, nargs=2, metavar=("I", "N"), help="only compile each Nth cell from the Ith")
    parser.add_argument("--seconds", type=float, default=240.0, help="no cell is begun after so many")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        raise SystemExit("No GPU: torch sees no CUDA device, so nothing was measured.")
    torch.backends.cudnn.benchmark = True
    warnings.simplefilter("ignore", UserWarning)  # torch tells why each of its kernels of attention can't take a call
    deadline = time.monotonic() + options.seconds
    cells = gpu_shapes.cells()
    if options.warm:
        first, step = options.warm
        for cell, dtype in cells[first::step]:
            if time.monotonic() < deadline:
                warm(cell, dtype)
        return
    options.output.mkdir(parents=True, exist_ok=True)
    origin = report.provenance("cuda", 0)
    timer, eager = CudaTimer(), CudaTimer(graphs=False)
    ceilings = measure_ceilings([torch.bfloat16], "cuda", timer)
    print(f"{origin['device']}, torch {origin['torch']}; milliseconds (share of the floor); TF32 as torch sets it")
    print(f"{'':40}", *(f"{name:>17}" for name in SHOWN))
    rows: list[dict] = []
    for i, (cell, dtype) in enumerate(cells):
        if time.monotonic() > deadline:
            print(f"Out of time: {len(cells) - i} of {len(cells)} cells were not measured.")
            break
        timings = timings_of(cell, dtype, timer)
        new = report.make_rows(cell, dtype, timings, ceilings, origin)
        for row, timing in zip(new, fastest_variants(timings).values(), strict=True):
            with torch.inference_mode(not cell.backward):
                row["eager_ms"] = eager_ms(eager, timing.candidate, timing.repeats) if timing.samples else None
        print(line(new), flush=True)
        rows += new
        report.write_json(options.output / "gpu.json", rows, ceilings)
    rate = ceilings.compute[torch.bfloat16] / 1e12
    print(f"Ceilings: {rate:.0f} TFLOP/s bf16, {ceilings.memory_read / 1e9:.0f} GB/s")


def build(
    cell: AttentionCell | ConvTransposeCell, dtype: torch.dtype
) -> tuple[list[Candidate], tuple[torch.Tensor, ...], Tolerance]:
    compile = cell.op == "conv_transpose"  # torch's attention is one call, compiled or not
    with torch.set_grad_enabled(cell.backward):
        competitors, reference = candidates.build(cell, dtype, "cuda", impls=BACKENDS, compile=compile)
    if isinstance(cell, AttentionCell) and cell.mode == "forward" and dtype != torch.float32:
        cuda = next(candidate for candidate in competitors if candidate.name == f"{candidates.SUBJECT} cuda")
        name, run = f"{candidates.SUBJECT} {HOPPER}", functools.partial(with_wgmma, cuda.run)
        competitors.append(dataclasses.replace(cuda, name=name, run=run))
    tolerance = cell.tolerance(dtype)
    if dtype == torch.float32 and cell.op == "conv_transpose":  # TF32
        tolerance = Tolerance(5e-3 * len(cell.layers), tolerance.norm)
    return competitors, reference, tolerance


def with_wgmma(run: Callable[[], object]) -> object:
    with mock.patch.dict(os.environ, GPT4FAST_WGMMA="1"):
        return run()


def warm(cell: AttentionCell | ConvTransposeCell, dtype: torch.dtype) -> None:
    competitors, reference, tolerance = build(cell, dtype)
    with torch.inference_mode(not cell.backward):
        for candidate in competitors:
            check(candidate, reference, tolerance)


def timings_of(cell: AttentionCell | ConvTransposeCell, dtype: torch.dtype, timer: CudaTimer) -> list[Timing]:
    competitors, reference, tolerance = build(cell, dtype)
    settings = {"timer": timer, "monitor": Monitor(), "rounds": 7, "slot": 0.01, "seconds": 1.0, "retries": 0}
    with torch.inference_mode(not cell.backward):
        return measure(competitors, reference, tolerance, **settings)


def eager_ms(timer: CudaTimer, candidate: Candidate, repeats: int) -> float:
    return 1e3 * statistics.median(timer.slot(candidate.run, max(3, repeats // 4)) for _ in range(5))


def line(rows: list[dict]) -> str:
    """A cell's times, a column for each of SHOWN."""
    by_name = {row["candidate"]: row for row in rows}
    columns = []
    for name in SHOWN:
        row = by_name.get(name)
        if row is None or row["median_ms"] is None:
            columns.append("" if row is None else row["status"][:16])
        else:
            columns.append(f"{row['median_ms']:.4f} ({row['share']:.0%})")
    return " ".join([f"{report.label(rows[0]):40}", *(f"{column:>17}" for column in columns)])


if __name__ == "__main__":
    main()
