"""Launching a kernel again for other tensors, without Triton's search for it: 100 us of Python beside an H200."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor


def replayable(
    kernel, grid: tuple[int, int, int], tensors: tuple[Tensor | None, ...], numbers: tuple, tile: dict[str, int]
) -> Callable[..., None]:
    """Launch a kernel whose parameters are ``tensors`` and then ``numbers``; ``num_warps`` and ``num_stages`` are of
    ``tile``.

    Returns:
        A function of other tensors, which launches the compiled kernel for them. They must be on the same, the current
        device, None where the first were, of their dtypes, and aligned like them to 16 bytes.
    """
    compiled = kernel[grid](*tensors, *numbers, num_warps=tile["num_warps"], num_stages=tile["num_stages"])
    if compiled is None:  # the interpreter
        return lambda *others: kernel[grid](*others, *numbers)
    launch = compiled[grid]
    return lambda *others: launch(*others, *numbers)
