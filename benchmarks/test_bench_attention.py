"""pytest-benchmark of attention: torch and gpt4fast on the shapes of ``gpt4fast bench attention``."""

from __future__ import annotations

import pytest

from gpt4fast.benchmarks.candidates import BASELINE, SUBJECT

OP = "attention"


@pytest.mark.parametrize("name", [BASELINE, SUBJECT])
def test_attention(op_cell, name, compare):
    compare(name)
