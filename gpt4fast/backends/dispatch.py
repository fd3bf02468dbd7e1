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

import torch
from torch import Tensor

from . import native
from .aten import attention as aten_attention
from .aten import conv_transpose as aten_conv_transpose
from .autograd import in_forward_mode, in_transform, needs_grad
from .compiled import attention as compiled_attention
from .compiled import attention_decode as compiled_attention_decode
from .compiled import batch_norm as compiled_batch_norm
from .compiled import conv_transpose as compiled_conv_transpose
from .compiled import convolution as compiled_convolution
from .reference import attention as reference_attention
from .reference import conv_transpose as reference_conv_transpose
from .reference.attention_decode import attention_decode as cached_attention
from .reference.attention_varlen import attention_varlen as padded_attention
from .reference.conv_transpose import memory_format
from .triton import attention as triton_attention
from .triton import attention_decode as triton_attention_decode
from .triton import batch_norm as triton_batch_norm
from .triton import conv_transpose as triton_conv_transpose

# Constants, since torch.compile traces through this file.
CPU_LIBRARY_ERROR = native.cpu_library_error()
CUDA_LIBRARY_ERROR = native.cuda_library_error()
PORTABLE = native.cpu_level() == "scalar"  # four lanes against torch's eight or sixteen: attention 0.45 to 1

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
        for name in op.preference(call):
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


# Why an implementation can't serve a call


def _never(call: dict) -> None:
    return None


def native_refusal(tensor: Tensor) -> str | None:
    """Why the native kernels can't take a tensor, or None."""
    if CPU_LIBRARY_ERROR is not None:
        return CPU_LIBRARY_ERROR
    if not tensor.is_cpu:
        return f"the native kernels are for CPU tensors, and this one is on {tensor.device}"
    if tensor.dtype == torch.float64:
        return "the native kernels take float32, bfloat16 and float16; float64 runs on the reference"
    if in_transform():
        return "the native kernels have no rules for torch.func and forward-mode differentiation"
    return None


def _native_attention(call: dict) -> str | None:
    mask, slopes = call.get("attn_mask"), call["alibi_slopes"]
    if mask is not None and mask.dtype == torch.float64:
        return "the native kernel takes no float64 mask"
    if slopes is not None and needs_grad(slopes):
        return "the native kernel gives alibi_slopes no gradient"
    return native_refusal(call["query"])


def _native_attention_decode(call: dict) -> str | None:
    if needs_grad(call["query"], call["key"], call["value"], call["key_cache"], call["value_cache"]):
        return "the native kernel of attention_decode gives no gradients"
    if call["key_cache"].dtype == torch.float8_e4m3fn:
        return "the native kernel of attention_decode takes caches in query's dtype and int8, not float8_e4m3fn"
    return _native_attention(call)


def _torch_attention(call: dict) -> str | None:
    if in_forward_mode():
        return "torch's fused attention has no forward-mode derivative"
    if call["return_lse"]:
        return "torch's attention does not return the log-sum-exp"
    if call["softcap"]:
        return "torch's attention has no softcap"
    return None


def _native_conv_transpose(call: dict) -> str | None:
    return native_refusal(call["input"])


def cuda_refusal(tensor: Tensor) -> str | None:
    """Why the CUDA kernels can't take a tensor, or None."""
    if CUDA_LIBRARY_ERROR is not None:
        return CUDA_LIBRARY_ERROR
    if tensor.device.type != "cuda":
        return f"the CUDA kernels are for CUDA tensors, and this one is on {tensor.device}"
    if tensor.dtype == torch.float64:
        return "the CUDA kernels take float32, bfloat16 and float16"
    if in_transform():
        return "the CUDA kernels have no rules for torch.func and forward-mode differentiation"
    return None


def _cuda_conv_transpose(call: dict) -> str | None:
    return cuda_refusal(call["input"])


def _cuda_attention(call: dict) -> str | None:
    query = call["query"]
    others = [name for name in ("key", "value", "key_cache", "value_cache", "alibi_slopes") if name in call]
    widest = max(query.shape[-1], call.get("value_cache", call["value"]).shape[-1])
    if needs_grad(query, *(call[name] for name in others)):
        return "the CUDA kernels of attention give no gradients"
    if call.get("attn_mask") is not None or call.get("dropout_p"):
        return "the CUDA kernel of attention has no mask and no dropout"
    if "key_cache" in call and call["key_cache"].dtype == torch.float8_e4m3fn:
        return "the CUDA kernel of attention_decode takes caches in query's dtype and int8, not float8_e4m3fn"
    if widest > 256:
        return f"the CUDA kernels of attention take rows of at most 256 numbers, and these have {widest}"
    return cuda_refusal(query)


# What "auto" prefers. The figures are torch's time / the native kernel's, on 2 cores (Zen 5): benchmarks/LOG.md.


def _prefer_attention(call: dict) -> tuple[str, ...]:
    query, key = call["query"], call["key"]
    if not query.is_cpu:
        return "torch", "reference"
    bounded = call["kv_lengths"] is not None or call["kv_starts"] is not None or call["window"] is not None
    # In multiply-adds of the scores. 1x4x32x32 over 32 keys: 0.8; 1x8x64x64 over 64 keys: 2.2.
    tiny = not torch.compiler.is_compiling() and query.numel() * key.shape[2] <= 1 << 18
    if not bounded and (PORTABLE or (tiny and not needs_grad(query, key, call["value"]))):
        return "torch", "native", "reference"
    return "native", "torch", "reference"  # torch needs a mask for bounds, which costs more than its kernel saves


def _prefer_packed_or_cached(call: dict) -> tuple[str, ...]:
    return ("native", "torch", "reference") if call["query"].is_cpu else ("torch", "reference")


# Multiply-adds of a convolution. Torch's own autograd costs 60 us less a call.
FEWEST_PRODUCTS_OF_TRAINING = 1 << 25


def convolution_gradients_win(
    dtype: torch.dtype, input: Tensor, weight: Tensor, bias: Tensor | None, stride: tuple[int, ...], groups: int
) -> bool:
    """Whether a gradient of a convolution, computed in dtype, is wanted for which a native kernel is faster."""
    if not needs_grad(input, weight, bias) or min(stride) == 1 or groups > 1:
        return False
    if native_refusal(input) is not None or dtype.is_complex or native.cpu_level() == "scalar":
        return False
    pixels = input.shape[0] * input.shape[2:].numel()
    if pixels * weight.numel() < FEWEST_PRODUCTS_OF_TRAINING:
        return False
    wins = compiled_convolution.native_wins(dtype, input, weight, stride)
    return (wins[0] and input.requires_grad) or (wins[1] and weight.requires_grad)


def _prefer_conv_transpose(call: dict) -> tuple[str, ...]:
    input, weight = call["input"], call["weight"]
    channels, outputs = weight.shape[0] // call["groups"], weight.shape[1]
    if PORTABLE or not input.is_cpu:
        return ("torch",)
    if needs_grad(input, weight, call["bias"], call["scale"], call["shift"]):
        wins = channels >= 16 and input.numel() * weight[0].numel() >= FEWEST_PRODUCTS_OF_TRAINING  # 1.1 to 1.9 above
        crashes = compiled_conv_transpose.torch_crashes(input, weight, call["padding"], call["dilation"])
        return ("native", "torch") if wins or crashes else ("torch",)
    pixels = input.shape[0] * input.shape[2:].numel()
    channels_last = memory_format(input, weight) != torch.contiguous_format
    if input.dtype == torch.float16:
        wins = True  # torch has no fast kernel: 1.3 to 50
    elif outputs <= 4:
        wins = True  # 2.5 to 3.5; depthwise 1.1 to 38
    elif call["groups"] > 1 and outputs < 16:
        # Half of the lanes are empty. Torch's kernel for groups of 8 is fast for single images, and in bfloat16 always:
        # 0.4 to 1.0; elsewhere 2.4 to 2.7.
        wins = input.dtype == torch.float32 and not channels_last and (input.shape[0] > 1 or channels % 8 > 0)
    elif type(weight) is not torch.nn.Parameter and pixels < 256:
        wins = False  # a weight that is no parameter is packed at every call: 0.4 to 0.9
    else:
        # 1.1 to 14; large and channels last 0.9 to 1.0 alone, and 1.1 with what follows in the same pass.
        fuses = call["activation"] is not None or call["scale"] is not None or call["shift"] is not None
        # Groups, channels last: alone 0.5 to 1.3, with what follows 0.9 to 1.5.
        wins = not channels_last or fuses or (call["groups"] == 1 and pixels <= 1024)
    return ("native", "torch") if wins else ("torch",)


ATTENTION = Op(
    "attention",
    {
        "native": Candidate(compiled_attention.attention, _native_attention),
        "triton": Candidate(triton_attention.attention, triton_attention.refusal),
        "cuda": Candidate(compiled_attention.attention, _cuda_attention),
        "reference": Candidate(reference_attention.attention, _never),
        "torch": Candidate(aten_attention.attention, _torch_attention),
    },
    _prefer_attention,
)
ATTENTION_VARLEN = Op(
    "attention_varlen",
    {
        "native": Candidate(compiled_attention.attention_varlen, _native_attention),
        "triton": Candidate(triton_attention.attention_varlen, triton_attention.refusal),
        "cuda": Candidate(compiled_attention.attention_varlen, _cuda_attention),
        "reference": Candidate(partial(padded_attention, reference_attention.attention), _never),
        "torch": Candidate(partial(padded_attention, aten_attention.attention), _torch_attention),
    },
    _prefer_packed_or_cached,
)
ATTENTION_DECODE = Op(
    "attention_decode",
    {
        "native": Candidate(compiled_attention_decode.attention_decode, _native_attention_decode),
        "triton": Candidate(triton_attention_decode.attention_decode, triton_attention_decode.refusal),
        "cuda": Candidate(compiled_attention_decode.attention_decode, _cuda_attention),
        "reference": Candidate(partial(cached_attention, reference_attention.attention), _never),
        "torch": Candidate(partial(cached_attention, aten_attention.attention), _torch_attention),
    },
    _prefer_packed_or_cached,
)
CONV_TRANSPOSE = Op(
    "conv_transpose",
    {
        "native": Candidate(compiled_conv_transpose.conv_transpose, _native_conv_transpose),
        "triton": Candidate(triton_conv_transpose.conv_transpose, triton_conv_transpose.refusal),
        "cuda": Candidate(compiled_conv_transpose.cuda_conv_transpose, _cuda_conv_transpose),
        "reference": Candidate(reference_conv_transpose.conv_transpose, _never),
        "torch": Candidate(aten_conv_transpose.conv_transpose, _never),
    },
    _prefer_conv_transpose,
)


# Batch norm by the batch's statistics, and the activation behind it: no public op, but a part of modules, which call
# torch for what these kernels do not serve.
BATCH_NORM = {
    "native": compiled_batch_norm.batch_norm_activation,
    "triton": triton_batch_norm.batch_norm_activation,
}


def choose_batch_norm(input: Tensor) -> str:
    """The name of the implementation for input (N, C, *spatial): a key of BATCH_NORM, or "torch"."""
    name = requested(None)
    if name == "triton" and triton_batch_norm.refusal(input) is None:
        return "triton"
    # Channels last: torch's is as fast.
    if name in ("auto", "native") and input.is_contiguous() and native_refusal(input) is None:
        return "native"
    return "torch"


def conv_transpose_with_statistics(call: dict, eps: float) -> Callable[[], tuple[Tensor, ...]]:
    """Computes a call that has only a convolution, and what a batch norm needs of its output, by the Triton kernels."""
    choose(CONV_TRANSPOSE, "triton", call)  # or raises
    geometry = (call[name] for name in ("stride", "padding", "output_padding", "groups", "dilation"))
    return partial(
        triton_conv_transpose.conv_transpose_with_statistics,
        call["input"],
        call["weight"],
        call["bias"],
        *geometry,
        eps,
    )


def run(op: Op, impl: str | None, call: dict):
    """Choose an implementation and compute ``call`` with it."""
    return op.candidates[choose(op, impl, call)].run(**call)
