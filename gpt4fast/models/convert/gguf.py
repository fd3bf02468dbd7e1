"""A GGUF file: the metadata and tensors that llama.cpp's kin keep in one file.

    header      "GGUF", version, how many tensors, how many metadata values
    metadata    key, type, value, one after another
    tensors     name, dimensions (the innermost first), type, offset
    data        padded to the alignment, each tensor at its offset

Little-endian; https://github.com/ggml-org/ggml/blob/master/docs/gguf.md. A count, size or offset that the file has no
room for is an error before anything is made of it. Quantised blocks are turned into numbers by the `gguf` package,
which its authors keep; its reader is not used, since it follows an absurd count for ever, and makes an array of every
token (a vocabulary of 150,000 took it 8.5 s, and this one 0.2).
"""

from __future__ import annotations

import math
import mmap
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

MAGIC, VERSIONS = b"GGUF", (2, 3)
# Metadata types by number: how struct reads one.
_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_STRING, _ARRAY = 8, 9
_PLAIN = {0: torch.float32, 1: torch.float16, 28: torch.float64, 30: torch.bfloat16}  # tensor types without blocks
_MOST_DIMENSIONS = 4


@dataclass
class TensorInfo:
    shape: tuple[int, ...]  # as torch has it, the innermost last
    type: int
    start: int  # of its bytes, in the data and then in the file
    size: int  # in bytes


class GGUFFile:
    """Metadata by key in `metadata` (arrays of strings, which are vocabularies, are left out), tensors by `read`."""

    def __init__(self, path: Path):
        self.path = path
        with open(path, "rb") as file:
            if path.stat().st_size == 0:
                raise ValueError(f"{path} is empty")
            # A private copy: torch wants memory that could be written to.
            self._bytes = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
        self._place = 0
        if self._take(4, "magic") != MAGIC:
            raise ValueError(f"{path} is not a GGUF file: it does not begin with 'GGUF'")
        version = self._scalar(4, "version")
        if version not in VERSIONS:
            raise ValueError(f"{path} has GGUF version {version}, which is not supported; it must be 2 or 3")
        tensors, values = self._scalar(10, "tensor count"), self._scalar(10, "metadata count")
        self.metadata: dict[str, Any] = {}
        for _ in range(values):
            key = self._string("metadata key")
            value = self._value(self._scalar(4, key), key)
            if key in self.metadata:
                raise ValueError(f"{path} has the metadata key {key} twice")
            self.metadata[key] = value
        self.tensors: dict[str, TensorInfo] = {}
        for _ in range(tensors):
            name = self._string("tensor name")
            if name in self.tensors:
                raise ValueError(f"{path} has the tensor {name} twice")
            self.tensors[name] = self._tensor_info(name)
        self._place_data()

    def dtype(self, name: str) -> torch.dtype:
        """What `read` gives."""
        return _PLAIN.get(self.tensors[name].type, torch.float32)

    def read(self, name: str) -> Tensor:
        """A tensor in its own dtype; of quantised blocks in float32."""
        info = self.tensors[name]
        if info.type in _PLAIN:
            count = math.prod(info.shape)
            return torch.frombuffer(self._bytes, dtype=_PLAIN[info.type], count=count, offset=info.start).view(
                info.shape
            )
        import numpy

        gguf = _gguf(self.path, name, info.type)
        data = numpy.frombuffer(self._bytes, dtype=numpy.uint8, count=info.size, offset=info.start)
        rows = data.reshape(*info.shape[:-1], -1)
        try:
            numbers = gguf.quants.dequantize(rows, gguf.GGMLQuantizationType(info.type))
        except NotImplementedError:
            raise self._unknown_type(name, info.type) from None
        return torch.from_numpy(numpy.ascontiguousarray(numbers, dtype=numpy.float32)).view(info.shape)

    # -- Reading the header --------------------------------------------------------------------------------------------

    def _take(self, count: int, what: str) -> bytes:
        start, self._place = self._place, self._place + count
        if self._place > len(self._bytes):
            raise ValueError(
                f"{self.path} ends within its {what}: {count} bytes from {start} on, of {len(self._bytes)}"
            )
        return self._bytes[start : self._place]

    def _scalar(self, kind: int, what: str) -> Any:
        code = "<" + _SCALARS[kind]
        return struct.unpack(code, self._take(struct.calcsize(code), what))[0]

    def _string(self, what: str) -> str:
        try:
            return self._take(self._scalar(10, what), what).decode("utf-8")
        except UnicodeDecodeError as error:
            raise ValueError(f"{self.path}: {what} is not UTF-8: {error}") from None

    def _value(self, kind: int, key: str) -> Any:
        if kind in _SCALARS:
            return self._scalar(kind, key)
        if kind == _STRING:
            return self._string(key)
        if kind != _ARRAY:
            raise ValueError(f"{self.path}: metadata {key} is of type {kind}, which GGUF does not have")
        kind, count = self._scalar(4, key), self._scalar(10, key)
        if kind == _STRING:
            for _ in range(count):
                self._take(self._scalar(10, key), key)
            return None
        if kind not in _SCALARS:
            raise ValueError(f"{self.path}: metadata {key} is an array of type {kind}, which is not supported")
        size = struct.calcsize("<" + _SCALARS[kind])
        return list(struct.unpack(f"<{count}{_SCALARS[kind]}", self._take(count * size, key)))

    def _tensor_info(self, name: str) -> TensorInfo:
        dimensions = self._scalar(4, name)
        if not 1 <= dimensions <= _MOST_DIMENSIONS:
            raise ValueError(
                f"{self.path}: tensor {name} has {dimensions} dimensions; it must have 1 to {_MOST_DIMENSIONS}"
            )
        shape = tuple(reversed([self._scalar(10, name) for _ in range(dimensions)]))
        kind, offset = self._scalar(4, name), self._scalar(10, name)
        if kind in _PLAIN:
            block, block_size = 1, _PLAIN[kind].itemsize
        else:
            gguf = _gguf(self.path, name, kind)
            try:
                block, block_size = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType(kind)]
            except (ValueError, KeyError):
                raise self._unknown_type(name, kind) from None
        if min(shape) < 1 or shape[-1] % block:
            raise ValueError(f"{self.path}: tensor {name} has the shape {shape}, of rows not in blocks of {block}")
        return TensorInfo(shape, kind, offset, math.prod(shape) // block * block_size)

    def _place_data(self) -> None:
        """Turns offsets into places in the file, which must hold every byte."""
        alignment = self.metadata.get("general.alignment", 32)
        if not isinstance(alignment, int) or alignment < 8 or alignment & (alignment - 1):
            raise ValueError(f"{self.path}: general.alignment is {alignment!r}; it must be a power of two from 8 on")
        start = -(-self._place // alignment) * alignment
        for name, info in self.tensors.items():
            if info.start % alignment or start + info.start + info.size > len(self._bytes):
                raise ValueError(
                    f"{self.path}: tensor {name} has {info.size} bytes from {start + info.start} on, which is not "
                    f"aligned or past the file's end at {len(self._bytes)}"
                )
            info.start += start

    def _unknown_type(self, name: str, kind: int) -> ValueError:
        return ValueError(f"{self.path}: tensor {name} is of type {kind}, which is not supported")


def _gguf(path: Path, name: str, kind: int) -> Any:
    try:
        import gguf
        import gguf.quants
    except ImportError:
        raise ImportError(
            f"{path}: tensor {name} is quantised (type {kind}), which needs the package gguf: pip install gpt4fast[hf]"
        ) from None
    return gguf
