"""What a run has finished, in one file that is never half written."""

from __future__ import annotations

import json
import os
from pathlib import Path


class State:
    """`state.json` of a demo folder: the settings, and of every finished step its result and its seconds.

    A folder made with other settings raises ValueError: steps of two different runs must not be mixed.
    """

    def __init__(self, folder: Path, settings: dict):
        self.path = Path(folder) / "state.json"
        self.content = {"settings": settings, "steps": {}, "interrupted": {}}
        if self.path.exists():
            self.content = json.loads(self.path.read_text(encoding="utf-8"))
            found = self.content["settings"]
            if found != settings:
                change = ", ".join(f"{k}={v}" for k, v in found.items())
                raise ValueError(f"output: {folder} was made with {change}; give the same or another folder")

    def result(self, step: str) -> dict | None:
        """The result of a finished step, else None."""
        entry = self.content["steps"].get(step)
        return None if entry is None else entry["result"]

    def seconds(self, step: str) -> float:
        """Wall clock of a finished step, its interrupted parts included."""
        return self.content["steps"][step]["seconds"]

    def finish(self, step: str, result: dict, seconds: float) -> None:
        seconds += self.content["interrupted"].pop(step, 0.0)
        self.content["steps"][step] = {"result": result, "seconds": seconds}
        self._write()

    def interrupt(self, step: str, seconds: float) -> None:
        """Keeps the time that a step took before it was stopped."""
        parts = self.content["interrupted"]
        parts[step] = parts.get(step, 0.0) + seconds
        self._write()

    def _write(self) -> None:
        temporary = self.path.with_suffix(".tmp")
        temporary.write_text(json.dumps(self.content, ensure_ascii=False), encoding="utf-8")
        os.replace(temporary, self.path)
