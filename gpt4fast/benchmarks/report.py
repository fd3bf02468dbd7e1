"""Rows of a run, and what is made of them: a table in the terminal, a chart, a JSON file."""

from __future__ import annotations

import json
import platform
import subprocess
from collections.abc import Sequence
from datetime import datetime, timezone
from pathlib import Path

import torch

import gpt4fast

from .candidates import BASELINE, SUBJECT
from .ceilings import Ceilings
from .generator_cells import GeneratorCell
from .harness import Timing, fastest_variants, percentiles
from .shapes import AttentionCell, ConvTransposeCell

# Ratios within this of 1 are ties: that much differs between runs of the same thing.
TIE = 0.03


def cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text(errors="replace").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def commit() -> str | None:
    """Of the checkout that the package runs from; None where it was installed or git is missing."""
    root = Path(gpt4fast.__file__).parents[1]
    if not (root / ".git").exists():
        return None
    try:
        told = subprocess.run(
            ["git", "-C", str(root), "describe", "--always", "--dirty", "--exclude=*"], capture_output=True, text=True
        )
    except OSError:
        return None
    return told.stdout.strip() or None


def provenance(device: str, threads: int) -> dict[str, object]:
    """What every row carries about where and when it was measured."""
    return {
        "device": cpu_name() if device == "cpu" else torch.cuda.get_device_name(),
        "threads": threads if device == "cpu" else None,
        "torch": torch.__version__,
        "gpt4fast": gpt4fast.__version__,
        "commit": commit(),
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
    }


def make_rows(
    cell: AttentionCell | ConvTransposeCell | GeneratorCell,
    dtype: torch.dtype,
    timings: Sequence[Timing],
    ceilings: Ceilings,
    origin: dict[str, object],
) -> list[dict]:
    """One row for each candidate, its fastest variant. Times are milliseconds; ratios are torch's median / its own.

    ``ratio_p20`` and ``ratio_p80`` are of the ratios turn by turn; ``share`` is the floor / the median.
    """
    best = fastest_variants(timings)
    baseline = best.get(BASELINE)
    work = cell.operations(), cell.bytes(dtype), dtype
    floor = ceilings.floor(*work)
    rows = []
    for name, timing in best.items():
        row = {
            "op": cell.op,
            "cell": cell.name,
            "dtype": str(dtype).removeprefix("torch."),
            "candidate": name,
            "layout": timing.candidate.variant,
            "implementation": timing.candidate.implementation,
            "status": timing.status,
            "error": timing.error,
            "floor_ms": floor * 1e3,
            "bound": ceilings.bound(*work),
        }
        figures = dict.fromkeys(("median_ms", "p20_ms", "p80_ms", "share", "ratio", "ratio_p20", "ratio_p80"))
        if timing.samples:
            low, high = timing.fifths()
            figures |= {"median_ms": timing.median * 1e3, "p20_ms": low * 1e3, "p80_ms": high * 1e3}
            figures["share"] = floor / timing.median
            if baseline is not None and baseline.samples:
                figures["ratio"] = baseline.median / timing.median
                low, high = percentiles([a / b for a, b in zip(baseline.samples, timing.samples, strict=False)])
                figures |= {"ratio_p20": low, "ratio_p80": high}
        slots = {"turns": len(timing.samples), "calls_per_turn": timing.repeats}
        noise = {"noisy_slots": timing.noisy, "remeasured_slots": timing.remeasured}
        rows.append({**row, **figures, **slots, **noise, **origin})
    return rows


def write_json(path: Path, rows: Sequence[dict], ceilings: Ceilings) -> None:
    """{"ceilings": {…}, "rows": […]}; FLOP/s and bytes/s are in units of 1e9."""
    measured = {
        "compute_gflops": {str(dtype).removeprefix("torch."): rate / 1e9 for dtype, rate in ceilings.compute.items()},
        "cache_bytes": ceilings.cache_bytes,
        "cache_read_gb_s": ceilings.cache_read / 1e9,
        "memory_read_gb_s": ceilings.memory_read / 1e9,
    }
    path.write_text(json.dumps({"ceilings": measured, "rows": list(rows)}, indent=1, ensure_ascii=False) + "\n")


def _figure(value: float) -> str:
    return f"{value:.3f}" if value < 1 else f"{value:.2f}" if value < 100 else f"{value:.0f}"


def _verdict(row: dict) -> str:
    """win, tie or loss against torch."""
    if abs(row["ratio"] - 1) <= TIE or row["ratio_p20"] <= 1 <= row["ratio_p80"]:
        return "tie"
    return "win" if row["ratio"] > 1 else "loss"


def label(row: dict) -> str:
    short = {"float32": "fp32", "bfloat16": "bf16", "float16": "fp16"}
    return f"{row['cell']} {short[row['dtype']]}"


def print_table(rows: Sequence[dict], title: str, console=None) -> None:
    """One line for gpt4fast on each cell, below it one for each other candidate but torch."""
    from rich.console import Console
    from rich.table import Table

    console = console or Console()
    table = Table(title=title, title_justify="left", box=None, padding=(0, 1, 0, 0), header_style="bold")
    wide = console.width >= 96
    table.add_column("milliseconds", overflow="fold")
    for column in ("torch", "ours", "× torch", *(("p20 to p80",) if wide else ()), "floor"):
        table.add_column(column, justify="right", no_wrap=True)
    table.add_column("runs on", overflow="fold")
    torch_ms = {label(row): row["median_ms"] for row in rows if row["candidate"] == BASELINE}
    # a stable sort: cells in their order, in each gpt4fast's own choice first
    first = {label(row): i for i, row in reversed(list(enumerate(rows)))}
    for row in sorted(rows, key=lambda row: (first[label(row)], row["candidate"] != SUBJECT)):
        if row["candidate"] == BASELINE:
            continue
        own = row["candidate"] == SUBJECT
        name = label(row) if own else f"  {row['candidate']}"
        baseline = torch_ms.get(label(row)) if own else None
        cells = [name, "" if baseline is None else _figure(baseline)]
        if row["median_ms"] is None:
            table.add_row(*cells, "", "", *([""] if wide else []), "", row["status"], style="red")
            continue
        noisy = "*" if row["noisy_slots"] > row["turns"] / 4 else ""
        cells.append(noisy + _figure(row["median_ms"]))
        style = "" if own else "dim"
        if row["ratio"] is None:
            cells += [""] * (2 if wide else 1)
        else:
            colour = {"win": "green", "tie": "default", "loss": "red"}[_verdict(row)] if own else "default"
            cells.append(f"[{colour}]{row['ratio']:.2f}[/{colour}]")
            if wide:
                cells.append(f"{row['ratio_p20']:.2f} to {row['ratio_p80']:.2f}")
        table.add_row(*cells, f"{row['share']:.0%}", row["implementation"], style=style)
    console.print(table)


def summary(rows: Sequence[dict]) -> str:
    """Lines on wins, ties and losses of gpt4fast's own choice, and on noise."""
    own = [row for row in rows if row["candidate"] == SUBJECT]
    timed = [row for row in own if row["ratio"] is not None]
    verdicts = [_verdict(row) for row in timed]
    counts = ", ".join(f"{verdicts.count(v)} {plural}" for v, plural in
                       (("win", "faster"), ("tie", "as fast"), ("loss", "slower")))  # fmt: skip
    lines = [f"gpt4fast against torch on {len(timed)} cells: {counts}."]
    wrong = sum(row["status"] == "wrong" for row in own)
    if wrong:
        lines.append(f"{wrong} cells have WRONG VALUES and were not timed.")
    turns, noisy = (sum(row[key] for row in rows) for key in ("turns", "noisy_slots"))
    if noisy > turns / 10:
        lines.append(f"Other processes disturbed {noisy} of {turns} slots (*): measure again on a quiet machine.")
    return "\n".join(lines)


COLOURS = {"win": "#1b7f5c", "tie": "#9a9a9a", "loss": "#c8452f"}


def draw_chart(path: Path, rows: Sequence[dict], title: str, note: str) -> None:
    """Horizontal bars of gpt4fast's ratio to torch, from 1.0, on a logarithmic axis; others as marks."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch

    own = [row for row in rows if row["candidate"] == SUBJECT]
    others = sorted({row["candidate"] for row in rows} - {BASELINE, SUBJECT})
    figure = Figure(figsize=(9.5, 1.9 + 0.34 * len(own)), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    ratios = [row[key] for row in rows for key in ("ratio", "ratio_p20", "ratio_p80") if row[key] is not None] or [1.0]
    low, high = min(0.7, min(ratios) / 1.1), max(1.5, max(ratios) * 1.1)
    at_the_right = {"transform": axes.get_yaxis_transform(), "va": "center", "fontsize": 9, "fontweight": "bold"}
    marks = dict(zip(others, "oDsv^P*X", strict=False))
    for y, row in enumerate(own):
        if row["ratio"] is None:
            axes.text(
                1.03, y, "wrong values" if row["status"] == "wrong" else "failed", color=COLOURS["loss"], va="center"
            )
        else:
            axes.barh(y, row["ratio"] - 1, left=1, height=0.64, color=COLOURS[_verdict(row)], zorder=2)
            axes.plot([row["ratio_p20"], row["ratio_p80"]], [y, y], color="black", lw=1, alpha=0.6, zorder=3)
            axes.text(1.01, y, f"{row['ratio']:.2f}×", color=COLOURS[_verdict(row)], **at_the_right)
        for other in (other for other in rows if label(other) == label(row)):
            if other["candidate"] in marks and other["ratio"] is not None:
                axes.plot(other["ratio"], y, marks[other["candidate"]], ms=5, mfc="white", mec="#3b5b92", zorder=4)
    axes.set_yticks(range(len(own)), [label(row) for row in own], fontsize=9)
    axes.set_ylim(len(own) - 0.4, -0.6)
    axes.set_xscale("log", base=2)
    axes.set_xlim(low, high)
    ticks = [2.0**n for n in range(-10, 11)] if high / low > 16 else [0.25, 0.35, 0.5, 0.7, 1, 1.5, 2, 3, 4, 6]
    ticks = [t for t in ticks if low <= t <= high]
    axes.set_xticks(ticks, [f"{t:g}×" if t >= 0.25 else f"1/{1 / t:g}×" for t in ticks])
    axes.minorticks_off()
    axes.axvline(1, color="black", lw=1.2, zorder=3)
    axes.grid(axis="x", color="#e4e4e4", zorder=0)
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
    axes.tick_params(axis="y", length=0)
    axes.set_xlabel("speed, torch = 1 (ratio of medians; line: 20th to 80th percentile of turns)")
    handles = [Patch(color=COLOURS[v], label=text) for v, text in
               (("win", "gpt4fast faster"), ("tie", "as fast"), ("loss", "slower"))]  # fmt: skip
    handles += [Line2D([], [], ls="", marker=m, mfc="white", mec="#3b5b92", label=name) for name, m in marks.items()]
    figure.legend(handles=handles, loc="outside lower center", ncols=min(6, len(handles)), frameon=False, fontsize=9)
    axes.set_title(title, loc="left", fontweight="bold", pad=20)
    axes.text(0, 1.0, note, transform=axes.transAxes, fontsize=8, color="#555555", va="bottom")
    figure.savefig(path, dpi=130)
