"""What "auto" takes for a call: the implementations in the order in which they are tried, by measurements.

The figures are torch's time / ours: on a CPU with 2 cores, on a GPU with an H200 (benchmarks/LOG.md).
"""

from __future__ import annotations

import torch
from torch import Tensor

from . import native
from .aten.conv_transpose import is_matrix_product
from .autograd import needs_grad
from .compiled import conv_transpose_gradients
from .compiled import convolution as compiled_convolution
from .reference.conv_transpose import memory_format
from .refusals import native_refusal

PORTABLE = native.cpu_level() == "scalar"  # four lanes against torch's eight or sixteen: attention 0.45 to 1


def attention(call: dict) -> tuple[str, ...]:
    query, key = call["query"], call["key"]
    if not query.is_cpu:
        return _attention_on_gpu(call)
    bounded = call["kv_lengths"] is not None or call["kv_starts"] is not None or call["window"] is not None
    # In multiply-adds of the scores. 1x4x32x32 over 32 keys: 0.8; 1x8x64x64 over 64 keys: 2.2.
    tiny = not torch.compiler.is_compiling() and query.numel() * key.shape[2] <= 1 << 18
    if not bounded and (PORTABLE or (tiny and not needs_grad(query, key, call["value"]))):
        return "torch", "native", "reference"
    return "native", "torch", "reference"  # torch needs a mask for bounds, which costs more than its kernel saves


def _attention_on_gpu(call: dict) -> tuple[str, ...]:
    """Torch's cuDNN kernel is the fastest of plain attention: 1.3 to 1.5 times Triton's, 2 times in training. Where
    torch makes a mask of what that does not know: 2.3 to 13. The CUDA kernel costs 60 us of Python, Triton's 250."""
    bounds = ("kv_lengths", "kv_starts", "window", "alibi_slopes", "attn_mask")
    offset = call["query_offset"]
    is_plain = all(call[name] is None for name in bounds) and not (call["softcap"] or call["return_lse"])
    if is_plain and isinstance(offset, int) and (offset == 0 or not call["is_causal"]):
        return "torch", "reference"
    return _kernels_on_gpu(call)


def packed_or_cached_attention(call: dict) -> tuple[str, ...]:
    # On a GPU 7 to 9 for packed sequences (1.4 to 2 beside one padded call), 7 to 14 for decoding, int8 caches 44.
    return ("native", "torch", "reference") if call["query"].is_cpu else _kernels_on_gpu(call)


def _kernels_on_gpu(call: dict) -> tuple[str, ...]:
    """The CUDA kernels were measured without mask, dropout and gradients: there Triton's come first, and torch's."""
    if "key_cache" in call:
        float8 = call["key_cache"].dtype == torch.float8_e4m3fn  # only Triton's was measured, which older GPUs lack
        return ("triton", "cuda", "torch", "reference") if float8 else ("cuda", "triton", "torch", "reference")
    needed = needs_grad(call["query"], call["key"], call["value"], call.get("attn_mask"))
    if needed or call.get("attn_mask") is not None or call["dropout_p"]:
        return "triton", "torch", "cuda", "reference"
    return "cuda", "triton", "torch", "reference"


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


def conv_transpose(call: dict) -> tuple[str, ...]:
    input, weight = call["input"], call["weight"]
    channels, outputs = weight.shape[0] // call["groups"], weight.shape[1]
    if not input.is_cpu:
        return _conv_transpose_on_gpu(call)
    if PORTABLE:
        return ("torch",)
    pixels = input.shape[0] * input.shape[2:].numel()
    if needs_grad(input, weight, call["bias"], call["scale"], call["shift"]):
        geometry = (call[name] for name in ("padding", "output_padding", "groups", "dilation"))
        if is_matrix_product(input, weight, *geometry):
            return ("torch",)  # 1.4 to 3 times as fast as the native kernels
        # 1.1 to 1.9 above; of few pixels, for which the weight must be packed all the same, 0.4 to 1.4 below.
        fewest = 1 << 19 if pixels >= 128 else FEWEST_PRODUCTS_OF_TRAINING
        wins = channels >= 16 and input.numel() * weight[0].numel() >= fewest
        crashes = conv_transpose_gradients.torch_crashes(input, weight, call["padding"], call["dilation"])
        return ("native", "torch") if wins or crashes else ("torch",)
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


def _conv_transpose_on_gpu(call: dict) -> tuple[str, ...]:
    """Triton's kernel, 1.0 to 2.9 with what follows in the same pass, 1.1 to 1.4 alone with few outputs, depthwise 5.
    In float32 torch's is faster (0.5 to 1.0), in training too (0.6 to 0.9)."""
    input, weight, groups = call["input"], call["weight"], call["groups"]
    if needs_grad(input, weight, call["bias"], call["scale"], call["shift"]) or input.dtype == torch.float32:
        return ("torch",)
    fuses = call["activation"] is not None or call["scale"] is not None or call["shift"] is not None
    depthwise = weight.shape[0] == groups and weight.shape[1] == 1
    return ("triton", "torch") if fuses or depthwise or weight.shape[1] * groups <= 64 else ("torch",)
