"""What this machine can do at most, measured in the run that is compared with it."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from ..backends import native
from .harness import CpuTimer, CudaTimer


@dataclass(frozen=True)
class Ceilings:
    """What this machine reached in this run: FLOP/s by dtype, bytes/s of a read by footprint."""

    compute: dict[torch.dtype, float]
    cache_bytes: int  # up to this footprint a read counts as one from the last-level cache
    cache_read: float
    memory_read: float

    def floor(self, operations: float, bytes_moved: float, dtype: torch.dtype) -> float:
        """Seconds that the work takes at the ceilings."""
        read = self.cache_read if bytes_moved <= self.cache_bytes else self.memory_read
        return max(operations / self.compute[dtype], bytes_moved / read)

    def bound(self, operations: float, bytes_moved: float, dtype: torch.dtype) -> str:
        """Which ceiling makes the floor: "compute", "cache" or "memory"."""
        if operations / self.compute[dtype] >= self.floor(operations, bytes_moved, dtype):
            return "compute"
        return "cache" if bytes_moved <= self.cache_bytes else "memory"


def measure_ceilings(dtypes: Sequence[torch.dtype], device: str, timer: CpuTimer | CudaTimer) -> Ceilings:
    """Best of several matrix products that fit the cache and, on a CPU, a loop of multiply-adds without memory; best of
    several reads by torch's own reductions.

    Half precision is never counted slower than float32: half storage can be computed in float32.
    """
    compute = {dtype: _compute_rate(dtype, device, timer) for dtype in dict.fromkeys((torch.float32, *dtypes))}
    compute = {dtype: max(rate, compute[torch.float32]) for dtype, rate in compute.items()}
    if device != "cpu":  # the timer empties the cache before every call
        read = _read_rate(1 << 30, device, timer)
        return Ceilings(compute, 0, read, read)
    cache = _last_level_cache()
    return Ceilings(compute, cache, _read_rate(cache // 2, device, timer), _read_rate(8 * cache, device, timer))


def _compute_rate(dtype: torch.dtype, device: str, timer: CpuTimer | CudaTimer) -> float:
    rate = 0.0
    for n in (512, 1024, 1536) if device == "cpu" else (4096, 8192):
        product = _gemm_rate(n, dtype, device, timer)
        if product < rate:
            break
        rate = product
    if device == "cpu" and native.cpu_library_error() is None and dtype != torch.float16:
        rate = max(rate, _issue_rate(dtype == torch.bfloat16, timer))
    return rate


def _issue_rate(bfloat16: bool, timer: CpuTimer | CudaTimer) -> float:
    steps = 100_000  # a millisecond
    operations = torch.ops.gpt4fast.issue_rate_loop(bfloat16, steps)
    return operations / _best(timer, lambda: torch.ops.gpt4fast.issue_rate_loop(bfloat16, steps))


def _best(timer: CpuTimer | CudaTimer, run: Callable[[], object], seconds: float = 0.15) -> float:
    best, end = float("inf"), time.perf_counter() + seconds
    while time.perf_counter() < end or best == float("inf"):
        best = min(best, timer.slot(run, 1))
    return best


def _gemm_rate(n: int, dtype: torch.dtype, device: str, timer: CpuTimer | CudaTimer) -> float:
    a, b = (torch.randn(n, n, device=device).to(dtype) for _ in range(2))
    return 2 * n**3 / _best(timer, lambda: torch.matmul(a, b))


def _read_rate(size: int, device: str, timer: CpuTimer | CudaTimer) -> float:
    buffer = torch.ones(size // 4, device=device)
    vector = torch.ones(1024, device=device)
    rows = buffer[: buffer.numel() // 1024 * 1024].view(-1, 1024)
    reads = (lambda: torch.linalg.vector_norm(buffer), lambda: torch.sum(buffer), lambda: torch.mv(rows, vector))
    return size / min(_best(timer, read) for read in reads)


def _last_level_cache() -> int:
    """Bytes of the CPU's; where the system does not tell, 8 MB."""
    sizes = []
    for path in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size"):
        text = path.read_text().strip()
        sizes.append(int(text[:-1]) << {"K": 10, "M": 20}[text[-1]])
    return max(sizes, default=8 << 20)
