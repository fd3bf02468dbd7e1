"""``fast_ops()``: torch's own calls run on gpt4fast's kernels."""

from __future__ import annotations

import sys

import torch
import torch.nn.functional as F
from torch.overrides import TorchFunctionMode

from ..nn import attention, functional
from .swap import OURS


class fast_ops(TorchFunctionMode):
    """Within ``with fast_ops():`` code that calls torch's attention or transposed convolution runs on gpt4fast.

    Rerouted are ``torch.nn.functional.scaled_dot_product_attention``, ``conv_transpose1d``, ``conv_transpose2d`` and
    ``conv_transpose3d`` (also as ``torch.conv_transpose2d`` and from modules), the attention inside
    ``multi_head_attention_forward`` (``torch.nn.MultiheadAttention``) where weights are not asked for, and the
    gradients of ``conv1d``, ``conv2d`` and ``conv3d`` with a stride, which are transposed convolutions. Values, memory
    layout, dtype, errors and derivatives are torch's; what gpt4fast does not serve runs on torch
    (see ``gpt4fast.nn.functional``).

    The context belongs to the thread that entered it, like every torch mode; a function that recomputes in backward
    (``torch.utils.checkpoint``) needs the backward pass inside it too, or ``gpt4fast.optimize``. Nesting is allowed.
    """

    def __torch_function__(self, func, types, args=(), kwargs=None):
        fast = ROUTED.get(func)
        if fast is None:
            if func is _UNFLATTEN and torch.compiler.is_compiling():
                func = torch.unflatten  # the same; Dynamo can't trace the super() call of the method under a mode
            return func(*args, **kwargs) if kwargs else func(*args)
        kwargs = kwargs or {}
        if not torch.compiler.is_compiling() and sys._getframe(1).f_globals.get("__name__", "").startswith(OURS):
            return func(*args, **kwargs)  # our own code asks for torch's kernel, in a nested context for instance
        try:
            return fast(*args, **kwargs)
        except TypeError:
            pass  # not torch's signature: torch says what is wrong
        return func(*args, **kwargs)


ROUTED = {
    F.scaled_dot_product_attention: functional.scaled_dot_product_attention,
    F.conv1d: functional.conv1d,
    F.conv2d: functional.conv2d,
    F.conv3d: functional.conv3d,
    F.conv_transpose1d: functional.conv_transpose1d,
    F.conv_transpose2d: functional.conv_transpose2d,
    F.conv_transpose3d: functional.conv_transpose3d,
    F.multi_head_attention_forward: attention.multi_head_attention_forward,
}
_UNFLATTEN = torch.Tensor.unflatten
