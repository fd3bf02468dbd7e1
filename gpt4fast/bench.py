"""``gpt4fast bench``: an op, or whole generators, against torch and other libraries, with values checked before
anything is timed."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch

from .benchmarks import candidates, generator_cells, report, shapes
from .benchmarks import peers as other_libraries
from .benchmarks.ceilings import measure_ceilings
from .benchmarks.harness import CpuTimer, Monitor, measure, pinned_threads

OPS = (*shapes.CELLS, "generators")


def main(
    op: str,
    quick: bool = True,
    output: Path = Path("gpt4fast-bench"),
    peers: bool = False,
    compile: bool = False,
    threads: int | None = None,
    *,
    impls: Sequence[str] = (),
) -> list[dict]:
    """Measure one op; print a table, write ``<op>.json`` and ``<op>.png`` into ``output``.

    Args:
        op: "attention" or "conv_transpose"; or "generators": six whole models through ``optimize``.
        quick: the quick subset of the shapes, under a minute; otherwise all of them, some ten minutes.
        peers: also ONNX Runtime and OpenVINO, where installed; not for generators.
        compile: also torch.compile of torch's ops; it needs a C++ compiler and compiles for minutes.
        threads: torch's threads; 2 by default.
        impls: implementations of gpt4fast to measure beside its own choice, for instance ("native", "reference"); not
            for generators.

    Returns:
        The rows of the JSON file, see ``benchmarks.report.make_rows``.

    Raises:
        ValueError: op, threads or an implementation is unknown, or there are none for generators.
    """
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    if op not in OPS:
        raise ValueError(f"op must be one of {', '.join(OPS)}, but is {op!r}")
    if op == "generators" and (peers or impls):
        raise ValueError(f"peers and impls must not be given for generators, but are {peers!r} and {impls!r}")
    cells = generator_cells.select(quick) if op == "generators" else shapes.select(op, quick)
    console = Console()
    timer = CpuTimer()
    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn()
    rows: list[dict] = []
    with pinned_threads(threads) as used, Progress(*columns, console=console, transient=True) as progress:
        origin = report.provenance("cpu", used)
        task = progress.add_task("measuring the machine's ceilings", total=len(cells))
        ceilings = measure_ceilings(sorted({dtype for _, dtype in cells}, key=str), "cpu", timer)
        for cell, dtype in cells:
            progress.update(task, description=f"{cell.name}, {str(dtype).removeprefix('torch.')}")
            with torch.set_grad_enabled(cell.backward):  # parameters are made outside inference_mode, as users' are
                if op == "generators":
                    competitors, reference = cell.candidates(dtype, compile)
                else:
                    competitors, reference = candidates.build(cell, dtype, impls=impls, compile=compile)
            with torch.inference_mode(not cell.backward):
                if peers:
                    competitors += other_libraries.build(cell, dtype, used)
                timings = measure(
                    competitors, reference, cell.tolerance(dtype), timer=timer, monitor=Monitor(),
                    rounds=9 if quick else 21, seconds=1.5 if quick else 15.0,
                )  # fmt: skip
            rows += report.make_rows(cell, dtype, timings, ceilings, origin)
            progress.advance(task)

    where = f"{origin['device']}, {used} threads"
    report.print_table(rows, f"{op} on {where}", console)
    rate = ", ".join(f"{str(d).removeprefix('torch.')} {r / 1e9:.0f} GFLOP/s" for d, r in ceilings.compute.items())
    console.print(
        f"Ceilings of this run: multiply-adds {rate}; read {ceilings.cache_read / 1e9:.0f} GB/s up to "
        f"{ceilings.cache_bytes / 2**20:.0f} MB, {ceilings.memory_read / 1e9:.0f} GB/s beyond.",
        highlight=False,
    )
    console.print(report.summary(rows), highlight=False)
    output.mkdir(parents=True, exist_ok=True)
    report.write_json(output / f"{op}.json", rows, ceilings)
    note = f"{where}; torch {origin['torch']}, gpt4fast {origin['gpt4fast']} ({origin['commit'] or 'installed'}), "
    report.draw_chart(output / f"{op}.png", rows, f"{op}: gpt4fast against torch", note + str(origin["date"])[:10])
    console.print(f"Written: {output / op}.json, {output / op}.png", highlight=False)
    return rows
