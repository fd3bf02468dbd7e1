"""Modules, whole models and torch.compile, on the kernels for GPUs."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import gpt4fast
from gpt4fast.generation.text import generate
from gpt4fast.models import GPT, GPTConfig

from .comparison import DEVICE, assert_as_exact, decoding_step, error, heads, normal, rotary_tables

pytestmark = pytest.mark.gpu


# Training


@pytest.mark.parametrize("channels_last", [False, True], ids=["", "channels last"])
def test_training_follows_torch(channels_last, impl, monkeypatch):
    """Convolution with the batch's statistics, norm and activation, forward and backward."""
    monkeypatch.setenv("GPT4FAST_IMPL", impl)
    layers = [
        nn.ConvTranspose2d(64, 48, 4, 2, 1, bias=False), nn.BatchNorm2d(48), nn.LeakyReLU(0.2),
        nn.ConvTranspose2d(48, 3, 4, 2, 1), nn.Tanh(),
    ]  # fmt: skip
    theirs = nn.Sequential(*layers).to(DEVICE)
    options = {"norm": "batch", "activation": "leaky_relu", "negative_slope": 0.2, "bias": False}
    ours = nn.Sequential(
        gpt4fast.nn.ConvTranspose2d(64, 48, 4, 2, 1, **options),
        gpt4fast.nn.ConvTranspose2d(48, 3, 4, 2, 1, activation="tanh"),
    ).to(DEVICE)
    # The same tensors in the same order: weight, norm, weight, bias.
    ours.load_state_dict(dict(zip(ours.state_dict(), theirs.state_dict().values(), strict=True)))
    input, target = normal(16, 64, 16, 16), normal(16, 3, 64, 64)
    if channels_last:
        input = input.contiguous(memory_format=torch.channels_last)
    optimizers = [torch.optim.SGD(model.parameters(), lr=0.5) for model in (ours, theirs)]
    for _ in range(3):
        losses = []
        for model, optimizer in zip((ours, theirs), optimizers, strict=True):
            optimizer.zero_grad()
            loss = (model(input) - target).square().mean()
            loss.backward()
            optimizer.step()
            losses.append(loss.detach())
        torch.testing.assert_close(*losses, rtol=1e-4, atol=0)
    for (name, a), b in zip(ours.state_dict().items(), theirs.state_dict().values(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4, msg=lambda text, name=name: f"{name}: {text}")


# optimize


@pytest.mark.parametrize("channels_last", [False, True], ids=["", "channels last"])
def test_optimized_generator(channels_last, impl, monkeypatch):
    layers: list[nn.Module] = []
    for before, after, stride, padding in ((100, 256, 1, 0), (256, 128, 2, 1), (128, 64, 2, 1)):
        convolution = nn.ConvTranspose2d(before, after, 4, stride, padding, bias=False)
        layers += [convolution, nn.BatchNorm2d(after), nn.ReLU()]
    model = nn.Sequential(*layers, nn.ConvTranspose2d(64, 3, 4, 2, 1), nn.Tanh()).to(DEVICE)
    for norm in model.modules():
        if isinstance(norm, nn.BatchNorm2d):
            norm.running_mean.normal_(std=0.05)
            norm.running_var.uniform_(0.02, 0.05)
    model.to(torch.bfloat16).eval()
    z = normal(16, 100, 1, 1, dtype=torch.bfloat16)
    if channels_last:
        model, z = model.to(memory_format=torch.channels_last), z.to(memory_format=torch.channels_last)
    with torch.no_grad():
        exact = copy.deepcopy(model).double()(z.double())
        theirs = model(z)
        monkeypatch.setenv("GPT4FAST_IMPL", impl)
        assert_as_exact(gpt4fast.optimize(model)(z), theirs, exact)


# torch.compile, and what it believes of the ops


def attend(impl):
    query, key, value = heads(2, 8, 2, 300, 300, 64, torch.bfloat16)
    return gpt4fast.attention, [query, key, value], {"is_causal": True, "impl": impl}


def convolve(impl):
    tensors = [normal(4, 64, 16, 16, dtype=torch.float16), normal(64, 32, 4, 4, dtype=torch.float16)]
    return gpt4fast.conv_transpose2d, tensors, {"stride": 2, "padding": 1, "activation": "relu", "impl": impl}


def decode(impl):
    call = decoding_step(torch.bfloat16, batch=4, capacity=256, dim=64)
    tensors = [call.pop(name) for name in ("query", "key_cache", "value_cache", "kv_lengths")]
    return gpt4fast.attention_decode, tensors, {**call, "rotary": rotary_tables(256, 64), "impl": impl}


CALLS = [attend, convolve, decode]


@pytest.mark.parametrize("call", CALLS[:2])
def test_compiled(call, impl):
    op, tensors, options = call(impl)
    torch._dynamo.reset()
    compiled = torch.compile(lambda *tensors: op(*tensors, **options), fullgraph=True)
    assert torch.equal(compiled(*tensors), op(*tensors, **options))


@pytest.mark.usefixtures("needs_triton")
@pytest.mark.parametrize("call", CALLS[:2])
def test_compiled_gradients(call):
    op, tensors, options = call("triton")
    leaves = [t.requires_grad_() for t in tensors]
    torch._dynamo.reset()
    compiled = torch.compile(lambda *tensors: op(*tensors, **options), fullgraph=True, backend="aot_eager")
    grads = [
        torch.autograd.grad(f(*leaves).float().square().sum(), leaves) for f in (compiled, lambda *x: op(*x, **options))
    ]
    for ours, plain in zip(*grads, strict=True):
        assert error(ours, plain.double()) < 1e-2


class Recorder(TorchDispatchMode):
    """Keeps the calls of this package's ops."""

    def __init__(self) -> None:
        super().__init__()
        self.calls = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "gpt4fast":
            self.calls.append((func, args, kwargs or {}))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("call", CALLS)
def test_ops_are_what_they_say(call, impl):
    """What is written to, and the shapes and strides of results, for the tensors of a GPU."""
    op, tensors, options = call(impl)
    with Recorder() as recorder:
        op(*tensors, **options)
    assert recorder.calls
    for func, args, kwargs in recorder.calls:
        torch.library.opcheck(func, args, kwargs, test_utils=("test_schema", "test_faketensor"))


# Text


@pytest.mark.parametrize("style", ["gpt2", "llama"])
def test_generates_the_same_tokens(style, impl, monkeypatch):
    """Greedily, from rows padded on the left: the prompt at once, then token by token from the cache."""
    sizes = {"vocab_size": 200, "max_length": 128, "num_layers": 2, "num_heads": 4, "embed_dim": 128}
    config = GPTConfig.gpt2(**sizes) if style == "gpt2" else GPTConfig.llama(**sizes, num_kv_heads=2)
    model = GPT(config).to(DEVICE)
    ids = torch.randint(0, 200, (4, 40), device=DEVICE)
    mask = torch.arange(40, device=DEVICE) >= torch.tensor([[0], [3], [17], [39]], device=DEVICE)
    tokens = {}
    for name in (impl, "reference"):
        monkeypatch.setenv("GPT4FAST_IMPL", name)
        tokens[name] = generate(model, ids, max_new_tokens=16, attention_mask=mask, temperature=0)
    assert torch.equal(tokens[impl], tokens["reference"])
