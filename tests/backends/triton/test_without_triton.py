"""Where Triton is not installed, everything else works, and what it would have served says so."""

from __future__ import annotations

import subprocess
import sys

SCRIPT = """
import sys
sys.modules["triton"] = None  # as if it were not there
import torch
import gpt4fast
from gpt4fast import doctor

query, image = torch.ones(1, 2, 3, 8), torch.ones(1, 2, 3, 3)
gpt4fast.attention(query, query, query)
gpt4fast.conv_transpose2d(image, torch.ones(2, 2, 2, 2))
cache, lengths = torch.zeros(1, 2, 8, 8), torch.tensor([4])
gpt4fast.attention_decode(query, cache, cache, lengths, key=query, value=query)
for call in (
    lambda: gpt4fast.attention(query, query, query, impl="triton"),
    lambda: gpt4fast.conv_transpose2d(image, torch.ones(2, 2, 2, 2), impl="triton"),
    lambda: gpt4fast.attention_decode(query, cache, cache, lengths, impl="triton"),
):
    try:
        call()
    except RuntimeError as error:
        assert "triton is not installed" in str(error), error
    else:
        raise AssertionError("no error")
assert doctor.versions()["triton"] == "not installed"
assert all("triton" in choice.reasons for choice in doctor.choices())
"""


def test_without_triton():
    run = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
