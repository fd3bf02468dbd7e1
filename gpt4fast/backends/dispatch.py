"""The one place that chooses an implementation.

The order is: the ``impl`` argument, the environment variable ``GPT4FAST_IMPL``, then "auto". An explicit choice that
can't serve a call raises and says why. "auto" takes the first of the op's preference list that can, and the
preference lists follow measurements (``benchmarks/LOG.md``).
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial

from torch import Tensor

from . import preferences, refusals
from .aten import attention as aten_attention
from .aten import conv_transpose as aten_conv_transpose
from .autograd import in_transform
from .compiled import attention as compiled_attention
from .compiled import attention_decode as compiled_attention_decode
from .compiled import batch_norm as compiled_batch_norm
from .compiled import conv_transpose as compiled_conv_transpose
from .reference import attention as reference_attention
from .reference import conv_transpose as reference_conv_transpose
from .reference.attention_decode import attention_decode as cached_attention
from .reference.attention_varlen import attention_varlen as padded_attention
from .triton import attention as triton_attention
from .triton import attention_decode as triton_attention_decode
from .triton import batch_norm as triton_batch_norm
from .triton import conv_transpose as triton_conv_transpose

IMPLEMENTATIONS = ("native", "triton", "cuda", "reference", "torch")


@dataclass(frozen=True)
class Candidate:
    """An implementation of one op: the function, and the reason why it can't serve a call (None when it can)."""

    run: Callable
    refusal: Callable[[dict], str | None]


@dataclass(frozen=True)
class Op:
    """An op's implementations by name, and the order in which "auto" tries them for a call."""

    name: str
    candidates: dict[str, Candidate]
    preference: Callable[[dict], tuple[str, ...]]

    def refusal(self, implementation: str, call: dict) -> str | None:
        if implementation not in self.candidates:
            return f"this version has no {implementation} kernel for {self.name}"
        return self.candidates[implementation].refusal(call)


@dataclass(frozen=True)
class Explanation:
    """What a call runs on. ``reasons`` tells of every other implementation why it was not taken."""

    op: str
    implementation: str
    reasons: dict[str, str]

    def __str__(self) -> str:
        lines = [f"{self.op} runs on: {self.implementation}"]
        return "\n".join(lines + [f"  not {name}: {reason}" for name, reason in self.reasons.items()])


def requested(impl: str | None) -> str:
    """The implementation asked for by the argument or the environment, or "auto"."""
    name = (os.environ.get("GPT4FAST_IMPL") or "auto") if impl is None else impl
    if name != "auto" and name not in IMPLEMENTATIONS:
        source = "GPT4FAST_IMPL" if impl is None else "impl"
        raise ValueError(f"{source} must be one of auto, {', '.join(IMPLEMENTATIONS)}, but is {name!r}")
    return name


_LISTENERS: list[Callable[[Op, str], None]] = []


@contextmanager
def listening(listener: Callable[[Op, str], None]) -> Iterator[None]:
    """Inside, ``listener(op, implementation)`` hears of every call, and no op goes by what it chose for one like it."""
    _LISTENERS.append(listener)
    try:
        yield
    finally:
        _LISTENERS.remove(listener)


def has_listeners() -> bool:
    return bool(_LISTENERS)


def choose(op: Op, impl: str | None, call: dict) -> str:
    """The name of the implementation that serves ``call``."""
    name = _choice(op, impl, call)
    for listener in _LISTENERS:
        listener(op, name)
    return name


def _choice(op: Op, impl: str | None, call: dict) -> str:
    name = requested(impl)
    if name == "auto":
        # Preferences would pin the sizes that an exported program leaves open.
        for name in ("torch", "reference") if in_transform() else op.preference(call):
            if op.candidates[name].refusal(call) is None:
                return name
    refusal = op.refusal(name, call)
    if refusal is not None:
        raise RuntimeError(f"{op.name} can't run on the requested implementation {name!r}: {refusal}")
    return name


def explain(op: Op, impl: str | None, call: dict) -> Explanation:
    """Choose as for a real call, and tell why not the others."""
    chosen = _choice(op, impl, call)
    unused = f"{chosen} was asked for"
    if requested(impl) == "auto":
        unused = f"{chosen} comes first for such a call: as fast or faster where measured"
    others = [name for name in IMPLEMENTATIONS if name != chosen]
    return Explanation(op.name, chosen, {name: op.refusal(name, call) or unused for name in others})


ATTENTION = Op(
    "attention",
    {
        "native": Candidate(compiled_attention.attention, refusals.native_attention),
        "triton": Candidate(triton_attention.attention, triton_attention.refusal),
        "cuda": Candidate(compiled_attention.attention, refusals.cuda_attention),
        "reference": Candidate(reference_attention.attention, refusals.never),
        "torch": Candidate(aten_attention.attention, refusals.torch_attention),
    },
    preferences.attention,
)
ATTENTION_VARLEN = Op(
    "attention_varlen",
    {
        "native": Candidate(compiled_attention.attention_varlen, refusals.native_attention),
        "triton": Candidate(triton_attention.attention_varlen, triton_attention.refusal),
        "cuda": Candidate(compiled_attention.attention_varlen, refusals.cuda_attention),
        "reference": Candidate(partial(padded_attention, reference_attention.attention), refusals.never),
        "torch": Candidate(partial(padded_attention, aten_attention.attention), refusals.torch_attention),
    },
    preferences.packed_or_cached_attention,
)
ATTENTION_DECODE = Op(
    "attention_decode",
    {
        "native": Candidate(compiled_attention_decode.attention_decode, refusals.native_attention_decode),
        "triton": Candidate(triton_attention_decode.attention_decode, triton_attention_decode.refusal),
        "cuda": Candidate(compiled_attention_decode.attention_decode, refusals.cuda_attention_decode),
        "reference": Candidate(partial(cached_attention, reference_attention.attention), refusals.never),
        "torch": Candidate(partial(cached_attention, aten_attention.attention), refusals.torch_attention),
    },
    preferences.packed_or_cached_attention,
)
CONV_TRANSPOSE = Op(
    "conv_transpose",
    {
        "native": Candidate(compiled_conv_transpose.conv_transpose, refusals.native_conv_transpose),
        "triton": Candidate(triton_conv_transpose.conv_transpose, triton_conv_transpose.refusal),
        "cuda": Candidate(compiled_conv_transpose.cuda_conv_transpose, refusals.cuda_conv_transpose),
        "reference": Candidate(reference_conv_transpose.conv_transpose, refusals.never),
        "torch": Candidate(aten_conv_transpose.conv_transpose, refusals.never),
    },
    preferences.conv_transpose,
)


# Batch norm by the batch's statistics, and the activation behind it: no public op, but a part of modules, which call
# torch for what these kernels do not serve.
BATCH_NORM = {
    "native": compiled_batch_norm.batch_norm_activation,
    "triton": triton_batch_norm.batch_norm_activation,
    "cuda": compiled_batch_norm.cuda_batch_norm_activation,
}
CONV_TRANSPOSE_WITH_STATISTICS = {
    "triton": triton_conv_transpose.ConvTranspose.apply,
    "cuda": compiled_conv_transpose.cuda_conv_transpose_with_statistics,
}


def choose_batch_norm(input: Tensor) -> str:
    """The name of the implementation for input (N, C, *spatial): a key of BATCH_NORM, or "torch"."""
    name = requested(None)
    if name == "triton" and triton_batch_norm.refusal(input) is None:
        return "triton"
    if name == "cuda" and refusals.cuda_refusal(input) is None:
        return "cuda"
    # Channels last: torch's is as fast.
    if name in ("auto", "native") and input.is_contiguous() and refusals.native_refusal(input) is None:
        return "native"
    return "torch"


def conv_transpose_with_statistics(implementation: str, call: dict, eps: float) -> Callable[[], tuple[Tensor, ...]]:
    """Computes a call that has only a convolution, of an input that is not empty, by the kernels of
    ``implementation``: a key of CONV_TRANSPOSE_WITH_STATISTICS.

    Returns:
        Of the function: the output, and what a batch norm behind it needs of each channel, (Cout,), float32, without
        gradients: mean, 1 / sqrt(variance + eps) and the biased variance.
    """
    choose(CONV_TRANSPOSE, implementation, call)  # or raises
    geometry = (call[name] for name in ("stride", "padding", "output_padding", "groups", "dilation"))
    kernel = CONV_TRANSPOSE_WITH_STATISTICS[implementation]
    return partial(kernel, call["input"], call["weight"], call["bias"], *geometry, eps)


def run(op: Op, impl: str | None, call: dict):
    """Choose an implementation and compute ``call`` with it."""
    return op.candidates[choose(op, impl, call)].run(**call)
