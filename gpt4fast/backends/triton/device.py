"""What tile sizes depend on: the GPU's generation and how much of it there is."""

from __future__ import annotations

import torch
from torch import Tensor

CAPABILITY_OF_INTERPRETER, PROCESSORS_OF_INTERPRETER = (9, 0), 4  # any would do; few processors make few programs


def capability_of(tensor: Tensor) -> tuple[int, int]:
    """Compute capability of a tensor's GPU."""
    return torch.cuda.get_device_capability(tensor.device) if tensor.is_cuda else CAPABILITY_OF_INTERPRETER


def processors_of(tensor: Tensor) -> int:
    """Number of multiprocessors of a tensor's GPU."""
    if not tensor.is_cuda:
        return PROCESSORS_OF_INTERPRETER
    return torch.cuda.get_device_properties(tensor.device).multi_processor_count
