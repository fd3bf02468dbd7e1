"""Drop-in modules: torch's classes, parameters and state-dict keys on gpt4fast's ops."""

from .attention import MultiheadAttention
from .conv_transpose import ConvTranspose1d, ConvTranspose2d, ConvTranspose3d
from .streaming import StreamingConvTranspose1d

__all__ = ["ConvTranspose1d", "ConvTranspose2d", "ConvTranspose3d", "MultiheadAttention", "StreamingConvTranspose1d"]
