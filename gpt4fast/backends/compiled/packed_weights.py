"""Weights of transposed convolutions in the order that the native kernel reads, packed once and kept.

Torch's own kernels bring a weight into their order at every call, which for one image takes longer than the
convolution. The packed copy is kept beside the model, not in it: modules, state dicts, deep copies and pickles do not
change, and it goes when its parameter goes. It takes as much memory as the weight.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.utils.weak import WeakTensorKeyDictionary

from .. import native

_PACKED: WeakTensorKeyDictionary = WeakTensorKeyDictionary()  # parameter -> (what it was packed from, packed)


def packed_weight(weight: Tensor, groups: int) -> Tensor | None:
    """The packed form of a parameter, (bytes,), or None: the kernel then packs for one call.

    None for a tensor that is no ``nn.Parameter``, which may not live long, and while a gradient in it is wanted, since
    it is about to change. Anything that torch's version counter sees makes a new one; the kernel itself compares 64
    elements and packs afresh if ``weight.data`` was written to.
    """
    if torch.compiler.is_compiling() or type(weight) is not nn.Parameter or weight.is_inference():
        return None
    if torch.is_grad_enabled() and weight.requires_grad:
        return None
    origin = (
        weight._version,
        weight.data_ptr(),
        weight.dtype,
        weight.shape,
        weight.stride(),
        groups,
        native.cpu_level(),
    )
    kept = _PACKED.get(weight)
    if kept is None or kept[0] != origin:
        kept = origin, torch.ops.gpt4fast.conv_transpose_pack(weight, groups)
        _PACKED[weight] = kept
    return kept[1]
