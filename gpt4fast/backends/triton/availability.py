"""Whether Triton's kernels can serve a tensor here."""

from __future__ import annotations

import importlib.util
import os

import torch
from torch import Tensor

from ..autograd import in_transform

# Constants, since torch.compile traces through dispatch.
INSTALLED = importlib.util.find_spec("triton") is not None
INTERPRETED = os.environ.get("TRITON_INTERPRET", "").lower() in ("1", "true", "on", "yes", "y")


def triton_refusal(tensor: Tensor) -> str | None:
    """Why no Triton kernel can take a tensor, or None."""
    if not INSTALLED:
        return "triton is not installed"
    if not tensor.is_cuda and not (INTERPRETED and tensor.is_cpu):
        return f"the Triton kernels are for CUDA tensors, and this one is on {tensor.device}"
    if tensor.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return "the Triton kernels take float32, bfloat16 and float16; float64 runs on the reference"
    if tensor.is_cuda:
        if torch.version.hip is not None:
            return "the Triton kernels' tiles are chosen for NVIDIA GPUs"
        if torch.cuda.get_device_capability(tensor.device) < (8, 0):
            return "the Triton kernels need compute capability 8.0 (Ampere)"
    if in_transform():
        return "the Triton kernels have no part in torch.func, forward-mode differentiation and exported programs"
    return None
