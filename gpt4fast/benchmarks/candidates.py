"""What is timed on a cell: torch, torch.compile, and gpt4fast, by its own choice or by a named implementation."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

import gpt4fast

from ..backends.compiled.channel_norm import channel_norm
from ..nn import functional
from ..nn.batch_norm import normalize
from . import shapes
from .harness import Candidate
from .shapes import AttentionCell, ConvTransposeCell, Layer

BASELINE = "torch"
SUBJECT = "gpt4fast"


def build(
    cell: AttentionCell | ConvTransposeCell,
    dtype: torch.dtype,
    device: str = "cpu",
    *,
    impls: Sequence[str] = (),
    compile: bool = False,
) -> tuple[list[Candidate], tuple[Tensor, ...]]:
    """The candidates of a cell, torch first, and the reference values in float64.

    Args:
        impls: implementations of gpt4fast to time beside its own choice.
        compile: time torch.compile of torch's ops, too.
    """
    if compile:  # torch.compile gives up on a function after its eighth shape, and runs it as it is
        torch.compiler.reset()
    make = _attention if isinstance(cell, AttentionCell) else _conv_transpose
    return make(cell, dtype, device, impls, compile)


def _named(impls: Sequence[str]) -> list[tuple[str, str | None]]:
    return [(SUBJECT, None), *((f"{SUBJECT} {impl}", impl) for impl in impls)]


def _what_runs(op: Callable | str, impl: str | None, *args, **kwargs) -> str:
    """The implementation that a call takes, or "refused": such a call raises, and the harness tells why."""
    try:
        return gpt4fast.explain(op, *args, **kwargs, impl=impl).implementation
    except RuntimeError:
        return "refused"


# Attention


def _attention(
    cell: AttentionCell, dtype: torch.dtype, device: str, impls: Sequence[str], compile: bool
) -> tuple[list[Candidate], tuple[Tensor, ...]]:
    inputs = cell.inputs(dtype, device)
    query, key, value, *grad = inputs

    def with_backward(attend: Callable[..., Tensor]) -> Callable[[], Tensor | tuple[Tensor, ...]]:
        if not cell.backward:
            return lambda: attend(query, key, value)

        def run() -> tuple[Tensor, ...]:
            out = attend(query, key, value)
            return out.detach(), *torch.autograd.grad(out, (query, key, value), grad[0])

        return run

    def sdpa(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q, k, v, is_causal=cell.is_causal, enable_gqa=cell.heads != cell.kv_heads)

    candidates = []
    for kernel in _torch_kernels(device):
        candidates.append(Candidate(BASELINE, with_backward(partial(_by_kernel, kernel, sdpa)), kernel))
    if cell.mode == "decode":
        candidates.append(Candidate("torch matmul", with_backward(_folded)))
    if compile:
        candidates.append(Candidate("torch.compile", with_backward(torch.compile(sdpa, dynamic=False))))
    lengths = torch.full((cell.batch,), cell.length, device=device)
    for name, impl in _named(impls):
        if cell.mode == "decode":

            def attend(q: Tensor, k: Tensor, v: Tensor, impl=impl) -> Tensor:
                return gpt4fast.attention_decode(q, k, v, lengths, impl=impl)

            ran = _what_runs("attention_decode", impl, *inputs, lengths)
        else:

            def attend(q: Tensor, k: Tensor, v: Tensor, impl=impl) -> Tensor:
                return gpt4fast.attention(q, k, v, is_causal=cell.causal, impl=impl)

            ran = _what_runs("attention", impl, query, key, value, is_causal=cell.causal)
        candidates.append(Candidate(name, with_backward(attend), implementation=ran))
    return candidates, cell.reference(inputs)


def _torch_kernels(device: str) -> tuple[str, ...]:
    """Torch's kernels of attention, to compete on a GPU. On a CPU there is only its own choice."""
    return ("",) if device == "cpu" else ("flash", "cuDNN", "efficient")


def _by_kernel(kernel: str, sdpa: Callable[..., Tensor], *inputs: Tensor) -> Tensor:
    """Attention by one of torch's kernels; an error where it can't."""
    if not kernel:
        return sdpa(*inputs)
    backends = {
        "flash": SDPBackend.FLASH_ATTENTION,
        "cuDNN": SDPBackend.CUDNN_ATTENTION,
        "efficient": SDPBackend.EFFICIENT_ATTENTION,
    }
    with sdpa_kernel(backends[kernel]):
        return sdpa(*inputs)


def _folded(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """One query's attention by matmul, the heads of a group as rows of one matrix."""
    batch, heads, _, head_dim = query.shape
    rows = query.reshape(batch, key.shape[1], heads // key.shape[1], head_dim)
    weights = torch.matmul(rows * head_dim**-0.5, key.transpose(2, 3)).softmax(-1)
    return torch.matmul(weights, value).reshape(batch, heads, 1, -1)


# Transposed convolution


def _call(x: Tensor, layer: Layer, p: dict[str, Tensor | None], training: bool) -> tuple[str, tuple, dict, bool]:
    """A layer as a call of gpt4fast's op: name, arguments, and whether norm and activation are part of it."""
    settings = {"stride": layer.stride, "padding": layer.padding, "groups": layer.groups}
    fused = layer.norm is None or (layer.norm == "batch" and not training)
    if fused:
        settings |= {"scale": p.get("scale"), "shift": p.get("shift"), "activation": layer.activation}
    return f"conv_transpose{x.dim() - 2}d", (x, p["weight"], p["bias"]), settings, fused


def _network(cell: ConvTransposeCell, impl: str | None) -> shapes.Network:
    """The layers on gpt4fast's op, fused as far as the op goes."""

    def network(x: Tensor, parameters: list[dict]) -> Tensor:
        for layer, p in zip(cell.layers, parameters, strict=True):
            name, args, settings, fused = _call(x, layer, p, cell.backward)
            x = getattr(gpt4fast, name)(*args, **settings, impl=impl)
            if not fused and layer.norm == "batch":
                x = normalize(norm_of(p, x), x, layer.activation, 0.0)
            elif not fused:
                x = channel_norm(x, p["gamma"], p["beta"], 1e-6, layer.activation, 0.0)
        return x

    norms: dict[int, nn.Module] = {}

    def norm_of(p: dict, x: Tensor) -> nn.Module:
        if id(p) not in norms:
            norm = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)[x.dim() - 3](x.shape[1], track_running_stats=False)
            norm.weight, norm.bias = p["gamma"], p["beta"]
            norms[id(p)] = norm
        return norms[id(p)]

    return network


def _implementations(cell: ConvTransposeCell, x: Tensor, parameters: list[dict], impl: str | None) -> str:
    """What runs, over the layers."""
    ran = set()
    for layer, p in zip(cell.layers, parameters, strict=True):
        name, args, settings, _ = _call(x, layer, p, cell.backward)
        ran.add(_what_runs(name, impl, *args, **settings))
        x = shapes.run_layer_in_torch(x, layer, p, cell.backward)
    return ", ".join(sorted(ran))


def _fold(layer: Layer, p: dict[str, Tensor | None]) -> dict[str, Tensor | None]:
    """Batch norm at inference as scale and shift, computed once."""
    if layer.norm != "batch":
        return p
    scale = p["gamma"].double() * (p["var"].double() + 1e-5).rsqrt()
    shift = p["beta"].double() - p["mean"].double() * scale
    return {**p, "scale": scale.to(p["weight"].dtype), "shift": shift.to(p["weight"].dtype)}


@dataclass
class _Operands:
    """A cell's tensors, in one dtype and memory layout."""

    x: Tensor
    y: Tensor
    parameters: list[dict[str, Tensor | None]]
    judge: list[Tensor]

    def map(self, change: Callable[[Tensor], Tensor]) -> _Operands:
        def changed(t: Tensor | None) -> Tensor | None:
            if t is None:
                return None
            new = change(t.detach())
            return (
                nn.Parameter(new, t.requires_grad)
                if isinstance(t, nn.Parameter)
                else new.requires_grad_(t.requires_grad)
            )

        parameters = [{name: changed(t) for name, t in p.items()} for p in self.parameters]
        return _Operands(changed(self.x), changed(self.y), parameters, [changed(w) for w in self.judge])

    def runner(
        self, cell: ConvTransposeCell, network: shapes.Network, convolve=F.conv2d
    ) -> Callable[[], Tensor | tuple[Tensor, ...]]:
        if cell.mode == "training":
            return lambda: shapes.train(network, self.x, self.y, self.parameters)
        if cell.mode == "step":
            return lambda: shapes.gan_step(network, self.x, self.y, self.parameters, self.judge, convolve)
        return lambda: network(self.x, self.parameters)


def _channels_last(t: Tensor) -> Tensor:
    formats = {4: torch.channels_last, 5: torch.channels_last_3d}
    return t.to(memory_format=formats[t.dim()]) if t.dim() in formats else t


def _conv_transpose(
    cell: ConvTransposeCell, dtype: torch.dtype, device: str, impls: Sequence[str], compile: bool
) -> tuple[list[Candidate], tuple[Tensor, ...]]:
    judge = shapes.discriminator(cell, dtype, device) if cell.mode == "step" else []
    operands = _Operands(*cell.inputs(dtype, device), cell.parameters(dtype, device), judge)
    layouts = {"": operands}
    if cell.dims > 1:
        layouts = {"channels first": operands, "channels last": operands.map(_channels_last)}
    plain = shapes.torch_network(cell)
    networks: list[tuple[str, str | None, shapes.Network]] = [(BASELINE, None, plain)]
    if compile:
        networks.append(("torch.compile", None, torch.compile(plain, dynamic=cell.mode == "lengths")))
    networks += [(name, impl, _network(cell, impl)) for name, impl in _named(impls)]

    candidates = []
    for name, impl, network in networks:
        for layout, tensors in layouts.items():
            ran = ""
            if name.startswith(SUBJECT):
                if not cell.backward:
                    folded = [_fold(layer, p) for layer, p in zip(cell.layers, tensors.parameters, strict=True)]
                    tensors = replace(tensors, parameters=folded)
                ran = _implementations(cell, tensors.x, tensors.parameters, impl)
            convolve = functional.conv2d if name.startswith(SUBJECT) else F.conv2d
            run, check = tensors.runner(cell, network, convolve), None
            if cell.mode == "lengths":
                share = slice(len(candidates), None, len(networks) * len(layouts))
                run, check = _changing_lengths(cell, tensors, network, layout, share), run
            candidates.append(Candidate(name, run, layout, ran, check))

    reference = operands.map(Tensor.double).runner(cell, plain)()
    return candidates, reference if isinstance(reference, tuple) else (reference,)


def _changing_lengths(
    cell: ConvTransposeCell, tensors: _Operands, network: shapes.Network, layout: str, share: slice
) -> Callable[[], Tensor]:
    """Every call has a new last size. Candidates never share one, since torch keeps its set-up for each."""
    lengths = cell.last_sizes()
    mine = torch.randperm(len(lengths), generator=torch.Generator().manual_seed(0))[share]
    upcoming = itertools.cycle(lengths[i] for i in mine.tolist())
    batch, channels, *rows = tensors.x.shape[:-1]
    buffer = torch.randn(batch * channels * math.prod(rows) * lengths[-1], device=tensors.x.device).to(tensors.x.dtype)

    def run() -> Tensor:
        size = (*rows, next(upcoming))
        data = buffer[: batch * channels * math.prod(size)]
        if layout == "channels last":
            x = data.view(batch, *size, channels).movedim(-1, 1)
        else:
            x = data.view(batch, channels, *size)
        return network(x, tensors.parameters)

    return run
