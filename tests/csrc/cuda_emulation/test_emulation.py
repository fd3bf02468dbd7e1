"""The emulation itself: it computes what the instructions do, and finds each kind of fault."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from .build import build

# Which of two threads is found out depends on which comes first.
RACE = "needs a barrier after another thread's (write|read)|reads what was not written"
FAULTS = {
    "none": None,
    "no_barrier_before_read": RACE,
    "no_barrier_before_write": RACE,
    "no_wait": "does not wait for cp.async",
    "no_barrier_after_wait": f"{RACE}|does not wait for cp.async",
    "unwritten": "reads what was not written",
    "outside_input": "leaves its tensors",
    "outside_shared_memory": f"leaves its tensors|{RACE}",
    "writes_input": "writes to a tensor that is only read",
    "misaligned": "needs an aligned address",
    "barrier_of_some": None,  # threads that are done need not come
    "shuffle_of_some": "threads wait for others that never come|takes another step",
    "no_warp_barrier": RACE,
    "two_steps": "takes another step than the other threads of its warp",
}


@pytest.fixture(scope="module")
def ops():
    torch.ops.load_library(str(build([Path(__file__).parent / "faults.cu"], "gpt4fast_faults")))
    return torch.ops.gpt4fast_faults


@pytest.mark.parametrize("index", range(len(FAULTS)), ids=list(FAULTS))
def test_faults_are_found(ops, index):
    message = list(FAULTS.values())[index]
    storage = torch.randn(70 * 4)
    input, output = storage[:256].view(64, 4), torch.empty(64)
    for _ in range(5):  # each in another order of threads
        if message is None:
            ops.faulty(index, input, output)
        else:
            with pytest.raises(RuntimeError, match=message):
                ops.faulty(index, input, output)
    if index == 0:
        i = torch.arange(64)
        expected = torch.empty(64)
        expected[i ^ 32] = 2 * input.sum(1)[63 - ((i ^ 1) ^ 33)]
        torch.testing.assert_close(output, expected)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_products_of_matrices(ops, dtype):
    a, b = (torch.randn(rows, 32 // dtype.itemsize).to(dtype) for rows in (16, 8))
    if dtype == torch.float32:  # of which TF32 has 10 bits
        a, b = (x.half().float() for x in (a, b))
    c = torch.empty(16, 8)
    ops.product(a, b, c)
    torch.testing.assert_close(c.double(), a.double() @ b.double().T, rtol=1e-5, atol=1e-5)
