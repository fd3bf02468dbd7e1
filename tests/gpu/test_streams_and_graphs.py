"""Calls on other streams, in CUDA graphs and again: the same bits, no wait for the GPU, and no memory that grows."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import gpt4fast

from .comparison import decoding_step, heads, normal, rotary_tables

pytestmark = pytest.mark.gpu

DTYPE = torch.bfloat16
CYCLES = 40_000_000  # that a stream sleeps: about 20 ms
CAPACITY = 1024


class Attention:
    def make(self) -> dict[str, Tensor]:
        return dict(zip(("query", "key", "value"), heads(2, 8, 2, 1000, 1000, 128, DTYPE), strict=True))

    def run(self, call: dict[str, Tensor], impl: str) -> Tensor:
        return gpt4fast.attention(**call, is_causal=True, impl=impl)


class Decoding:
    """One that appends: what it writes into the caches is part of the result."""

    def make(self) -> dict[str, Tensor]:
        return decoding_step(DTYPE, batch=4, capacity=CAPACITY)

    def run(self, call: dict[str, Tensor], impl: str) -> Tensor:
        return gpt4fast.attention_decode(**call, rotary=self.rotary, impl=impl)

    @property
    def rotary(self) -> tuple[Tensor, Tensor]:
        if not hasattr(self, "_rotary"):
            self._rotary = rotary_tables(CAPACITY, 128)
        return self._rotary


class DecodingPages(Decoding):
    def make(self) -> dict[str, Tensor]:
        return decoding_step(DTYPE, batch=4, capacity=CAPACITY, block=16, int8=True)


class ConvTranspose:
    def make(self) -> dict[str, Tensor]:
        return {"input": normal(8, 256, 16, 16, dtype=DTYPE), "weight": normal(256, 128, 4, 4, dtype=DTYPE)}

    def run(self, call: dict[str, Tensor], impl: str) -> Tensor:
        return gpt4fast.conv_transpose2d(**call, stride=2, padding=1, activation="relu", impl=impl)


@pytest.fixture(params=[Attention, Decoding, DecodingPages, ConvTranspose], ids=lambda op: op.__name__)
def op(request):
    return request.param()


def copied(call: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: t.clone() for name, t in call.items()}


def assert_same_bits(a: dict[str, Tensor], b: dict[str, Tensor]) -> None:
    for name in a:
        assert torch.equal(a[name].contiguous().view(torch.uint8), b[name].contiguous().view(torch.uint8)), name


def results(op, call: dict[str, Tensor], impl: str) -> dict[str, Tensor]:
    """The output, and the call's own tensors, some of which were written to."""
    return {"out": op.run(call, impl), **call}


def test_again(op, impl):
    call = op.make()
    first = results(op, copied(call), impl)
    for _ in range(4):
        assert_same_bits(results(op, copied(call), impl), first)


@pytest.mark.parametrize("op", [Attention(), ConvTranspose()], ids=["Attention", "ConvTranspose"])
def test_gradients_again(op, impl):
    if impl == "cuda" and isinstance(op, ConvTranspose):
        pytest.skip("the gradients of the CUDA kernel of transposed convolution are torch's")
    call = {name: t.requires_grad_() for name, t in op.make().items()}
    grads = []
    for _ in range(4):
        out = op.run(call, impl)
        grads.append(dict(zip(call, torch.autograd.grad(out, list(call.values()), torch.ones_like(out)), strict=True)))
    for others in grads[1:]:
        assert_same_bits(others, grads[0])


def test_other_stream(op, impl):
    """What a call reads is written late on its own stream: on another it would read zeros."""
    call = op.make()
    expected = results(op, copied(call), impl)
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        late = {name: torch.zeros_like(t) for name, t in call.items()}
        torch.cuda._sleep(CYCLES)
        for name, tensor in late.items():
            tensor.copy_(call[name])
        got = results(op, late, impl)
    stream.synchronize()
    assert_same_bits(got, expected)


def test_graph(op, impl):
    """Captured once, replayed with other numbers, lengths and block tables in the same tensors."""
    call, other = op.make(), op.make()
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(2):
            op.run(call, impl)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = results(op, call, impl)
    for _ in range(2):
        for name, tensor in call.items():
            tensor.copy_(other[name])
        graph.replay()
        assert_same_bits(got, results(op, copied(other), impl))
        other = op.make()


def test_neither_waits_nor_grows(op, impl):
    call = op.make()
    for _ in range(2):
        op.run(call, impl)
    torch.cuda.synchronize()
    allocated = torch.cuda.memory_allocated()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(5):
            op.run(call, impl)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    torch.cuda.synchronize()
    assert torch.cuda.memory_allocated() == allocated
