"""Fast attention and transposed convolution for PyTorch, drop-in, and a small generative system built on them."""

from __future__ import annotations

import importlib

from .explain import explain
from .ops import attention, attention_decode, attention_varlen, conv_transpose1d, conv_transpose2d, conv_transpose3d

__version__ = "0.1.0"

# Imported at first use, so that `import gpt4fast` stays quick.
_LAZY = {
    "fast_ops": ".integrations.fast_ops",
    "optimize": ".integrations.optimize",
    "restore": ".integrations.restore",
}
_SUBPACKAGES = ("data", "generation", "integrations", "models", "nn", "training")

__all__ = [
    "attention",
    "attention_decode",
    "attention_varlen",
    "conv_transpose1d",
    "conv_transpose2d",
    "conv_transpose3d",
    "explain",
    "fast_ops",
    "optimize",
    "restore",
]


def __getattr__(name: str):
    if name in _LAZY:
        value = getattr(importlib.import_module(_LAZY[name], __name__), name)
        globals()[name] = value  # the function, not the module of the same name
        return value
    if name in _SUBPACKAGES:
        return importlib.import_module(f".{name}", __name__)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *_LAZY, *_SUBPACKAGES])
