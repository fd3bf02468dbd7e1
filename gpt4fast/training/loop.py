"""A training loop that can be stopped at any moment and goes on as if it had never been.

Three habits make a resumed run the same run, bit for bit:

- every step starts from its own seed (of run and step), so no random state is carried from step to step;
- a checkpoint is only made between two steps, of all that changes: parameters, buffers, optimizer state, metrics;
- it is written beside the old one and then renamed, so a file is whole or is not there.
"""

from __future__ import annotations

import hashlib
import math
import os
import pickle
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import nn
from torch.optim import Optimizer

Metrics = dict[str, float]


class Loop:
    """Runs `step(0)`, `step(1)`, … up to `steps`, with checkpoints in `folder/name.pt`.

    Args:
        folder: where the checkpoint lives; made if it is not there.
        name: name of this run within the folder.
        modules: everything with parameters or buffers that training changes (an averaged copy of a model too).
        optimizers: their optimizers.
        steps: number of steps in all, those before a resumption included. May grow from one start to the next.
        checkpoint_every: steps between two checkpoints.
        seconds: stops early once training has taken this long in all, those before a resumption included.
        seed: seed of the run; step k draws from a seed made of `seed` and k.
        config: what else determines the run (batch size, …). A checkpoint made with other values is refused.

    Python's and NumPy's random numbers and non-persistent buffers are not restored: draw with torch. Another number of
    threads or another processor adds up in another order: the run goes on, but its last bits differ.

    Raises:
        ValueError: an argument out of range, or a checkpoint that is damaged or of another configuration.
    """

    def __init__(
        self,
        folder: str | os.PathLike[str],
        name: str,
        *,
        modules: Mapping[str, nn.Module],
        optimizers: Mapping[str, Optimizer],
        steps: int,
        checkpoint_every: int = 50,
        seconds: float | None = None,
        seed: int = 0,
        config: Mapping[str, object] | None = None,
    ) -> None:
        if not name or Path(name).name != name:
            raise ValueError(f"name must be a plain file name, got {name!r}")
        if steps < 0:
            raise ValueError(f"steps must be at least 0, got {steps}")
        if checkpoint_every < 1:
            raise ValueError(f"checkpoint_every must be at least 1, got {checkpoint_every}")
        if seconds is not None and not seconds > 0:
            raise ValueError(f"seconds must be positive or None, got {seconds}")
        self.path = Path(folder) / f"{name}.pt"
        self.modules = dict(modules)
        self.optimizers = dict(optimizers)
        self.steps = steps
        self.checkpoint_every = checkpoint_every
        self.seconds = seconds
        self.seed = seed
        self.history: list[Metrics] = []
        self._elapsed = 0.0
        self._fingerprint = self._make_fingerprint(config or {})

    def run(
        self,
        step: Callable[[int], Metrics],
        progress: Callable[[int, int, Metrics], None] | None = None,
    ) -> list[Metrics]:
        """Trains from the last checkpoint on, or from the start.

        Ctrl-C lets the step at hand finish, saves, and raises KeyboardInterrupt; a second one raises at once, and the
        run goes on later from the last checkpoint. So does one that is killed, or whose step raises.

        Args:
            step: does the step of the given number; returns its metrics.
            progress: called as progress(steps done, steps in all, metrics) after each step.

        Returns:
            The metrics of every step since the very first, one dict each. Finished before: at once.

        Raises:
            FloatingPointError: a metric is not finite (training has diverged); names step and metric.
        """
        self._load()
        saved = len(self.history)
        # fork_rng: the caller's random state is as before when training is over.
        with self._deferred_interrupt() as interrupted, torch.random.fork_rng(range(torch.cuda.device_count())):
            while not self._finished() and not interrupted():
                index, started = len(self.history), time.perf_counter()
                torch.manual_seed(self._step_seed(index))
                metrics = {key: float(value) for key, value in step(index).items()}
                for key, value in metrics.items():
                    if not math.isfinite(value):
                        raise FloatingPointError(f"{self.path.stem}: {key} is {value} at step {index}")
                self.history.append(metrics)
                self._elapsed += time.perf_counter() - started
                if len(self.history) % self.checkpoint_every == 0:
                    self._save()
                    saved = len(self.history)
                if progress is not None:
                    try:
                        progress(len(self.history), self.steps, metrics)
                    except KeyboardInterrupt:
                        self._save()
                        raise
            # Reached only between two steps: a step that raised leaves its modules half-way, which is never saved.
            if saved < len(self.history):
                self._save()
            if interrupted():
                raise KeyboardInterrupt
        return list(self.history)

    def _finished(self) -> bool:
        out_of_time = self.seconds is not None and self._elapsed >= self.seconds
        return len(self.history) >= self.steps or out_of_time

    def _step_seed(self, index: int) -> int:
        # Hashed, because torch's CPU generator uses only the low 32 bits of a seed.
        digest = hashlib.blake2b(f"{self.seed}/{self.path.stem}/{index}".encode(), digest_size=8).digest()
        return int.from_bytes(digest, "little") >> 1

    @contextmanager
    def _deferred_interrupt(self) -> Iterator[Callable[[], bool]]:
        """The first Ctrl-C only sets a flag; the second does what it did before."""
        if threading.current_thread() is not threading.main_thread():
            yield lambda: False  # Ctrl-C only ever reaches the main thread
            return
        pressed = False
        previous = signal.getsignal(signal.SIGINT)

        def handler(signum: int, frame: object) -> None:
            nonlocal pressed
            pressed = True
            signal.signal(signal.SIGINT, previous)

        if previous != signal.SIG_IGN:  # a job in the background: Ctrl-C is not for it
            signal.signal(signal.SIGINT, handler)
        try:
            yield lambda: pressed
        finally:
            signal.signal(signal.SIGINT, previous)

    def _make_fingerprint(self, config: Mapping[str, object]) -> dict[str, str]:
        lines = {"seed": str(self.seed)} | {f"config {key}": str(value) for key, value in config.items()}
        for name, module in self.modules.items():
            for key, tensor in module.state_dict().items():
                lines[f"{name}.{key}"] = f"{tuple(tensor.shape)} {str(tensor.dtype).removeprefix('torch.')}"
        for name, optimizer in self.optimizers.items():
            lines[name] = type(optimizer).__name__
            for number, group in enumerate(optimizer.param_groups):
                settings = {key: value for key, value in group.items() if key != "params"}
                lines[f"{name} group {number}"] = f"{len(group['params'])} parameters {settings}"
        return lines

    def _save(self) -> None:
        state = {
            "fingerprint": self._fingerprint,
            "history": self.history,
            "elapsed": self._elapsed,
            "modules": {name: module.state_dict() for name, module in self.modules.items()},
            "optimizers": {name: optimizer.state_dict() for name, optimizer in self.optimizers.items()},
        }
        self.path.parent.mkdir(parents=True, exist_ok=True)
        temporary = self.path.with_name(f"{self.path.name}.{os.getpid()}.tmp")
        try:
            with open(temporary, "wb") as file:
                torch.save(state, file)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, self.path)
        finally:
            temporary.unlink(missing_ok=True)

    def _load(self) -> None:
        if not self.path.exists():
            return
        try:
            state = torch.load(self.path, map_location="cpu", weights_only=True)
            found = state["fingerprint"]
        except (OSError, RuntimeError, EOFError, KeyError, TypeError, pickle.UnpicklingError) as error:
            raise ValueError(
                f"{self.path} is not a checkpoint of this loop, or damaged; delete it to start anew"
            ) from error
        for key in sorted(found.keys() | self._fingerprint.keys()):
            there, here = found.get(key, "absent"), self._fingerprint.get(key, "absent")
            if there != here:
                raise ValueError(
                    f"{self.path} was made with another configuration: {key} is {there} there, {here} here; "
                    "delete it to start anew, or choose another folder"
                )
        for name, module in self.modules.items():
            module.load_state_dict(state["modules"][name])
        for name, optimizer in self.optimizers.items():
            optimizer.load_state_dict(state["optimizers"][name])
        self.history = state["history"]
        self._elapsed = state["elapsed"]
