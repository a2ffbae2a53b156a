"""Tensors of torch."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import torch

from deep_a2a.arrays import Array, Device, StreamRef


class TorchLibrary:
    """See ``arrays.Library``. Views of the window outlast an inference mode that they happen to be made in."""

    name = "torch"

    def describe(self, value: Any) -> Array:
        name, item_bytes = _description(value.dtype)
        strides = tuple([stride * item_bytes for stride in value.stride()])
        device = _device(value.device)
        return Array(value, self, value.data_ptr(), tuple(value.shape), strides, name, item_bytes, device)

    def empty(self, shape: tuple[int, ...], dtype: str, device: Device) -> torch.Tensor:
        return torch.empty(shape, dtype=_dtype(dtype), device=_torch_device(device))

    @torch.inference_mode(False)
    def from_buffer(self, buffer: Any, dtype: str) -> torch.Tensor:
        if memoryview(buffer).nbytes == 0:
            return torch.empty(0, dtype=_dtype(dtype))
        return torch.frombuffer(buffer, dtype=_dtype(dtype))

    @torch.inference_mode(False)
    def from_device(self, address: int, nbytes: int, owner: object, device: Device) -> torch.Tensor:
        return torch.as_tensor(_DeviceMemory(address, nbytes, owner), device=str(device))

    @torch.inference_mode(False)
    def rows(self, memory: Any, start: int, shape: tuple[int, int], pitch: int, dtype: str) -> torch.Tensor:
        num_rows, columns = shape
        kind = _dtype(dtype)
        row_bytes = columns * kind.itemsize
        rows: torch.Tensor = memory[start : start + num_rows * pitch].view(num_rows, pitch)[:, :row_bytes].view(kind)
        # Without .data autograd would take what is written anywhere in the window for a change of these rows.
        return rows.data

    def first(self, rows: Any, num_rows: int) -> torch.Tensor:
        # Detached: what the caller writes into it, gradients and all, must not become the history of all later views.
        first: torch.Tensor = rows[:num_rows].detach()
        return first

    def pointer(self, value: Any) -> int:
        pointer: int = value.data_ptr()
        return pointer

    def parts(self, block: Any, sizes: list[int]) -> Sequence[torch.Tensor]:
        parts: tuple[torch.Tensor, ...] = block.split_with_sizes(sizes)
        return parts

    def table(self, words: Any, num_rows: int, columns: int, dtype: str) -> torch.Tensor:
        table: torch.Tensor = words.view(num_rows, columns)
        return table if dtype == "int32" else table.view(_dtype(dtype))

    def spread(self, values: Any, rows: Any, num_rows: int) -> torch.Tensor:
        flat = torch.zeros(num_rows + 1, dtype=torch.float32, device=values.device)
        where = rows.flatten().long()
        flat[torch.where(where < 0, num_rows, where)] = values.flatten()
        return flat[:num_rows]

    def split(self, rows: Any, num_groups: int) -> torch.Tensor:
        split: torch.Tensor = rows.view(num_groups, rows.shape[0] // num_groups, rows.shape[1])
        return split

    def dtype_name(self, dtype: Any) -> str | None:
        return _description(dtype)[0] if isinstance(dtype, torch.dtype) else None

    def current_stream(self, device: Device) -> StreamRef:
        # Not torch.cuda.current_stream(), which makes an object and takes ten times as long. torch's streams are never
        # destroyed.
        return StreamRef(torch._C._cuda_getCurrentRawStream(device.index))


class _DeviceMemory:
    """Memory on a GPU as torch understands it; a tensor of it keeps this object."""

    def __init__(self, address: int, nbytes: int, owner: object) -> None:
        self._owner = owner
        self.__cuda_array_interface__ = {
            "data": (address, False),
            "shape": (nbytes,),
            "strides": None,
            "typestr": "|u1",
            "version": 3,
            "stream": None,  # nothing to wait for: the memory is handed over by stream order
        }


@functools.cache
def _description(dtype: torch.dtype) -> tuple[str, int]:
    return str(dtype).removeprefix("torch."), dtype.itemsize


@functools.cache
def _dtype(name: str) -> torch.dtype:
    dtype = getattr(torch, name)
    assert isinstance(dtype, torch.dtype)
    return dtype


@functools.cache
def _torch_device(device: Device) -> torch.device:
    return torch.device(str(device))


@functools.cache
def _device(device: torch.device) -> Device:
    # Tensors on other kinds of devices fit no backend: they are named as what they are and refused.
    return Device(device.type, device.index or 0)  # type: ignore[arg-type]
