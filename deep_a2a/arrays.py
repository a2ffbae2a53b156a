"""Arrays of any library: what native code needs to know of one, and what a backend needs of a library.

No array library is imported here: an array brings its own.
"""

from __future__ import annotations

import functools
import importlib
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

_DLPACK_CPU = 1  # as DLPack numbers devices


@dataclass(frozen=True)
class Device:
    """Where an array lies."""

    kind: Literal["cpu", "cuda"]
    index: int = 0

    def __str__(self) -> str:
        return "cpu" if self.kind == "cpu" else f"cuda:{self.index}"


@dataclass(slots=True, eq=False)
class StreamRef:
    """A caller's stream. `owner` keeps it from being destroyed."""

    handle: int
    owner: object = None


@dataclass(slots=True, eq=False)  # not frozen, which would take longer to make than all the rest of a description
class Array:
    """An array of some library, as native code takes it. Holds the array: its memory lives as long as this does."""

    value: Any
    library: Library
    pointer: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]  # in bytes
    dtype: str
    item_bytes: int
    device: Device

    @property
    def is_contiguous(self) -> bool:
        expected = self.item_bytes
        for size, stride in zip(reversed(self.shape), reversed(self.strides), strict=True):
            if size > 1 and stride != expected:
                return 0 in self.shape
            expected *= size
        return True

    @property
    def item_strides(self) -> tuple[int, ...]:
        return tuple(stride // self.item_bytes for stride in self.strides)


class Library(Protocol):
    """What dispatch and combine need of an array library. Dtypes go by their names in torch and ml_dtypes."""

    name: str

    def describe(self, value: Any) -> Array:
        """`value` is one of this library's arrays."""

    def empty(self, shape: tuple[int, ...], dtype: str, device: Device) -> Any:
        """On a GPU from the memory that belongs to the current stream."""

    def from_buffer(self, buffer: Any, dtype: str) -> Any:
        """A view [items] of host memory that keeps `buffer`."""

    def from_device(self, address: int, nbytes: int, owner: object, device: Device) -> Any:
        """A view of device memory as uint8 [nbytes] that keeps `owner`."""

    def rows(self, memory: Any, start: int, shape: tuple[int, int], pitch: int, dtype: str) -> Any:
        """A view of uint8 `memory` from byte `start` on, rows `pitch` bytes apart."""

    def first(self, rows: Any, num_rows: int) -> Any:
        """A view of the first of them, whose past and future (in autograd) are its own."""

    def pointer(self, value: Any) -> int:
        """The address of one of this library's arrays."""

    def parts(self, block: Any, sizes: list[int]) -> Sequence[Any]:
        """Views of a one-dimensional `block`, one after the other; `sizes` add up to its own."""

    def table(self, words: Any, num_rows: int, columns: int, dtype: str) -> Any:
        """A view of int32 as [num_rows, columns] of int32 or float32."""

    def spread(self, values: Any, rows: Any, num_rows: int) -> Any:
        """float32 [num_rows]: each of `values` in its row, 0 elsewhere; rows of -1 are nowhere."""

    def split(self, rows: Any, num_groups: int) -> Any:
        """A view of [rows, columns] as [num_groups, rows / num_groups, columns]."""

    def dtype_name(self, dtype: Any) -> str | None:
        """The name of a dtype of this library; None for what is none."""

    def current_stream(self, device: Device) -> StreamRef: ...


@functools.cache
def library_named(name: str) -> Library:
    """The library "torch", "cupy" or "numpy", imported if it has to be."""
    if name == "torch":
        from deep_a2a.torch_arrays import TorchLibrary

        return TorchLibrary()
    from deep_a2a.numpy_arrays import NumpyLibrary

    return NumpyLibrary.shared(name)


def library_of(value: Any) -> Library | None:
    """Of an array; None for anything else. Looks at nothing but the type, and imports nothing but for an array."""
    torch = sys.modules.get("torch")
    if torch is not None and isinstance(value, torch.Tensor):
        return library_named("torch")
    root = type(value).__module__.partition(".")[0]
    if root in ("numpy", "cupy") and type(value).__name__ == "ndarray":
        return library_named(root)
    return None


def as_array(value: Any) -> Array | None:
    """`value` described; None if it is no array. What only speaks a protocol is first taken by torch or CuPy."""
    library = library_of(value)
    if library is None:
        value = _from_protocol(value)
        library = library_of(value)
    return None if library is None else library.describe(value)


def default_library(device: Device) -> Library:
    """For lent memory where nothing says which: torch where it is loaded, else what fits the device."""
    if "torch" in sys.modules:
        return library_named("torch")
    return library_named("numpy" if device.kind == "cpu" else "cupy")


def _from_protocol(value: Any) -> Any:
    """Shares memory with `value`; None where it speaks no protocol, or there is no library to take it."""
    if isinstance(value, type):
        return None
    torch = sys.modules.get("torch")
    on_gpu = hasattr(value, "__cuda_array_interface__")
    if not on_gpu and hasattr(value, "__dlpack_device__"):
        on_gpu = value.__dlpack_device__()[0] != _DLPACK_CPU
    elif not on_gpu:
        return None
    if torch is not None and (not on_gpu or torch.cuda.is_available()):
        # Without a device, which would make it a copy where the two differ.
        return torch.as_tensor(value) if hasattr(value, "__cuda_array_interface__") else torch.from_dlpack(value)
    try:
        library = importlib.import_module("cupy" if on_gpu else "numpy")
    except ImportError:
        return None
    return library.asarray(value) if hasattr(value, "__cuda_array_interface__") else library.from_dlpack(value)
