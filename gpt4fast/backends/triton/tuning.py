"""Which of a few tiles is fastest: measured once for each kind of GPU and class of shapes, then read from a file.

The file is ``triton_tuning.json`` in ``GPT4FAST_CACHE_DIR``, or in ``gpt4fast`` of the user's cache folder; deleting it
measures anew.
"""

from __future__ import annotations

import functools
import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import Tensor

Tile = dict[str, int]
SECONDS = 10.0  # at most, for a class of shapes that is new; most of it compiles

_known: dict[str, dict[str, Tile]] = {}  # by kind of GPU, what the file says, and what it could not be told


def fastest(kernel: str, shape_class: tuple, tile: Tile, launch: Callable[[Tile], None], tensor: Tensor) -> Tile:
    """The fastest of ``tile`` and its variants for a kernel and a class of shapes.

    Args:
        kernel, shape_class: what the answer is kept under; equal calls must have equal ones.
        tile: what a heuristic chose. It is returned unmeasured for tensors that are on no GPU, under
            ``torch.use_deterministic_algorithms``, since another tile rounds otherwise, and while a CUDA graph is
            captured, unless the answer is known by then.
        launch: runs the kernel with a tile, any number of times.
        tensor: an operand, for the GPU that it is on.
    """
    if not tensor.is_cuda or torch.are_deterministic_algorithms_enabled():
        return tile
    captured = torch.cuda.is_current_stream_capturing()
    return _fastest(kind_of(tensor.device), f"{kernel} {shape_class}", tile, launch, captured)


def _fastest(kind: str, name: str, tile: Tile, launch: Callable[[Tile], None], captured: bool = False) -> Tile:
    if kind not in _known:
        _known[kind] = read().get(kind, {})
    if name not in _known[kind]:
        if captured:
            return tile
        _known[kind][name] = measured(tile, launch)
        write(kind, _known[kind])
    # Only what this tile has, and the heuristic's where a file of an older version has nothing.
    return {number: _known[kind][name].get(number, value) for number, value in tile.items()}


def variants(tile: Tile) -> Iterator[Tile]:
    """The tile, and it with the other way of loading, with other warps, with fewer keys or outputs at once, with fewer
    stages, and with its work in fewer parts."""
    yield tile
    if "DESCRIPTORS" in tile:
        yield {**tile, "DESCRIPTORS": 1 - tile["DESCRIPTORS"]}
    yield {**tile, "num_warps": 4 if tile["num_warps"] == 8 else 8}
    if tile["BLOCK_N"] > 16:
        yield {**tile, "BLOCK_N": tile["BLOCK_N"] // 2}
    if tile["num_stages"] > 1:
        yield {**tile, "num_stages": tile["num_stages"] - 1}
    if tile.get("SPLITS", 1) > 1:
        yield {**tile, "SPLITS": tile["SPLITS"] // 2}


def measured(tile: Tile, launch: Callable[[Tile], None]) -> Tile:
    """The fastest variant, of those for which the time suffices. One that a GPU has no room for is passed over: Triton
    finds that when it loads the kernel, or its assembler does when it looks for registers."""
    from triton.runtime.errors import OutOfResources, PTXASError

    deadline, times = time.monotonic() + SECONDS, []
    for variant in variants(tile):
        if times and time.monotonic() >= deadline:
            break
        try:
            times.append((seconds_of(functools.partial(launch, variant)), len(times), variant))
        except (OutOfResources, PTXASError):
            if variant is tile:  # then the call itself fails, and says why
                raise
    return min(times)[2]


def seconds_of(run: Callable[[], None]) -> float:
    """Median of a few runs on the current GPU, after one that compiles."""
    run()
    times = []
    for _ in range(7):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        run()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end))
    return statistics.median(times) / 1000


@functools.cache
def kind_of(device: torch.device) -> str:
    """What the times depend on beside the shapes."""
    import triton

    import gpt4fast

    name = torch.cuda.get_device_name(device)
    return f"{name}, triton {triton.__version__}, gpt4fast {gpt4fast.__version__}"


def path() -> Path:
    caches = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return Path(os.environ.get("GPT4FAST_CACHE_DIR") or caches / "gpt4fast") / "triton_tuning.json"


def read() -> dict[str, dict[str, Tile]]:
    """The file; nothing if there is none, or another program left something else there."""
    try:
        table = json.loads(path().read_text())
        well_formed = all(
            isinstance(number, int)
            for tiles in table.values()
            for tile in tiles.values()
            for number in (*(tile[name] for name in ("BLOCK_M", "BLOCK_N", "num_warps", "num_stages")), *tile.values())
        )
        return table if well_formed else {}
    except (OSError, ValueError, AttributeError, KeyError, TypeError):
        return {}


def write(kind: str, tiles: dict[str, Tile]) -> None:
    """Add to the file what it lacks. Where it can't be written, each process measures for itself."""
    table = read()
    table[kind] = {**table.get(kind, {}), **tiles}
    try:
        path().parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile("w", dir=path().parent, suffix=".partial", delete=False) as file:
            json.dump(table, file, indent=1)
        os.replace(file.name, path())
    except OSError:
        pass
