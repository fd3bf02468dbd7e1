"""Weights of transposed convolutions in the order that the native kernel reads, packed once and kept.

Torch's own kernels bring a weight into their order at every call, which for one image takes longer than the
convolution. The packed copies are kept beside the model, not in it: modules, state dicts, deep copies and pickles do
not change, and they go when their parameter goes. One takes as much memory as the weight, that for Winograd's
algorithm 1.5 times as much in one dimension, 2.25 in two, 3.4 in three.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.utils.weak import WeakTensorKeyDictionary

from .. import native

# parameter -> {winograd: (what it was packed from, packed)}
_PACKED: WeakTensorKeyDictionary = WeakTensorKeyDictionary()


def is_kept(weight: Tensor) -> bool:
    """Whether packed forms of a weight are kept from call to call.

    Not of a tensor that is no ``nn.Parameter``, which may not live long, and not while a gradient in it is wanted,
    since it is about to change.
    """
    if torch.compiler.is_compiling() or type(weight) is not nn.Parameter or weight.is_inference():
        return False
    return not (torch.is_grad_enabled() and weight.requires_grad)


def packed_weight(weight: Tensor, groups: int, winograd: bool) -> Tensor:
    """The packed form of a parameter, (bytes,), of which ``is_kept`` holds.

    Anything that torch's version counter sees makes a new one; the kernel itself compares 64 elements and packs afresh
    if ``weight.data`` was written to.
    """
    origin = (
        weight._version,
        weight.data_ptr(),
        weight.dtype,
        weight.shape,
        weight.stride(),
        groups,
        native.cpu_level(),
    )
    forms = _PACKED.get(weight)
    if forms is None:
        forms = _PACKED[weight] = {}
    kept = forms.get(winograd)
    if kept is None or kept[0] != origin:
        kept = forms[winograd] = origin, torch.ops.gpt4fast.conv_transpose_pack(weight, groups, winograd)
    return kept[1]
