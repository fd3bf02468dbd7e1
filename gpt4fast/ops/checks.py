"""Argument checks shared by the public ops: every error names the argument, what it was and what was expected."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

FLOAT_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
INDEX_DTYPES = (torch.int32, torch.int64)


def describe(value: object) -> str:
    """``a tensor of shape (2, 3), torch.float32, cpu`` or ``'text' (str)``, for error messages."""
    if isinstance(value, Tensor):
        return f"a tensor of shape {tuple(value.shape)}, {value.dtype}, {value.device}"
    return f"{value!r} ({type(value).__name__})"


def check_tensor(name: str, value: object, *, dtypes: Sequence[torch.dtype] = FLOAT_DTYPES) -> None:
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} must be a tensor, but is {describe(value)}")
    if value.layout != torch.strided:
        raise TypeError(f"{name} must be a dense (strided) tensor, but its layout is {value.layout}")
    if value.dtype not in dtypes:
        expected = ", ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
        raise TypeError(f"{name} must have one of the dtypes {expected}, but is {describe(value)}")


def check_like(name: str, value: Tensor, other_name: str, other: Tensor) -> None:
    """Same dtype and device as another argument."""
    check_dtype(name, value, other_name, other)
    check_device(name, value, other_name, other)


def check_dtype(name: str, value: Tensor, other_name: str, other: Tensor) -> None:
    if value.dtype != other.dtype:
        raise TypeError(f"{name} must have {other_name}'s dtype {other.dtype}, but is {describe(value)}")


def check_device(name: str, value: Tensor, other_name: str, other: Tensor) -> None:
    if value.device != other.device:
        raise ValueError(f"{name} must be on {other_name}'s device {other.device}, but is {describe(value)}")


def check_index_tensor(name: str, value: object, size: int, size_name: str, like_name: str, like: Tensor) -> None:
    """A 1-D integer tensor with one entry per batch row."""
    check_tensor(name, value, dtypes=INDEX_DTYPES)
    check_device(name, value, like_name, like)
    if value.dim() != 1 or value.shape[0] != size:
        raise ValueError(f"{name} must have shape ({size},), one entry per {size_name}, but is {describe(value)}")


def check_bool(name: str, value: object) -> None:
    if value is not True and value is not False:
        raise TypeError(f"{name} must be True or False, but is {describe(value)}")


def is_number(value: object) -> bool:
    return type(value) is float or (
        isinstance(value, (int, float, torch.SymInt, torch.SymFloat)) and not isinstance(value, bool)
    )


def is_integer(value: object) -> bool:
    return type(value) is int or (isinstance(value, (int, torch.SymInt)) and not isinstance(value, bool))


def check_number(name: str, value: object, *, low: float, high: float = float("inf"), high_open: bool = False) -> None:
    if not is_number(value):
        raise TypeError(f"{name} must be a number, but is {describe(value)}")
    # The comparison is written so that NaN fails it.
    if not (low <= value < high if high_open else low <= value <= high):
        raise ValueError(f"{name} must be in [{low}, {high}{')' if high_open else ']'}, but is {value}")


def check_finite(name: str, value: object) -> None:
    check_number(name, value, low=-1.7e308, high=1.7e308)


def to_tuple(name: str, value: object, dims: int, minimum: int) -> tuple[int, ...]:
    """An int, or a sequence of ``dims`` ints (or of one), as ``dims`` ints, none below ``minimum``."""
    if type(value) is int and minimum <= value <= 2**31 - 1:  # the common case, four times a call
        return (value,) * dims
    values = (value,) * dims if is_integer(value) else value
    if not isinstance(values, (tuple, list)) or not all(is_integer(v) for v in values):
        raise TypeError(f"{name} must be an int or {dims} ints, but is {describe(value)}")
    if len(values) == 1:
        values = tuple(values) * dims
    if len(values) != dims:
        raise ValueError(f"{name} must be an int or {dims} ints, but has {len(values)}: {value}")
    if any(v < minimum for v in values):
        raise ValueError(f"{name} must be at least {minimum}, but is {value}")
    if any(v > 2**31 - 1 for v in values):
        raise ValueError(f"{name} must be below 2^31, but is {value}")
    return tuple(values)


def autocast_dtype(tensor: Tensor) -> torch.dtype | None:
    """The dtype that an enclosing ``torch.autocast`` wants matrix products in, or None.

    As in torch, float64 tensors are left alone.
    """
    device = "cpu" if tensor.is_cpu else "cuda" if tensor.is_cuda else None
    if device is None or not torch.is_autocast_enabled(device) or tensor.dtype == torch.float64:
        return None
    return torch.get_autocast_dtype(device)


def without_autocast(compute, tensor: Tensor):
    """``compute()`` with autocast off for ``tensor``'s device: its operands have the wanted dtype already, and the
    float32 accumulation inside must stay float32."""
    if autocast_dtype(tensor) is None:
        return compute()
    with torch.autocast(tensor.device.type, enabled=False):
        return compute()
