"""Times candidates in turns, after their values were checked, beside the machine's measured ceilings.

Candidates take turns (A B C, B C A, …) in slots of some 20 ms, so that a change of clock, temperature or load meets all
of them alike; the figure is the ratio of medians of one run. A slot that another process disturbed is measured again a
few times, and counted if that does not help. A candidate whose values are wrong is never timed.
"""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

Outputs = Tensor | tuple[Tensor, ...]


class Unavailable(RuntimeError):
    """A candidate can't serve a cell; the message says why."""


@dataclass
class Candidate:
    """One way to compute a cell. ``run`` does it once. Variants of a name (memory layouts) compete; the fastest counts.

    ``check`` gives the outputs to compare with the reference where ``run`` changes its inputs from call to call.
    """

    name: str
    run: Callable[[], Outputs]
    variant: str = ""
    implementation: str = ""
    check: Callable[[], Outputs] | None = None


@dataclass
class Timing:
    """A candidate's result. ``status`` is "ok", or, where it was not timed, "wrong" or "failed: reason"."""

    candidate: Candidate
    status: str
    error: float | None = None  # see relative_error
    samples: list[float] = field(default_factory=list)  # seconds per call, one for each turn
    repeats: int = 1  # calls in a slot
    noisy: int = 0  # slots that stayed disturbed
    remeasured: int = 0

    @property
    def median(self) -> float:
        return statistics.median(self.samples)

    def fifths(self) -> tuple[float, float]:
        """20th and 80th percentile, seconds."""
        return percentiles(self.samples)


def percentiles(samples: Sequence[float]) -> tuple[float, float]:
    """20th and 80th percentile, interpolated."""
    if len(samples) == 1:
        return samples[0], samples[0]
    cuts = statistics.quantiles(samples, n=5, method="inclusive")
    return cuts[0], cuts[3]


class CpuTimer:
    """Wall-clock seconds per call."""

    def slot(self, run: Callable[[], object], repeats: int) -> float:
        start = time.perf_counter()
        for _ in range(repeats):
            run()
        return (time.perf_counter() - start) / repeats


class CudaTimer:
    """Seconds per call by CUDA events, the L2 cache overwritten before every call.

    Calls are captured in a CUDA graph and replayed, so that the time is the GPU's; with ``graphs`` off it has the gaps
    between launches too, where Python is slower than the GPU.
    """

    def __init__(self, graphs: bool = True) -> None:
        size = torch.cuda.get_device_properties(torch.cuda.current_device()).L2_cache_size
        self._flush = torch.empty(2 * size, dtype=torch.uint8, device="cuda")
        self._replays: WeakKeyDictionary[Callable, Callable] | None = WeakKeyDictionary() if graphs else None

    def slot(self, run: Callable[[], object], repeats: int) -> float:
        if self._replays is not None:
            if run not in self._replays:
                self._replays[run] = captured(run)
            run = self._replays[run]
        events = [(torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) for _ in range(repeats)]
        for start, end in events:
            self._flush.zero_()
            start.record()
            run()
            end.record()
        torch.cuda.synchronize()
        return sum(start.elapsed_time(end) for start, end in events) / repeats / 1e3


def captured(run: Callable[[], object]) -> Callable[[], object]:
    """What replays the GPU's work of ``run``, which was called before."""
    stream, graph = torch.cuda.Stream(), torch.cuda.CUDAGraph()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):  # libraries set up their workspace for each stream
        run()
    torch.cuda.current_stream().wait_stream(stream)
    with torch.cuda.graph(graph, stream=stream):
        run()
    return graph.replay


class Monitor:
    """Tells whether other processes disturbed a slot, where Linux's /proc can tell."""

    # /proc/stat counts in ticks of 10 ms on each processor, so less than two ticks means nothing.
    ALLOWED_SECONDS, ALLOWED_SHARE, ALLOWED_WAIT = 0.02, 0.1, 0.03

    def start(self) -> None:
        self._others, self._waited = self._others_seconds(), self._wait_seconds()

    def disturbed(self, seconds: float) -> bool:
        """Whether, in the ``seconds`` since ``start``, others ran for long or our threads waited for a core."""
        others, waited = self._others_seconds() - self._others, self._wait_seconds() - self._waited
        return others > max(self.ALLOWED_SECONDS, self.ALLOWED_SHARE * seconds) or waited > self.ALLOWED_WAIT * seconds

    @staticmethod
    def _others_seconds() -> float:
        """Processor time, since boot, of everything but this process: user, nice, system, interrupts, stolen."""
        try:
            ticks = Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:9]
        except OSError:
            return 0.0
        own = os.times()
        busy = sum(int(ticks[i]) for i in (0, 1, 2, 5, 6, 7)) / os.sysconf("SC_CLK_TCK")
        return busy - own.user - own.system

    @staticmethod
    def _wait_seconds() -> float:
        """How long threads of this process that still live were ready to run but had no core."""
        waited = 0
        for path in Path("/proc/self/task").glob("*/schedstat"):
            try:
                waited += int(path.read_text().split()[1])
            except OSError:  # the thread ended meanwhile
                continue
        return waited / 1e9


@dataclass(frozen=True)
class Tolerance:
    """How far right values may be off. ``norm`` is "max" or "rms", see ``relative_error``."""

    limit: float
    norm: str = "max"


def relative_error(outputs: Outputs, reference: Outputs, norm: str = "max") -> float:
    """Norm of output - reference / norm of reference, the worst of all outputs; inf for a wrong shape or a NaN.

    "max" is the largest magnitude, so one wrong element shows. "rms" is for gradients through ReLU, whose derivative
    jumps: an input that rounding moves across zero changes its own gradient wholly, in torch as in any other.
    """
    outputs, reference = ((x,) if isinstance(x, Tensor) else tuple(x) for x in (outputs, reference))
    if len(outputs) != len(reference):
        return float("inf")
    order = {"max": float("inf"), "rms": 2}[norm]
    worst = 0.0
    for output, expected in zip(outputs, reference, strict=True):
        if output.shape != expected.shape:
            return float("inf")
        difference = torch.linalg.vector_norm(output.detach().double() - expected, order).item()
        error = difference / max(torch.linalg.vector_norm(expected, order).item(), 1e-30)
        if not error <= worst:  # also where it is NaN
            worst = error if error == error else float("inf")
    return worst


def check(candidate: Candidate, reference: Outputs, tolerance: Tolerance) -> Timing:
    """Compute once and compare; the result's status says whether the candidate may be timed."""
    try:
        error = relative_error((candidate.check or candidate.run)(), reference, tolerance.norm)
    except RuntimeError as problem:
        return Timing(candidate, f"failed: {str(problem).strip().splitlines()[0]}")
    return Timing(candidate, "ok" if error <= tolerance.limit else "wrong", error)


def measure(
    candidates: Sequence[Candidate],
    reference: Outputs,
    tolerance: Tolerance,
    *,
    timer: CpuTimer | CudaTimer,
    monitor: Monitor,
    rounds: int = 11,
    slot: float = 0.02,
    seconds: float = 10.0,
    retries: int = 3,
) -> list[Timing]:
    """Check every candidate against ``reference``, then time those that are right, in turns.

    Args:
        rounds: turns of each candidate; fewer, but at least 3, where they would take longer than ``seconds``.
        slot: least seconds of a turn, reached by repeating the call.
        retries: how often a disturbed slot is measured again.
    """
    timings = [check(candidate, reference, tolerance) for candidate in candidates]
    for timing in timings:
        if timing.status == "ok":
            try:
                timing.repeats = calibrate(timer, timing.candidate.run, slot)
            except RuntimeError as problem:  # what waits for the GPU can't be captured
                timing.status = f"failed: {str(problem).strip().splitlines()[0]}"
    live = [timing for timing in timings if timing.status == "ok"]
    spent = 0.0
    for turn in range(rounds):
        if turn >= 3 and spent > seconds:
            break
        first = turn % max(1, len(live))
        for timing in live[first:] + live[:first]:
            for attempt in range(retries + 1):
                monitor.start()
                sample = timer.slot(timing.candidate.run, timing.repeats)
                spent += sample * timing.repeats
                quiet = not monitor.disturbed(sample * timing.repeats)
                if quiet or spent > seconds:
                    break
                timing.remeasured += attempt < retries
            timing.noisy += not quiet
            timing.samples.append(sample)
    return timings


def calibrate(timer: CpuTimer | CudaTimer, run: Callable[[], object], slot: float) -> int:
    """How many calls fill ``slot`` seconds; the calls made to find out also warm up."""
    repeats = 1
    while True:
        seconds = timer.slot(run, repeats)
        if seconds * repeats >= slot / 2:
            return max(1, round(slot / seconds + 0.5))
        repeats *= 2


def fastest_variants(timings: Sequence[Timing]) -> dict[str, Timing]:
    """By candidate name, the variant with the best median; where none was timed, the first, with its status."""
    best: dict[str, Timing] = {}
    for timing in timings:
        other = best.setdefault(timing.candidate.name, timing)
        if timing.samples and (not other.samples or timing.median < other.median):
            best[timing.candidate.name] = timing
    return best


@contextmanager
def pinned_threads(threads: int | None) -> Iterator[int]:
    """Torch's threads inside: ``threads``, or by default 2 (1 on a single core). Yields the number."""
    if threads is None:
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        threads = min(2, cores)
    if threads < 1:
        raise ValueError(f"threads must be at least 1, but is {threads}")
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        yield threads
    finally:
        torch.set_num_threads(before)
