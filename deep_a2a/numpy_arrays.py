"""Arrays of CuPy, and of NumPy for backends in host memory: one interface, but for where memory and streams come from.

Neither has bfloat16 or FP8 of its own. Arrays with the dtypes of ml_dtypes are taken as what they are. Otherwise uint16
stands for bfloat16 and uint8 for FP8 (E4M3 where it comes in), and results come in the same way.
"""

from __future__ import annotations

import functools
import importlib
import itertools
from collections.abc import Sequence
from typing import Any

from deep_a2a.arrays import Array, Device, StreamRef

STAND_INS = {"bfloat16": "uint16", "float8_e4m3fn": "uint8", "float8_e5m2": "uint8"}
"""What stands for a dtype that the library does not have."""


class NumpyLibrary:
    """See ``arrays.Library``. `foreign`: dtypes that the library lacks are those of ml_dtypes, not their stand-ins."""

    def __init__(self, name: str, foreign: bool) -> None:
        self.name = name
        self._foreign = foreign
        self._module: Any = importlib.import_module(name)

    @staticmethod
    @functools.cache
    def shared(name: str, foreign: bool = False) -> NumpyLibrary:
        return NumpyLibrary(name, foreign)

    def describe(self, value: Any) -> Array:
        dtype = value.dtype.name
        library = NumpyLibrary.shared(self.name, foreign=True) if dtype in STAND_INS else self
        device = Device("cuda", value.device.id) if self.name == "cupy" else Device("cpu")
        return Array(
            value, library, self.pointer(value), value.shape, value.strides, dtype, value.dtype.itemsize, device
        )

    def empty(self, shape: tuple[int, ...], dtype: str, device: Device) -> Any:
        if self.name == "numpy":
            return self._module.empty(shape, self._dtype(dtype))
        with self._module.cuda.Device(device.index):
            return self._module.empty(shape, self._dtype(dtype))

    def from_buffer(self, buffer: Any, dtype: str) -> Any:
        if memoryview(buffer).nbytes == 0:
            return self._module.empty(0, self._dtype(dtype))
        return self._module.frombuffer(buffer, self._dtype(dtype))

    def from_device(self, address: int, nbytes: int, owner: object, device: Device) -> Any:
        cuda = self._module.cuda
        memory = cuda.UnownedMemory(address, nbytes, owner, device.index)
        return self._module.ndarray((nbytes,), "uint8", cuda.MemoryPointer(memory, 0))

    def rows(self, memory: Any, start: int, shape: tuple[int, int], pitch: int, dtype: str) -> Any:
        kind = self._dtype(dtype)
        strides = (pitch, kind.itemsize)
        if self.name == "cupy":
            return self._module.ndarray(shape, kind, memory.data + start, strides)
        return self._module.ndarray(shape, kind, memory, start, strides)

    def first(self, rows: Any, num_rows: int) -> Any:
        return rows[:num_rows]

    def pointer(self, value: Any) -> int:
        pointer: int = value.data.ptr if self.name == "cupy" else value.__array_interface__["data"][0]
        return pointer

    def parts(self, block: Any, sizes: list[int]) -> Sequence[Any]:
        ends = list(itertools.accumulate(sizes))
        return [block[end - size : end] for size, end in zip(sizes, ends, strict=True)]

    def table(self, words: Any, num_rows: int, columns: int, dtype: str) -> Any:
        return words.view(dtype).reshape(num_rows, columns)

    def spread(self, values: Any, rows: Any, num_rows: int) -> Any:
        flat = self._module.zeros(num_rows + 1, "float32")
        where = rows.ravel()
        flat[self._module.where(where < 0, num_rows, where)] = values.ravel()
        return flat[:num_rows]

    def split(self, rows: Any, num_groups: int) -> Any:
        # Not reshape, which copies rows that lie apart.
        size = rows.shape[0] // num_groups
        strides = (rows.strides[0] * size, *rows.strides)
        return self._module.lib.stride_tricks.as_strided(rows, (num_groups, size, rows.shape[1]), strides)

    def dtype_name(self, dtype: Any) -> str | None:
        try:
            return str(self._module.dtype(dtype).name)
        except TypeError:
            return None

    def current_stream(self, device: Device) -> StreamRef:
        with self._module.cuda.Device(device.index):
            stream = self._module.cuda.get_current_stream()
        return StreamRef(stream.ptr, stream)

    def _dtype(self, name: str) -> Any:
        if name not in STAND_INS:
            return self._module.dtype(name)
        if self._foreign:
            return self._module.dtype(getattr(importlib.import_module("ml_dtypes"), name))
        return self._module.dtype(STAND_INS[name])
