"""Why an implementation can't serve a call: a reason for the user, or None. The Triton kernels' stand beside them."""

from __future__ import annotations

import torch
from torch import Tensor

from . import native
from .autograd import in_forward_mode, in_transform, needs_grad

# Constants, since torch.compile traces through this file.
CPU_LIBRARY_ERROR = native.cpu_library_error()
CUDA_LIBRARY_ERROR = native.cuda_library_error()


def never(call: dict) -> None:
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
        return "the native kernels have no part in torch.func, forward-mode differentiation and exported programs"
    return None


def native_attention(call: dict) -> str | None:
    mask, slopes = call.get("attn_mask"), call["alibi_slopes"]
    if mask is not None and mask.dtype == torch.float64:
        return "the native kernel takes no float64 mask"
    if slopes is not None and needs_grad(slopes):
        return "the native kernel gives alibi_slopes no gradient"
    return native_refusal(call["query"])


def native_attention_decode(call: dict) -> str | None:
    if needs_grad(call["query"], call["key"], call["value"], call["key_cache"], call["value_cache"]):
        return "the native kernel of attention_decode gives no gradients"
    if call["key_cache"].dtype == torch.float8_e4m3fn:
        return "the native kernel of attention_decode takes caches in query's dtype and int8, not float8_e4m3fn"
    return native_attention(call)


def torch_attention(call: dict) -> str | None:
    if in_forward_mode():
        return "torch's fused attention has no forward-mode derivative"
    if call["return_lse"]:
        return "torch's attention does not return the log-sum-exp"
    if call["softcap"]:
        return "torch's attention has no softcap"
    return None


def native_conv_transpose(call: dict) -> str | None:
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
        return "the CUDA kernels have no part in torch.func, forward-mode differentiation and exported programs"
    return None


def cuda_conv_transpose(call: dict) -> str | None:
    return cuda_refusal(call["input"])


def cuda_attention(call: dict) -> str | None:
    query, value, mask = call["query"], call["value"], call.get("attn_mask")
    widest = max(query.shape[-1], value.shape[-1])
    if mask is not None and mask.dtype == torch.float64:
        return "the CUDA kernel of attention takes no float64 mask"
    if call["alibi_slopes"] is not None and needs_grad(call["alibi_slopes"]):
        return "the CUDA kernels of attention give alibi_slopes no gradient"
    if widest > 256:
        return f"the CUDA kernels of attention take rows of at most 256 numbers, and these have {widest}"
    return cuda_refusal(query)


def cuda_attention_decode(call: dict) -> str | None:
    query, names = call["query"], ("key", "value", "key_cache", "value_cache", "alibi_slopes")
    widest = max(query.shape[-1], call["value_cache"].shape[-1])
    if needs_grad(query, *(call[name] for name in names)):
        return "the CUDA kernel of attention_decode gives no gradients"
    if widest > 256:
        return f"the CUDA kernel of attention_decode takes rows of at most 256 numbers, and these have {widest}"
    return cuda_refusal(query)
