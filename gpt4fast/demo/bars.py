"""Progress bars for training: one line per phase, with the latest metrics beside it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.table import Column

Callback = Callable[[int, int, Mapping[str, float]], None]


@contextmanager
def bars(console: Console) -> Iterator[Callable[[str], Callback]]:
    """Yields `track`: track("digits") opens a bar and returns its callback(step, steps, metrics)."""
    columns = (
        SpinnerColumn(finished_text="[green]✓", table_column=Column(no_wrap=True, min_width=1)),
        TextColumn("{task.description}", table_column=Column(no_wrap=True, min_width=7)),
        BarColumn(bar_width=16),
        MofNCompleteColumn(table_column=Column(no_wrap=True, min_width=9)),
        TimeElapsedColumn(table_column=Column(no_wrap=True, min_width=7)),
        TextColumn("[dim]{task.fields[metrics]}", table_column=Column(no_wrap=True, overflow="ellipsis", ratio=1)),
    )
    with Progress(*columns, console=console, refresh_per_second=5, expand=True) as progress:

        def track(description: str) -> Callback:
            task = progress.add_task(description, total=None, metrics="")

            def callback(step: int, steps: int, metrics: Mapping[str, float]) -> None:
                text = "  ".join(f"{name} {value:.3g}" for name, value in list(metrics.items())[:4])
                progress.update(task, completed=step, total=steps, metrics=text)

            return callback

        yield track
        for task in progress.tasks:
            if not task.finished:  # a phase that a run before this one had finished already
                progress.update(task.id, total=1, completed=1)
