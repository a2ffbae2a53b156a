"""A dispatch of the CUDA backend: its blocks of device memory, and the launches of its halves."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from deep_a2a._cpu import SCALE_ALIGNMENT
from deep_a2a.backend import DispatchRequest, Halves, Received
from deep_a2a.column_scales import ColumnScales, pointer_and_pitch
from deep_a2a.received import ReceivedArrays
from deep_a2a.slot_use import CudaSlotUse
from deep_a2a.streams import CudaEvent

if TYPE_CHECKING:
    from deep_a2a import _cuda
    from deep_a2a.cuda_backend import CudaBackend


@dataclass
class CudaHandle:
    """What a dispatch handle keeps on the GPU: the way of the tokens of this rank, and the rows that it received.

    `source` and `relay` are addresses in the first block of `kept`.
    """

    source: int
    relay: int
    kept: ReceivedArrays
    received: CudaEvent | None = None  # None before the receive half is launched


class CudaDispatch:
    """See ``backend.DispatchCall``.

    Memory is taken on the caller's stream before the lane's stream waits for that: whoever used the memory before has
    been waited for then.
    """

    def __init__(self, backend: CudaBackend, request: DispatchRequest, slot: int) -> None:
        self._backend, self._request, self._slot = backend, request, slot
        self._library = library = request.payload.library
        self._lane = backend.lanes[request.lane]
        self._reader, capturing = backend.begin(library)  # the stream of the result's reader
        self._sizes = self._known_sizes()
        if capturing and self._sizes is None:
            raise ValueError("host_sync must be False while a CUDA graph is captured, got True: a graph has no host")
        self._result, _ = ReceivedArrays.take(backend, library, None)
        if request.handle is None:
            capacity = self._kept_capacity()
            source_words = backend.rank.source_bytes(request.payload.num_tokens) // 4
            kept, (source, relay) = ReceivedArrays.take(backend, library, capacity, source_words, backend.relay_words)
            self.handle = CudaHandle(source, relay, kept)
        else:
            self.handle = request.handle.call
        self._x: Any = None
        self._scales: Any = None
        self._columns: ColumnScales | None = None
        if self._sizes is not None:
            self._make_room()
        self._stream = self._lane.enter(self._reader, capturing)
        if request.handle is not None and self.handle.received is not None:
            self.handle.received.block_within(self._stream, capturing)
        backend.follow(request.previous, self._stream)
        backend.follow_release(slot, self._stream, capturing)
        self._launched = backend.half.both if self._ends_at_once() else backend.half.send
        self._ticket = self._launch(self._launched)
        self.sent = self._event = backend.leave(self._lane, self._stream, self._library, capturing)
        self.slot_use = CudaSlotUse(backend, library, slot, self._lane, self._reader, self._stream, self._event)

    def wait_counts(self) -> None:
        if self._sizes is None:
            rank, lane = self._backend.rank, self._request.lane
            self._sizes = rank.wait_counts(lane=lane, ticket=self._ticket, stream=self._stream)

    def receive(self) -> Received:
        backend = self._backend
        capturing = self._event.captured
        if self._launched is backend.half.send:
            self._reader, capturing = backend.begin(self._library)
            if self._result.capacity is None:
                self._make_room()
                self._stream = self._lane.enter(self._reader, capturing)
            else:
                self._stream = self._lane.current(self._reader, capturing)
            self._launch_receive()
        if self._request.owned:
            self._copy_out()
            self.slot_use.move_to(self._reader, self._stream, self._event)
            self.slot_use.end_on_lane()
        if self._request.owned or self._launched is backend.half.receive:
            self._event = backend.leave(self._lane, self._stream, self._library, capturing)
        if self._request.handle is None:
            self.handle.received = self._event
        self.slot_use.move_to(self._reader, self._stream, self._event)
        return self._received()

    def abandon(self) -> CudaEvent | None:
        # A refused dispatch has no second half, but the refusal that was raised may be that of an earlier one.
        if self._launched is not self._backend.half.send or self._backend.is_poisoned():
            return None
        with contextlib.suppress(RuntimeError):  # the failure that led here is the one to raise
            self._columns = None
            self._result.drop_routing()  # there may be room for some of it only
            if self._request.handle is None:
                self.handle.kept.drop_routing()
            capturing = self._event.captured
            self._stream = self._lane.current(self._reader, capturing)
            self._launch_receive()
            self._event = self._backend.leave(self._lane, self._stream, self._library, capturing)
            self.slot_use.move_to(self._reader, self._stream, self._event)
            return self._event
        return None

    def _ends_at_once(self) -> bool:
        return self._sizes is not None and self._request.halves is Halves.together

    def _known_sizes(self) -> tuple[int, int] | None:
        """Rows and rank rows to make room for, where the host need not wait for them."""
        handle, shape = self._request.handle, self._backend.shape
        if self._request.fixed_shapes:
            return shape.slot_rows, shape.slot_rank_rows
        return None if handle is None else (handle.num_rows or 0, handle.num_rank_rows or 0)

    def _kept_capacity(self) -> int | None:
        """Rank rows whose routing the handle keeps, if that is known: none in layout rank, where it comes each time."""
        if not self._backend.received_layout.per_expert:
            return 0
        return None if self._sizes is None else self._sizes[1]

    def _make_room(self) -> None:
        """For what takes as much memory as there are rows."""
        assert self._sizes is not None
        num_rows, num_rank_rows = self._sizes
        backend, payload, library = self._backend, self._request.payload, self._library
        self._result.add_routing(backend, library, num_rank_rows)
        if self.handle.kept.capacity is None:
            self.handle.kept.add_routing(backend, library, num_rank_rows)
        if self._request.owned:
            hidden, columns = backend.settings.hidden, payload.scale_columns
            self._x = library.empty((num_rows, hidden), payload.dtype, backend.device)
            if self._request.row_scale_dtype is not None:
                self._scales = library.empty((num_rows, columns), self._request.row_scale_dtype, backend.device)
        self._columns = ColumnScales.for_request(backend, self._request, num_rows)

    def _launch(self, half: _cuda.Half) -> int:
        request, payload = self._request, self._request.payload
        rows, scales, idx = payload.rows, payload.scales, request.topk_idx
        kept, result = self.handle.kept, self._result
        column_scales, column_words = pointer_and_pitch(self._columns)
        return self._backend.rank.dispatch(
            stream=self._stream,
            lane=request.lane,
            slot=self._slot,
            half=half,
            num_sms=self._backend.num_sms,
            x=rows.pointer,
            x_pitch=rows.strides[0],
            num_tokens=payload.num_tokens,
            payload_bytes=payload.payload_bytes,
            scales=0 if scales is None else scales.pointer,
            scales_pitch=0 if scales is None else scales.strides[0],
            scale_bytes=payload.scale_bytes,
            format_code=payload.format_code,
            topk_idx=0 if idx is None else idx.pointer,
            topk_idx_bytes=0 if idx is None else idx.item_bytes,
            topk_weights=0 if request.topk_weights is None else request.topk_weights.pointer,
            cast=payload.cast,
            scale_format=payload.scale_format,
            zero_padding=request.zero_padding,
            cached=request.handle is not None,
            source=self.handle.source,
            relay=self.handle.relay,
            kept_counts=kept.counts,
            kept_routing=kept.routing,
            kept_capacity=kept.capacity or 0,
            result_counts=result.counts,
            result_routing=result.routing,
            result_capacity=result.capacity or 0,
            column_scales=column_scales,
            column_words=column_words,
        )

    def _launch_receive(self) -> None:
        self._launched = self._backend.half.receive
        self._launch(self._launched)

    def _copy_out(self) -> None:
        assert self._sizes is not None
        payload, library = self._request.payload, self._library
        self._backend.rank.copy_out(
            stream=self._stream,
            slot=self._slot,
            num_rows=self._sizes[0],
            payload_bytes=payload.payload_bytes,
            scale_bytes=payload.scale_bytes,
            rows=library.pointer(self._x),
            scales=0 if self._scales is None else library.pointer(self._scales),
        )

    def _received(self) -> Received:
        assert self._sizes is not None
        backend, request, payload, library = self._backend, self._request, self._request.payload, self._library
        num_rows, num_rank_rows = self._sizes
        x, scales = self._x, self._scales
        if not request.owned:
            hidden, columns = backend.settings.hidden, payload.scale_columns
            x = backend.view(library, "recv_rows", self._slot, num_rows, hidden, payload.dtype)
            if request.row_scale_dtype is not None:
                scales = backend.view(
                    library, "recv_scales", self._slot, num_rows, columns, request.row_scale_dtype, SCALE_ALIGNMENT
                )
        if self._columns is not None:
            scales = self._columns.value
        known = (None, None) if request.fixed_shapes else (num_rows, num_rank_rows)
        return self._result.as_received(backend.received_layout, library, x, scales, known, self._event)
