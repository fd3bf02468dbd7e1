"""pytest-benchmark of conv transpose: torch and gpt4fast on the shapes of ``gpt4fast bench conv_transpose``."""

from __future__ import annotations

import pytest

from gpt4fast.benchmarks.candidates import BASELINE, SUBJECT

OP = "conv_transpose"


@pytest.mark.parametrize("name", [BASELINE, SUBJECT])
def test_conv_transpose(op_cell, name, compare):
    compare(name)
