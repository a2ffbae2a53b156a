"""The CPU backend in Python: tensors in, pointers to the native rank, views of the window out."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from deep_a2a import _cpu
from deep_a2a.payload import Payload
from deep_a2a.settings import Settings


@dataclass(frozen=True)
class Received:
    """Where the rows of a dispatch are found: ``x`` as [rows, hidden], and their scales."""

    x: torch.Tensor
    scales: torch.Tensor | None


class CpuBackend:
    """One rank: its window and its native engine. Takes checked arguments only.

    Tensors whose addresses are handed to the engine have to live until the event of the half that uses them.
    """

    def __init__(
        self, settings: Settings, rank: int, windows: list[_cpu.Window], timeout_s: float, network_seed: int | None
    ) -> None:
        self.shape = settings.shape()
        self.hidden = settings.hidden
        self.num_topk = settings.num_topk
        self.engine = _cpu.Rank(
            shape=self.shape, rank=rank, windows=windows, timeout_s=timeout_s, network_seed=network_seed
        )
        self._bytes = torch.frombuffer(windows[rank], dtype=torch.uint8)
        self._regions = {row[0]: row for row in _cpu.regions(self.shape)}

    def view(
        self, region: str, instance: int, rows: int, columns: int, dtype: torch.dtype, align: int = 1
    ) -> torch.Tensor:
        """[rows, columns] of `dtype` in the own window, rows in multiples of `align` bytes. Keeps the window mapped."""
        _, _, _, offset, stride, _ = self._regions[region]
        row_bytes = columns * dtype.itemsize
        pitch = -(-row_bytes // align) * align
        start = offset + instance * stride
        return self._bytes[start : start + rows * pitch].view(rows, pitch)[:, :row_bytes].view(dtype)

    def close(self) -> None:
        """Stop the lanes once they have run what was launched. Windows stay mapped while anything refers to them."""
        self.engine.close()

    def dispatch(
        self,
        payload: Payload,
        topk_idx: torch.Tensor | None,
        topk_weights: torch.Tensor | None,
        *,
        lane: int,
        slot: int,
        zero_padding: bool,
        fixed_shapes: bool,
        cached: _cpu.Handle | None,
    ) -> _cpu.DispatchCall:
        """Launch the send half."""
        rows, scales = payload.rows, payload.scales
        return self.engine.dispatch(
            lane=lane,
            slot=slot,
            x=rows.data_ptr(),
            x_pitch=rows.stride(0) * rows.element_size(),
            num_tokens=payload.num_tokens,
            payload_bytes=payload.payload_bytes,
            scales=address(scales),
            scales_pitch=0 if scales is None else scales.stride(0) * scales.element_size(),
            scale_bytes=payload.scale_bytes,
            format_code=format_code(payload),
            topk_idx=address(topk_idx),
            topk_idx_bytes=0 if topk_idx is None else topk_idx.element_size(),
            topk_weights=address(topk_weights),
            cast=payload.cast,
            scale_format=payload.scale_format,
            zero_padding=zero_padding,
            fixed_shapes=fixed_shapes,
            cached=cached,
        )

    def receive_dispatch(
        self, call: _cpu.DispatchCall, payload: Payload, slot: int, num_rows: int, owned: bool
    ) -> Received:
        """Launch the receive half; the rows may be read after ``call.received``."""
        groups = 0 if payload.scale_dtype is None else payload.scale_bytes // payload.scale_dtype.itemsize
        scales = None
        if owned:
            x = torch.empty(num_rows, self.hidden, dtype=payload.dtype)
            if payload.scale_dtype is not None:
                scales = torch.empty(num_rows, groups, dtype=payload.scale_dtype)
            self.engine.receive_dispatch(call, owned_rows=x.data_ptr(), owned_scales=address(scales))
        else:
            x = self.view("recv_rows", slot, num_rows, self.hidden, payload.dtype)
            if payload.scale_dtype is not None:
                scales = self.view("recv_scales", slot, num_rows, groups, payload.scale_dtype, align=16)
            self.engine.receive_dispatch(call, owned_rows=0, owned_scales=0)
        return Received(x, scales)

    def combine(
        self,
        rows: torch.Tensor,
        side: torch.Tensor | None,
        out: torch.Tensor,
        side_out: torch.Tensor | None,
        *,
        lane: int,
        weighted: bool,
        handle: _cpu.Handle,
    ) -> _cpu.CombineCall:
        """Launch the send half."""
        return self.engine.combine(
            lane=lane,
            rows=rows.data_ptr(),
            side=address(side),
            weighted=weighted,
            with_side=side is not None,
            out=out.data_ptr(),
            side_out=address(side_out),
            handle=handle,
        )


def format_code(payload: Payload) -> int:
    """A number that ranks compare: equal for equal dtypes of rows and scales."""
    rows = (torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2).index(payload.dtype)
    scales = (None, torch.float32, torch.uint8).index(payload.scale_dtype)
    return rows * 4 + scales


def address(tensor: torch.Tensor | None) -> int:
    """What native code calls null is 0 here."""
    return 0 if tensor is None else tensor.data_ptr()


def column(values: Any, dtype: torch.dtype, *columns: int) -> torch.Tensor:
    """A native vector as a tensor [-1, *columns] that keeps it alive."""
    if memoryview(values).nbytes == 0:
        return torch.empty(0, *columns, dtype=dtype)
    return torch.frombuffer(values, dtype=dtype).view(-1, *columns)
