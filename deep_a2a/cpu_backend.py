"""The CPU backend in Python: arrays in, pointers to the native rank, views of the window out."""

from __future__ import annotations

from typing import Any

from deep_a2a import _cpu
from deep_a2a.arrays import Array, Device, Library
from deep_a2a.backend import CombineRequest, DispatchRequest, Received
from deep_a2a.column_scales import ColumnScales, pointer_and_pitch
from deep_a2a.leases import Release
from deep_a2a.results import DispatchHandle, Event
from deep_a2a.settings import Settings
from deep_a2a.windows import WindowViews


class CpuEvent:
    """A point on a lane, as the caller waits for it: here the host is all there is."""

    captured = False

    def __init__(self, native: _cpu.Event) -> None:
        self._native = native

    def wait(self) -> None:
        self._native.wait()

    def synchronize(self) -> None:
        self._native.wait()

    def done(self) -> bool:
        return self._native.done()


class CpuBackend:
    """See ``backend.Backend``. Arrays whose addresses are handed to the engine live until the event of their half."""

    def __init__(
        self, settings: Settings, rank: int, windows: list[_cpu.Window], timeout_s: float, network_seed: int | None
    ) -> None:
        self.shape = settings.shape()
        self.settings = settings
        self.device = Device("cpu")
        self.engine = _cpu.Rank(
            shape=self.shape, rank=rank, windows=windows, timeout_s=timeout_s, network_seed=network_seed
        )
        self._views = WindowViews(self.shape, lambda library: library.from_buffer(windows[rank], "uint8"))

    @property
    def wire_bytes(self) -> dict[str, int]:
        return {"shm": self.engine.shm_bytes, "network": self.engine.network_bytes}

    def dispatch(self, request: DispatchRequest, slot: int) -> CpuDispatch:
        self._wait_before(request.handle, request.lane, request.previous)
        return CpuDispatch(self, request, slot)

    def combine(self, request: CombineRequest) -> CpuCombine:
        self._wait_before(request.handle, request.lane, request.previous)
        return CpuCombine(self, request)

    def view(
        self, library: Library, region: str, instance: int, rows: int, columns: int, dtype: str, align: int = 1
    ) -> Any:
        return self._views.rows(library, region, instance, (rows, columns), dtype, align)

    def may_poll(self) -> bool:
        return True

    def check(self) -> None:
        self.engine.check()

    def close(self, in_flight: object) -> None:
        self.engine.close()

    @staticmethod
    def _wait_before(handle: DispatchHandle | None, lane: int, previous: Event | None) -> None:
        """Operations of one lane are ordered among themselves; on another the handle has to be complete first."""
        if handle is not None and handle.lane != lane and handle.call.received is not None:
            handle.call.received.wait()
        if previous is not None:
            previous.synchronize()


class CpuDispatch:
    """See ``backend.DispatchCall``."""

    def __init__(self, backend: CpuBackend, request: DispatchRequest, slot: int) -> None:
        payload = request.payload
        rows, scales, idx = payload.rows, payload.scales, request.topk_idx
        self._backend, self._request, self._slot = backend, request, slot
        self._call = backend.engine.dispatch(
            lane=request.lane,
            slot=slot,
            x=rows.pointer,
            x_pitch=rows.strides[0],
            num_tokens=payload.num_tokens,
            payload_bytes=payload.payload_bytes,
            scales=address(scales),
            scales_pitch=0 if scales is None else scales.strides[0],
            scale_bytes=payload.scale_bytes,
            format_code=payload.format_code,
            topk_idx=address(idx),
            topk_idx_bytes=0 if idx is None else idx.item_bytes,
            topk_weights=address(request.topk_weights),
            cast=payload.cast,
            scale_format=payload.scale_format,
            zero_padding=request.zero_padding,
            fixed_shapes=request.fixed_shapes,
            cached=None if request.handle is None else request.handle.call.handle,
        )
        self.handle = self._call
        self.slot_use = CpuSlotUse(backend.engine, self._call)
        self.sent = CpuEvent(self._call.sent)

    def wait_counts(self) -> None:
        self._call.counts.wait()

    def receive(self) -> Received:
        native, backend, payload = self._call.result, self._backend, self._request.payload
        library, num_topk = payload.library, backend.settings.num_topk
        num_rows = backend.shape.slot_rows if self._request.fixed_shapes else native.num_rows
        x, scales = self._rows(num_rows)
        per_expert = backend.settings.layout != "rank"

        def column(values: Any, dtype: str = "int32") -> Any:
            return library.from_buffer(values, dtype)

        def routing(values: Any, dtype: str = "int32") -> Any:
            flat = column(values, dtype)
            return flat.reshape(flat.shape[0] // num_topk, num_topk)

        assert self._call.received is not None
        return Received(
            x=x,
            scales=scales,
            topk_idx=routing(native.topk_idx),
            topk_weights=routing(native.topk_weights, "float32"),
            expert_rows=routing(native.expert_rows) if per_expert else None,
            rows_per_expert=column(native.rows_per_expert),
            expert_offsets=column(native.expert_offsets) if per_expert else None,
            rows_per_rank=column(native.rows_per_rank),
            expert_load=column(native.expert_load),
            num_rows_tensor=column(native.num_received),
            num_rows=native.num_rows,
            num_rank_rows=native.num_rank_rows,
            event=CpuEvent(self._call.received),
        )

    def abandon(self) -> CpuEvent | None:
        if self._call.received is not None:
            return None
        self._launch_receive()
        received: _cpu.Event | None = self._call.received
        return None if received is None else CpuEvent(received)

    def _rows(self, num_rows: int) -> tuple[Any, Any]:
        """Launches the receive half; the rows may be read after its event."""
        backend, request, payload = self._backend, self._request, self._request.payload
        library, hidden, scale_dtype = payload.library, backend.settings.hidden, request.row_scale_dtype
        columns = ColumnScales.for_request(backend, request, num_rows)
        scales = None if columns is None else columns.value
        if request.owned:
            x = library.empty((num_rows, hidden), payload.dtype, backend.device)
            if scale_dtype is not None:
                scales = library.empty((num_rows, payload.scale_columns), scale_dtype, backend.device)
            owned_scales = 0 if scale_dtype is None else library.pointer(scales)
            self._launch_receive(library.pointer(x), owned_scales, columns)
            return x, scales
        x = backend.view(library, "recv_rows", self._slot, num_rows, hidden, payload.dtype)
        if scale_dtype is not None:
            scales = backend.view(
                library, "recv_scales", self._slot, num_rows, payload.scale_columns, scale_dtype, _cpu.SCALE_ALIGNMENT
            )
        self._launch_receive(columns=columns)
        return x, scales

    def _launch_receive(self, owned_rows: int = 0, owned_scales: int = 0, columns: ColumnScales | None = None) -> None:
        column_scales, column_words = pointer_and_pitch(columns)
        self._backend.engine.receive_dispatch(
            self._call,
            owned_rows=owned_rows,
            owned_scales=owned_scales,
            column_scales=column_scales,
            column_words=column_words,
        )


class CpuSlotUse:
    """See ``backend.SlotUse``."""

    def __init__(self, engine: _cpu.Rank, call: _cpu.DispatchCall) -> None:
        self._engine, self._call = engine, call

    def end(self, release: Release) -> bool:
        self._engine.release(self._call)  # once the lane has come to this point, whoever asks
        return True


class CpuCombine:
    """See ``backend.CombineCall``."""

    def __init__(self, backend: CpuBackend, request: CombineRequest) -> None:
        library, settings, num_tokens = request.rows.library, backend.settings, request.handle.num_tokens
        self._backend = backend
        self.x = library.empty((num_tokens, settings.hidden), "bfloat16", backend.device)
        self.side = None
        if request.side is not None:
            self.side = library.empty((num_tokens, settings.num_topk), "float32", backend.device)
        self._call = backend.engine.combine(
            lane=request.lane,
            rows=request.rows.pointer,
            side=address(request.side),
            weighted=request.weighted,
            with_side=request.side is not None,
            out=library.pointer(self.x),
            side_out=0 if self.side is None else library.pointer(self.side),
            handle=request.handle.call.handle,
        )
        self.sent = CpuEvent(self._call.sent)

    def receive(self) -> CpuEvent:
        self._backend.engine.receive_combine(self._call)
        assert self._call.received is not None
        return CpuEvent(self._call.received)


def address(array: Array | None) -> int:
    """What native code calls null is 0 here."""
    return 0 if array is None else array.pointer
