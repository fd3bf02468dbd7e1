"""The native attention at every CPU level that this machine has: errors beside torch's, tails, storage, memory."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from torch.nn import functional as F

import gpt4fast

pytestmark = pytest.mark.usefixtures("needs_native")

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def attend(function, tensors, causal, grad_out):
    """Output and gradients."""
    inputs = [t.detach().requires_grad_() for t in tensors]
    out = function(*inputs, is_causal=causal)
    return [out.detach(), *torch.autograd.grad(out, inputs, grad_out.to(out.dtype))]


def check(tensors, causal):
    """Each of ours at most twice as far from float64 as torch's, in the root mean square."""
    query, _, value = tensors
    grad_out = torch.randn(*query.shape[:3], value.shape[3]).to(query.dtype)
    group = query.shape[1] // tensors[1].shape[1]

    def torchs(query, key, value, is_causal):
        key, value = (t.repeat_interleave(group, 1) for t in (key, value))
        return F.scaled_dot_product_attention(query, key, value, is_causal=is_causal)

    def ours(query, key, value, is_causal):
        return gpt4fast.attention(query, key, value, is_causal=is_causal, impl="native")

    exact = attend(torchs, [t.double() for t in tensors], causal, grad_out)
    plain = attend(torchs, tensors, causal, grad_out)
    fused = attend(ours, tensors, causal, grad_out)
    for name, a, b, x in zip(("out", "grad_query", "grad_key", "grad_value"), fused, plain, exact, strict=True):
        error, allowed = ((t.double() - x).norm().item() for t in (a, b))
        # The inputs are of size 1; where there are few, torch may be exact by chance, and x 0. One key's gradients are
        # what two sums of value's width differ by.
        roundings = 10 if query.shape[2] == 1 else 4
        slack = roundings * torch.finfo(query.dtype).eps * max(x.norm().item(), x.numel() ** 0.5)
        assert error <= 2 * allowed + slack, f"{name}: {error} from float64, torch {allowed}"


def make(batch, heads, kv_heads, queries, keys, dim, value_dim, dtype):
    shapes = (batch, heads, queries, dim), (batch, kv_heads, keys, dim), (batch, kv_heads, keys, value_dim)
    return [torch.randn(shape).to(dtype) for shape in shapes]


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_head_dim(level, dtype):
    for dim in range(1, 131):
        check(make(1, 2, 1, 9, 70, dim, dim, dtype), causal=False)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("causal", [False, True])
def test_lengths_around_the_tiles(level, dtype, causal):
    for length in (1, 2, 5, 6, 7, 15, 16, 17, 31, 33, 63, 64, 65, 95, 97, 127, 129, 191, 192, 193, 200):
        check(make(1, 2, 2, length, length, 24, 40, dtype), causal)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("dims", [(256, 256), (512, 512), (160, 32), (8, 300)], ids=str)
def test_large_and_unequal_head_dims(level, dtype, dims):
    check(make(1, 2, 1, 70, 130, *dims, dtype), causal=True)


@pytest.mark.parametrize("dtype", DTYPES)
def test_storage(level, dtype):
    """Misaligned starts, transposed, expanded and strided storage."""
    batch, heads, length, dim = 2, 4, 70, 48

    def misaligned(t):
        flat = torch.empty(t.numel() + 3, dtype=t.dtype)
        return flat[3:].copy_(t.flatten()).view(t.shape)

    ways = {
        "misaligned": misaligned,
        "by length": lambda t: t.transpose(1, 2).contiguous().transpose(1, 2),
        "head_dim strided": lambda t: t.transpose(2, 3).contiguous().transpose(2, 3),
        "every other": lambda t: t.repeat_interleave(2, 3)[..., ::2],
        "heads expanded": lambda t: t[:, :1].expand(-1, heads, -1, -1),
        "batch expanded": lambda t: t[:1].expand(batch, -1, -1, -1),
    }
    for way in ways.values():
        check([way(t) for t in make(batch, heads, heads, length, length, dim, dim, dtype)], causal=True)


MEASURE = """
import resource, sys, torch, gpt4fast
torch.set_num_threads(2)
length, backward, dtype = int(sys.argv[1]), sys.argv[2] == "backward", getattr(torch, sys.argv[3])

def run(length):
    tensors = [torch.randn(1, 1, length, 64).to(dtype).requires_grad_(backward) for _ in range(3)]
    out = gpt4fast.attention(*tensors, is_causal=True, impl="native")
    if backward:
        out.sum().backward()

run(64)
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
run(length)
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("mode", ["forward", "backward"])
def test_peak_memory_grows_with_the_length(mode, dtype):
    """Kilobytes above those of a tiny call, at 1k, 4k and 16k tokens: a square of 16k would be a gigabyte."""
    peaks = []
    for length in (1024, 4096, 16384):
        command = [sys.executable, "-c", MEASURE, str(length), mode, dtype]
        peaks.append(int(subprocess.run(command, capture_output=True, text=True, check=True).stdout))
    per_token = 12 if mode == "forward" else 24  # float32 tensors of 64 are 256 bytes a token; packed copies by thread
    assert peaks[2] < 16384 * per_token / 4 + 8192, peaks
    assert peaks[2] < 6 * max(peaks[1], 2048), peaks
