"""Transposed convolution of a stream: chunks in, chunks out, and these make up one call's output over the whole."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .. import ops
from ..ops.checks import autocast_dtype, check_like, check_tensor, describe
from .conv_transpose import ConvTranspose1d, inference_affine


class StreamingConvTranspose1d(nn.Module):
    """Runs a ``ConvTranspose1d`` over a stream, for vocoders and codecs: nothing is approximated, nothing comes late.

    The outputs of all chunks and of ``flush()``, concatenated, equal ``conv`` over the concatenated chunks, up to
    rounding; where that call would raise because padding leaves no output, they are empty. Each chunk gives every
    output that no later one can change. A model that cuts off the tail (EnCodec) calls ``reset()``, not ``flush()``.

    Args:
        conv: ``torch.nn.ConvTranspose1d`` or ``gpt4fast.nn.ConvTranspose1d``, with its norm (in eval mode) and
            activation. It is shared, not copied: state-dict keys are ``conv.*``. The stream itself is in no state dict.

    Gradients flow through the stream, so with gradients enabled its graph grows until ``flush()`` or ``reset()``.

    Raises:
        TypeError: ``conv`` is something else, or has another ``forward``.

    Reference: overlap-save, in Oppenheim and Schafer, "Discrete-Time Signal Processing". Used for: Kong et al.,
    "HiFi-GAN", 2020; Défossez et al., "High Fidelity Neural Audio Compression", 2022.
    """

    # Places are positions in the output before padding cuts both its ends: frame i adds to the `reach` places from
    # i * stride on. The last frames are kept, rather than their partial sums: an activation needs whole sums, and one
    # fused call gives these, with no pass over them afterwards and no rounding of a half type in between. A kernel that
    # gathers does the same multiplications either way; one that scatters repeats those of the few frames kept.

    def __init__(self, conv: nn.ConvTranspose1d) -> None:
        super().__init__()
        forwards = (nn.ConvTranspose1d.forward, ConvTranspose1d.forward)
        if not isinstance(conv, nn.ConvTranspose1d) or type(conv).forward not in forwards or "forward" in vars(conv):
            raise TypeError(f"conv must be a ConvTranspose1d of torch.nn or gpt4fast.nn, but is {describe(conv)}")
        self.conv = conv
        self.stride = conv.stride[0]
        self.reach = conv.dilation[0] * (conv.kernel_size[0] - 1) + 1
        self.reset()

    def reset(self) -> None:
        """Forget the stream; the next chunk begins another one, of any batch size."""
        self.frames: Tensor | None = None  # (N, C, few): the last ones, as far as outputs to come need them
        self.next = self.conv.padding[0]  # place of the next output; place 0 is the first of `frames`

    def forward(self, chunk: Tensor) -> Tensor:
        """The outputs that ``chunk`` makes final.

        Args:
            chunk: (N, C, T), T of any size, 0 included; ``conv``'s dtype unless autocast is on, and ``conv``'s device.

        Returns:
            (N, Cout, T'), T' possibly 0.

        Raises:
            TypeError, ValueError: chunk has the wrong type, dtype, device or shape, or another batch size, dtype or
                device than the chunks before it (ValueError). The stream is then what it was.
            RuntimeError: the norm would take its statistics from the chunk, or ``conv`` has forward hooks.
        """
        self._check_conv()
        self._check_chunk(chunk)
        frames = chunk if self.frames is None else torch.cat([self.frames, chunk], -1)
        count = frames.shape[-1]
        # Final is what lies before the first place that a frame to come adds to: usually that frame's own first place,
        # but padding may start the output beyond it, where dilation leaves gaps. Nor may it be cut, should none come.
        coming, taps = count * self.stride, range(0, self.reach, self.conv.dilation[0])
        stop = max(self.next, coming)
        while not any(stop - tap >= coming and (stop - tap) % self.stride == 0 for tap in taps):
            stop += 1
        stop = min(stop, self._end(count))
        output = self._outputs(frames, stop)
        position = self.next + output.shape[-1]
        overlap = max(0, self.reach - self.stride)
        # Where output follows the last frame's places (all bias), that frame stays for flush() to call with.
        kept = 1 if self._end(0) > 0 else 0
        done = max(0, min((position - overlap) // self.stride, count - kept))
        # A copy: the caller may write the next chunk over this one, and a view would hold all of it in memory.
        self.frames, self.next = frames[..., done:].clone(), position - done * self.stride
        return output

    def flush(self) -> Tensor:
        """The rest of the stream's output, (N, Cout, T'), or (0, Cout, 0) if there was no chunk; then ``reset()``."""
        self._check_conv()
        frames = self.conv.weight.new_empty(0, self.conv.in_channels, 0) if self.frames is None else self.frames
        output = self._outputs(frames, self._end(frames.shape[-1]))
        self.reset()
        return output

    def _end(self, count: int) -> int:
        """The place at which the output ends if the stream ends after ``count`` frames."""
        return (count - 1) * self.stride + self.reach + self.conv.output_padding[0] - self.conv.padding[0]

    def _outputs(self, frames: Tensor, stop: int) -> Tensor:
        """The outputs at the places from ``self.next`` to ``stop``: (N, Cout, stop - self.next)."""
        conv, start, count = self.conv, self.next, frames.shape[-1]
        if stop <= start or count == 0:
            dtype = autocast_dtype(frames) or frames.dtype
            return frames.new_empty(frames.shape[0], conv.out_channels, 0, dtype=dtype)
        # Padding cuts both ends, and output_padding gives some of the last one back: after the first chunk this leaves
        # exactly these outputs, and where it can't (the ends of the stream) the fewest that contain them.
        cut = (count - 1) * self.stride + self.reach - stop  # from the end; negative beyond the last frame
        padding = min(start, cut + max(self.stride, conv.dilation[0]) - 1)
        output_padding = max(0, padding - cut)
        norm, scale, shift = getattr(conv, "norm", None), None, None
        if norm is not None:
            scale, shift = inference_affine(norm)
        output = ops.conv_transpose1d(
            frames, conv.weight, conv.bias, self.stride, padding, output_padding, conv.groups, conv.dilation,
            scale=scale, shift=shift, activation=getattr(conv, "activation", None),
            negative_slope=getattr(conv, "negative_slope", 0.01),
        )  # fmt: skip
        return output[..., start - padding : stop - padding]

    def _check_conv(self) -> None:
        norm = getattr(self.conv, "norm", None)
        if norm is not None and (norm.training or norm.running_mean is None):
            raise RuntimeError(
                "conv's norm must be in eval mode with running statistics: those of a chunk are not the stream's"
            )
        if self.conv._forward_pre_hooks or self.conv._forward_hooks:
            raise RuntimeError(
                "conv must have no forward hooks, which a stream can't run, but has some: if from "
                "torch.nn.utils.weight_norm, use remove_weight_norm or torch.nn.utils.parametrizations.weight_norm"
            )

    def _check_chunk(self, chunk: Tensor) -> None:
        check_tensor("chunk", chunk)
        if chunk.dim() != 3 or chunk.shape[1] != self.conv.in_channels:
            raise ValueError(f"chunk must have shape (N, {self.conv.in_channels}, T), but is {describe(chunk)}")
        if self.frames is not None:
            stream = (self.frames.shape[0], self.frames.dtype, self.frames.device)
            if (chunk.shape[0], chunk.dtype, chunk.device) != stream:
                expected = "batch size {}, {}, {}".format(*stream)
                raise ValueError(f"chunk must be like the stream so far ({expected}), but is {describe(chunk)}")
        if autocast_dtype(chunk) is None:
            check_like("chunk", chunk, "conv.weight", self.conv.weight)
