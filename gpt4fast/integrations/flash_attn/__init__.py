"""flash-attn's functions on ``gpt4fast.attention``: any device (not yet run on a GPU), any floating dtype.

Signatures, layouts and meaning are those of flash-attn 2 (https://github.com/Dao-AILab/flash-attention)::

    from gpt4fast.integrations.flash_attn import flash_attn_func      # instead of: from flash_attn import …

    gpt4fast.integrations.flash_attn.install()                        # for code that says: import flash_attn

Tensors are (batch, length, heads, head_dim), or (tokens, heads, head_dim) with ``cu_seqlens``. Fewer heads of keys than
of queries are shared by groups. ``causal`` and ``window_size`` align the last query with the last key; -1 is unlimited.
ALiBi adds ``-slope * |i + length_k - length_q - j|``. A query that sees nothing gives zeros and a log-sum-exp of inf.
With ``return_attn_probs`` a function returns (out, softmax_lse, S_dmask): no gradient goes through the last two, and
S_dmask is empty without dropout; with it, weights before their scaling, negative where they were dropped. All results
are deterministic.
"""

from __future__ import annotations

import importlib.util
import sys

from . import bert_padding, flash_attn_interface
from .flash_attn_interface import (
    flash_attn_func,
    flash_attn_kvpacked_func,
    flash_attn_qkvpacked_func,
    flash_attn_varlen_func,
    flash_attn_varlen_kvpacked_func,
    flash_attn_varlen_qkvpacked_func,
    flash_attn_with_kvcache,
)

__version__ = "2.8.4+gpt4fast"  # the flash-attn whose interface this is

__all__ = [
    "flash_attn_func",
    "flash_attn_kvpacked_func",
    "flash_attn_qkvpacked_func",
    "flash_attn_varlen_func",
    "flash_attn_varlen_kvpacked_func",
    "flash_attn_varlen_qkvpacked_func",
    "flash_attn_with_kvcache",
    "install",
]


def install() -> None:
    """Let ``import flash_attn``, ``flash_attn.flash_attn_interface`` and ``flash_attn.bert_padding`` find this package,
    in this process.

    Raises:
        RuntimeError: flash-attn itself is installed.
    """
    this = sys.modules[__name__]
    if sys.modules.get("flash_attn") is this:
        return
    if importlib.util.find_spec("flash_attn") is not None:
        raise RuntimeError("install() stands in for a missing flash-attn only, but flash_attn is installed: use that")
    names = {"": this, ".flash_attn_interface": flash_attn_interface, ".bert_padding": bert_padding}
    sys.modules.update({f"flash_attn{suffix}": module for suffix, module in names.items()})
