"""Fused against plain: the two candidates take turns, and the figure is a ratio of medians of one run."""

from __future__ import annotations

import time
from collections.abc import Callable
from statistics import median, quantiles

from torch import Tensor


def check_close(name: str, plain: Tensor, fast: Tensor, tolerance: float = 2e-3) -> None:
    """Raises RuntimeError if the candidates differ by more than `tolerance` of the largest value."""
    difference = (plain - fast).abs().max().item()
    if not difference <= tolerance * plain.abs().max().item():
        raise RuntimeError(f"{name}: plain and gpt4fast differ by {difference:.3g}, so their times can't be compared")


def paired(
    plain: Callable[[], object], fast: Callable[[], object], *, work: float, seconds: float, turns: int = 40
) -> dict:
    """Times `plain` and `fast` in turns A B A B … for about `seconds`, at least 5 and at most `turns` pairs.

    `work` is what one call does (images, tokens). Returns rates in work per second and ratios, above 1 where gpt4fast
    is faster: {"plain", "fast", "ratio", "low", "high", "turns"}; low and high are its 20th and 80th percentiles.
    """
    for candidate in (plain, fast, plain, fast):  # the first calls allocate and warm caches
        candidate()
    times: tuple[list[float], list[float]] = ([], [])
    end = time.perf_counter() + seconds
    while len(times[0]) < 5 or (time.perf_counter() < end and len(times[0]) < turns):
        # the order swaps every turn, so that neither always runs on the other's caches
        order = (0, 1) if len(times[0]) % 2 == 0 else (1, 0)
        for which in order:
            start = time.perf_counter()
            (plain, fast)[which]()
            times[which].append(time.perf_counter() - start)
    ratios = sorted(a / b for a, b in zip(*times, strict=True))
    fifths = quantiles(ratios, n=5, method="inclusive")
    slow, quick = median(times[0]), median(times[1])
    return {
        "plain": work / slow,
        "fast": work / quick,
        "ratio": slow / quick,
        "low": fifths[0],
        "high": fifths[-1],
        "turns": len(ratios),
    }
