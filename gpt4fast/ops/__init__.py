"""The public ops: checks, docstrings and semantics. ``backends`` holds what computes them."""

from .attention import attention
from .attention_decode import attention_decode
from .attention_varlen import attention_varlen
from .conv_transpose import conv_transpose1d, conv_transpose2d, conv_transpose3d

__all__ = [
    "attention",
    "attention_decode",
    "attention_varlen",
    "conv_transpose1d",
    "conv_transpose2d",
    "conv_transpose3d",
]
