"""On a GPU most of these tests take a heuristic's tile: measuring its variants would compile each of them."""

from __future__ import annotations

import pytest
import torch

from gpt4fast.backends.triton import tuning


@pytest.fixture(autouse=True)
def _tunes_nothing(request, monkeypatch, tmp_path) -> None:
    if torch.cuda.is_available() and request.path.name != "test_tuning.py":
        monkeypatch.setenv("GPT4FAST_CACHE_DIR", str(tmp_path))
        monkeypatch.setattr(tuning, "SECONDS", 0.0)
