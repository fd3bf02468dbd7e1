"""The six steps in one run that can be stopped and goes on."""

from __future__ import annotations

import platform
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from gpt4fast.demo import media_steps, report, text_steps
from gpt4fast.demo.bars import bars
from gpt4fast.demo.run import Run, fact
from gpt4fast.demo.state import State

FULL_MINUTES = 6.0  # what the presets take on two cores at scale 1

STEPS: dict[str, Callable[[Run], dict]] = {
    "data": media_steps.data,
    "networks": media_steps.networks,
    "adversarial": media_steps.adversarial,
    "encoder": text_steps.encoder,
    "decoder": text_steps.decoder,
    "generation": text_steps.generation,
}


def run_demo(output: Path, *, minutes: float, threads: int, seed: int, console: Console) -> Path:
    """Runs what is not finished yet under `output`, writes and returns `report.html`, prints a short table.

    Every finished step is kept in `state.json`, and an unfinished one goes on from its last checkpoint.
    KeyboardInterrupt passes through once the state is safe. ValueError if `output` holds a run with other settings.
    """
    output = Path(output)
    output.mkdir(parents=True, exist_ok=True)
    state = State(output, {"minutes": minutes, "threads": threads, "seed": seed})
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        for number, (name, step) in enumerate(STEPS.items(), 1):
            title = f"[bold]{number} of {len(STEPS)}[/bold] {report.SECTIONS[name][1]}"
            if state.result(name) is not None:
                console.print(f"[green]✓[/green] {title} [dim](finished before)[/dim]", highlight=False)
                continue
            console.print(title, highlight=False)
            start = time.perf_counter()
            try:
                with bars(console) as track:
                    result = step(Run(output, minutes / FULL_MINUTES, seed, track))
            except KeyboardInterrupt:
                state.interrupt(name, time.perf_counter() - start)
                raise
            state.finish(name, result, time.perf_counter() - start)
    finally:
        torch.set_num_threads(before)
    content = {**state.content, **_summary(output, state, threads, seed)}
    path = report.write_report(output, content)
    _print_summary(console, content, path)
    return path


def _commit() -> str:
    """The commit of the source tree that this package runs from, or nothing where it is installed."""
    folder = Path(__file__).resolve().parent
    try:
        found = subprocess.run(
            ["git", "-C", str(folder), "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=True
        )
    except (OSError, subprocess.CalledProcessError):
        return ""
    return found.stdout.strip()


def _summary(output: Path, state: State, threads: int, seed: int) -> dict:
    """What the report tells of the run as a whole: headline figures, commands to go on with, and the environment."""
    import gpt4fast
    from gpt4fast.doctor import cpu_model, machine

    results = {name: state.result(name) for name in STEPS}
    total = sum(state.seconds(name) for name in STEPS)
    best = max(report.speed_rows(state.content), key=lambda row: row["ratio"])
    rows = machine()
    commit = _commit()
    has_gpu = torch.cuda.is_available()
    environment = {
        "Processor": f"{cpu_model()}, CPU level {rows['CPU level']}",
        "Threads": f"{threads}",
        "GPU": "present, but this demo runs on the CPU" if has_gpu else "none",
        "Versions": f"gpt4fast {gpt4fast.__version__}" + (f" ({commit})" if commit else "")
        + f", torch {torch.__version__}, Python {platform.python_version()}, {platform.system()} {platform.machine()}",
        "CPU library": rows["CPU library"],
        "CUDA library": rows["CUDA library"],
        "Seed": f"{seed}",
    }  # fmt: skip
    return {
        "tiles": [
            fact("From nothing to this page", report.duration(total), note=f"{report.threads(threads)}, no GPU used"),
            results["adversarial"]["tile"],
            results["generation"]["tile"],
            fact("Largest speed-up over plain PyTorch here", f"{best['ratio']:.2f}×", note=best["what"]),
        ],
        "commands": "\n".join(
            [
                f"gpt4fast generate text  {output} --prompt 'ROMEO.' --temperature 0.8",
                f"gpt4fast generate image {output} --count 100",
                f"gpt4fast generate audio {output} --count 8",
                f"gpt4fast generate video {output}",
                "gpt4fast train images --data MY_PICTURES --output my-pictures",
            ]
        ),
        "environment": {"threads": threads, "gpu": environment["GPU"], "rows": environment},
    }


def _print_summary(console: Console, content: dict, path: Path) -> None:
    colours = {"win": "green", "loss": "red", "even": "dim"}
    table = Table(box=None, padding=(0, 2, 0, 0), title="Fused against plain", title_justify="left")
    for column in ("step", "work", "plain", "gpt4fast", "unit", "ratio"):
        table.add_column(column, justify="right" if column in ("plain", "gpt4fast", "ratio") else "left")
    for row in report.speed_rows(content):
        colour = colours[report.verdict(row)]
        table.add_row(
            str(row["step"]), row["what"], report.rate(row["plain"]), report.rate(row["fast"]), row["unit"],
            f"[{colour}]{row['ratio']:.2f}×",
        )  # fmt: skip
    console.print()
    console.print(table)
    console.print()
    for tile in content["tiles"][:3]:
        console.print(
            f"{tile['label']}: [bold]{tile['value']}{tile['unit']}[/bold]  [dim]{tile['note']}", highlight=False
        )
    console.print(f"\nReport: [bold]{path}[/bold]", highlight=False)
