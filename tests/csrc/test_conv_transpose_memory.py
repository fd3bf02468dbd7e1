"""Scratch memory of the native transposed convolution."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

pytestmark = [
    pytest.mark.usefixtures("needs_native"),
    pytest.mark.skipif(not os.access("/proc/self/clear_refs", os.W_OK), reason="no way to measure a peak"),
]

MEASURE = """
import ctypes, sys, torch, gpt4fast
batch, groups, inputs, outputs, size, kernel, stride, padding, dilation, winograd, channels_last = eval(sys.argv[1])
torch.set_num_threads(2)
dims = len(size)
geometry = [stride] * dims, [padding] * dims, [0] * dims, groups, [dilation] * dims
def peak(reset=False):
    if reset:
        ctypes.CDLL(None).malloc_trim(0)  # free pages that are kept would serve the call unseen
        open("/proc/self/clear_refs", "w").write("5")
    status = open("/proc/self/status").read()
    return int(status.split("VmHWM:")[1].split()[0])
def run(batch, size):
    torch.manual_seed(0)
    x, weight = torch.randn(batch, groups * inputs, *size), torch.randn(groups * inputs, outputs, *[kernel] * dims)
    packed = torch.ops.gpt4fast.conv_transpose_pack(weight, groups, winograd)
    before = peak(reset=True)
    settings = None, None, "none", 0.0, channels_last, packed, winograd
    out = torch.ops.gpt4fast.conv_transpose_forward(x, weight, None, *geometry, *settings)
    if sys.argv[2] == "weight":
        before = peak(reset=True)
        settings = channels_last, False, True, winograd
        _, out = torch.ops.gpt4fast.conv_transpose_backward(out, x, weight, *geometry, *settings)
    return peak() - before - out.numel() * 4 / 1024
run(1, [2] * dims)
print(run(batch, size))
"""


@pytest.mark.parametrize(
    "call",
    [
        "64, 1, 512, 256, [4, 4], 4, 2, 1, 1, False, False",
        "64, 1, 512, 256, [4, 4], 4, 2, 1, 1, True, False",
        "1, 1, 1024, 128, [64, 64], 4, 2, 1, 1, True, True",
        "4, 1, 128, 64, [128, 128], 4, 2, 1, 1, False, True",
        "16, 1, 64, 3, [64, 64], 4, 2, 1, 1, False, False",
        "8, 128, 1, 1, [64, 64], 4, 2, 1, 1, False, False",
        "8, 1, 128, 64, [6400], 4, 2, 1, 1, True, False",
        "1, 1, 64, 32, [24, 24, 24], 4, 2, 1, 1, True, False",
        "1, 1, 64, 3, [200, 200], 3, 1, 90, 90, False, False",
        "1, 1, 64, 32, [200, 200], 3, 1, 90, 90, False, False",
        "1, 16, 4, 4, [200, 200], 3, 1, 90, 90, False, False",
        "1, 64, 1, 1, [200, 200], 3, 1, 90, 90, False, False",
    ],
)
def test_peak_memory_beyond_input_weight_and_output(call):
    """Less than 8 MiB a thread: there is no im2col buffer, which would take 33 to 134 MB here."""
    assert 0 < scratch(call, "output") < 2 * 8 * 1024


@pytest.mark.parametrize(
    "call",
    [
        "64, 1, 512, 256, [4, 4], 4, 2, 1, 1, False, False",
        "1, 1, 1024, 512, [2, 2, 2], 5, 2, 2, 1, False, False",
        "1, 1, 64, 32, [200, 200], 3, 1, 90, 90, False, False",
        "2, 1, 24, 64, [410, 410], 3, 1, 200, 200, False, False",
    ],
)
def test_peak_memory_of_the_gradient_of_the_weight(call):
    """Likewise, whatever taps the kernel has and however far they lie apart."""
    assert 0 < scratch(call, "weight") < 2 * 8 * 1024


def scratch(call: str, of: str) -> float:
    """KiB."""
    command = [sys.executable, "-c", MEASURE, call, of]
    return float(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
