"""Calls like one that was checked before: neither checked nor chosen again.

To check a call and to choose its implementation takes 15 us, more than a kernel for one small image or one new token,
and Triton's way to a compiled kernel 100. So calls that want no gradient are kept, by all that they depend on but the
numbers in their tensors.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ..backends import dispatch
from ..backends.autograd import in_transform

_MOST = 1024  # calls of an op: more are lengths that come and go
_PLAIN_SETTINGS = (int, float, bool, str, type(None))
_PLAIN_TENSORS = (Tensor, torch.nn.Parameter)

Key = tuple | None


class RepeatedCalls:
    """For one op, functions of a call's tensors by the call's key."""

    def __init__(self) -> None:
        self._bound: dict[tuple, Callable] = {}

    def get(self, key: Key) -> Callable | None:
        return self._bound.get(key)

    def keep(self, key: tuple, bound: Callable) -> Callable:
        if len(self._bound) >= _MOST:
            self._bound.clear()
        self._bound[key] = bound
        return bound


def key_of(tensors: Sequence[Tensor | None], settings: tuple, impl: str | None) -> Key:
    """What a call depends on but for the numbers in its tensors, of which the first is not None; None if that is more
    than is looked at here."""
    if torch.compiler.is_compiling() or in_transform() or dispatch.has_listeners():
        return None
    if torch.is_autocast_enabled("cpu") or torch.is_autocast_enabled("cuda"):
        return None
    for setting in settings:  # True and 2.0 are refused, but equal to 1 and 2
        if type(setting) is tuple:
            if not all(type(n) is int for n in setting):
                return None
        elif type(setting) not in _PLAIN_SETTINGS:
            return None
    on_gpu = type(tensors[0]) in _PLAIN_TENSORS and tensors[0].is_cuda
    tracks_gradients, parts = torch.is_grad_enabled(), []
    for tensor in tensors:
        if tensor is None:
            parts.append(None)
            continue
        if type(tensor) not in _PLAIN_TENSORS or tensor.layout is not torch.strided or tensor.is_nested:
            return None
        if not (tensor.is_cuda if on_gpu else tensor.is_cpu) or (tracks_gradients and tensor.requires_grad):
            return None
        parts += (type(tensor), tensor.dtype, tensor.shape, tensor.stride(), tensor.is_inference())
        if on_gpu:  # kernels are compiled for addresses that are multiples of 16
            parts += (tensor.device, tensor.data_ptr() % 16 == 0)
    if on_gpu:
        if tensors[0].numel() == 0 or torch.cuda.is_current_stream_capturing():
            return None  # what a graph is captured with was not tuned
        if torch._C._len_torch_dispatch_stack():  # what watches operators shall see them
            return None
        parts += (torch.backends.cudnn.conv.fp32_precision, torch.backends.cuda.matmul.fp32_precision)
        parts.append(torch.are_deterministic_algorithms_enabled())
    return (impl, os.environ.get("GPT4FAST_IMPL"), settings, *map(type, settings), *parts)
