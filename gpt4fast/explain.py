"""``explain``: which implementation runs, and why not another."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import partial

from torch import nn

from . import ops
from .backends import dispatch
from .ops.attention import prepare as prepare_attention
from .ops.attention_decode import prepare as prepare_attention_decode
from .ops.attention_varlen import prepare as prepare_attention_varlen
from .ops.conv_transpose import prepare as prepare_conv_transpose


def explain(op_or_model: Callable | str | nn.Module, *args, **kwargs):
    """Tell which implementation a call takes and why not the others, without computing it; or what became of a model.

    Args:
        op_or_model: an op (``gpt4fast.attention``, ``gpt4fast.conv_transpose2d``, …) or its name, followed by the
            arguments of the call; or a module, for a table of its parts, with ``example_inputs=`` (a tensor, or a tuple
            of arguments) also of how much faster each runs than on torch.

    Returns:
        An ``Explanation`` (op, implementation, reasons: one for each implementation not taken), which prints readably;
        for a module, the table of ``gpt4fast.integrations.explain_model``.

    Raises:
        TypeError, ValueError, RuntimeError: as the op itself would for these arguments.
    """
    if isinstance(op_or_model, nn.Module):
        from .integrations.explain_model import explain_model

        return explain_model(op_or_model, *args, **kwargs)
    name = op_or_model if isinstance(op_or_model, str) else getattr(op_or_model, "__name__", repr(op_or_model))
    if name not in _OPS:
        raise ValueError(f"op_or_model must be a module or one of {', '.join(_OPS)}, but is {name!r}")
    op, prepare = _OPS[name]
    bound = inspect.signature(getattr(ops, name)).bind(*args, **kwargs)
    bound.apply_defaults()
    impl = bound.arguments.pop("impl")
    return dispatch.explain(op, impl, prepare(**bound.arguments))


# Each public op: what dispatch knows it as, and its checked call from its arguments.
_OPS = {
    "attention": (dispatch.ATTENTION, lambda **arguments: prepare_attention(**arguments)[0]),
    "attention_varlen": (dispatch.ATTENTION_VARLEN, prepare_attention_varlen),
    "attention_decode": (dispatch.ATTENTION_DECODE, prepare_attention_decode),
    **{f"conv_transpose{n}d": (dispatch.CONV_TRANSPOSE, partial(prepare_conv_transpose, n)) for n in (1, 2, 3)},
}
