"""Launching operations: which slot, which lane, and what has to stay alive meanwhile."""

from __future__ import annotations

import threading
import weakref

import torch

from deep_a2a._cpu import CombineCall, DispatchCall
from deep_a2a.cpu_backend import CpuBackend, column
from deep_a2a.errors import LeaseError
from deep_a2a.payload import Payload
from deep_a2a.pending import Pending, PendingCombine, PendingDispatch
from deep_a2a.results import CombineResult, DispatchHandle, DispatchResult, Event, Lease
from deep_a2a.settings import Settings


class Operations:
    """What one Buffer has under way. Arguments are checked by then."""

    def __init__(self, settings: Settings, backend: CpuBackend) -> None:
        self.backend = backend
        self._closed = False
        self._settings = settings
        self._lock = threading.RLock()  # reentrant: the collector may drop a result while a call holds it
        self._leased: set[int] = set()
        self._half_open: dict[int, str] = {}  # by lane: the operation that waits for its recv()
        self._in_flight: list[tuple[Event, tuple[object, ...]]] = []  # what native code still points to

    def dispatch(
        self,
        payload: Payload,
        topk_idx: torch.Tensor | None,
        topk_weights: torch.Tensor | None,
        handle: DispatchHandle | None,
        *,
        lane: int,
        host_sync: bool,
        owned: bool,
        zero_padding: bool,
        async_op: bool,
    ) -> PendingDispatch:
        """Launch the send half of a dispatch, cached where there is a `handle`."""
        if handle is not None:
            _wait_on_other_lane(handle, lane)
        fixed_shapes = handle.fixed_shapes if handle is not None else not host_sync
        with self._lock:
            self._check_lane(lane)
            lease = self._take_slot()
            try:
                call = self.backend.dispatch(
                    payload,
                    topk_idx,
                    topk_weights,
                    lane=lane,
                    slot=lease.slot,
                    zero_padding=zero_padding,
                    fixed_shapes=fixed_shapes,
                    cached=None if handle is None else handle.call.handle,
                )
            except BaseException:
                lease.release()
                raise
            lease.bind(call)
            self._half_open[lane] = "dispatch"
            self._keep(call.sent, payload, topk_idx, topk_weights)

        def receive() -> DispatchResult:
            try:
                call.counts.wait()
                result = self._receive_dispatch(call, payload, lease, handle, lane, fixed_shapes, owned, async_op)
                if not async_op:
                    self._received(call).wait()
            except BaseException:
                if call.received is None:  # peers count on this half, whatever became of the result
                    self.backend.engine.receive_dispatch(call, owned_rows=0, owned_scales=0)
                lease.release()
                raise
            finally:
                self._end(lane)
            return result

        return Pending(receive, call.sent.done)

    def combine(
        self,
        rows: torch.Tensor,
        side: torch.Tensor | None,
        handle: DispatchHandle,
        *,
        lane: int,
        weighted: bool,
        async_op: bool,
    ) -> PendingCombine:
        """Launch the send half of a combine."""
        _wait_on_other_lane(handle, lane)
        out = torch.empty(handle.num_tokens, self._settings.hidden, dtype=torch.bfloat16)
        side_out = None if side is None else torch.empty(handle.num_tokens, self._settings.num_topk)
        with self._lock:
            self._check_lane(lane)
            call = self.backend.combine(
                rows, side, out, side_out, lane=lane, weighted=weighted, handle=handle.call.handle
            )
            self._half_open[lane] = "combine"
            self._keep(call.sent, rows, side)

        def receive() -> CombineResult:
            with self._lock:
                self.backend.engine.receive_combine(call)
                event = self._received(call)
                self._keep(event, rows, out, side_out)  # rows too: where they are lent, peers read them until the end
            self._end(lane)
            if not async_op:
                event.wait()
            return CombineResult(out, side_out, event if async_op else None)

        return Pending(receive, call.sent.done)

    def give_back(self, slot: int, call: DispatchCall | None) -> None:
        """A lease ends: the slot is free here at once, and for its writers when the lane has come to this point."""
        with self._lock:
            if call is not None and not self._closed:
                self.backend.engine.release(call)
            self._leased.discard(slot)

    def close(self) -> None:
        """Finish what is under way, stop the lanes."""
        with self._lock:
            self._closed = True
        self.backend.close()

    def _receive_dispatch(
        self,
        call: DispatchCall,
        payload: Payload,
        lease: Lease,
        cached: DispatchHandle | None,
        lane: int,
        fixed_shapes: bool,
        owned: bool,
        async_op: bool,
    ) -> DispatchResult:
        """Launch the receive half and gather what is known: all shapes, and tensors that will be filled."""
        native, shape, layout = call.result, self.backend.shape, self._settings.layout
        num_rows = shape.slot_rows if fixed_shapes else native.num_rows
        with self._lock:
            received = self.backend.receive_dispatch(call, payload, lease.slot, num_rows, owned)
            event = self._received(call)
            self._keep(event, received)
        x, scales = received.x, received.scales
        if layout == "padded":
            per_expert = (shape.num_local_experts, num_rows // shape.num_local_experts)
            x = x.view(*per_expert, -1)
            scales = None if scales is None else scales.view(*per_expert, -1)
        handle = cached or DispatchHandle(
            payload.num_tokens, native.num_rows, native.num_rank_rows, fixed_shapes, lane, self, call
        )
        result = DispatchResult(
            x=x,
            scales=scales,
            topk_idx=column(native.topk_idx, torch.int32, self._settings.num_topk),
            topk_weights=column(native.topk_weights, torch.float32, self._settings.num_topk),
            expert_rows=None if layout == "rank" else column(native.expert_rows, torch.int32, self._settings.num_topk),
            rows_per_expert=column(native.rows_per_expert, torch.int32),
            expert_offsets=None if layout == "rank" else column(native.expert_offsets, torch.int32),
            rows_per_rank=column(native.rows_per_rank, torch.int32),
            expert_load=column(native.expert_load, torch.int32),
            num_rows_tensor=column(native.num_received, torch.int32),
            num_rows=None if fixed_shapes else native.num_rows,
            num_rank_rows=None if fixed_shapes else native.num_rank_rows,
            handle=handle,
            event=event if async_op else None,
            lease=None if owned else lease,
        )
        if owned:
            lease.release()
        else:
            weakref.finalize(result, lease.release).atexit = False
        return result

    @staticmethod
    def _received(call: DispatchCall | CombineCall) -> Event:
        assert call.received is not None
        return call.received

    def _check_lane(self, lane: int) -> None:
        if self._closed:
            raise RuntimeError("the Buffer was destroyed")
        if lane in self._half_open:
            raise RuntimeError(
                f"lane {lane} waits for recv() of a {self._half_open[lane]}: call it, or use another lane"
            )

    def _end(self, lane: int) -> None:
        with self._lock:
            self._half_open.pop(lane, None)

    def _take_slot(self) -> Lease:
        free = [slot for slot in range(self._settings.num_slots) if slot not in self._leased]
        if not free:
            raise LeaseError(
                f"all {self._settings.num_slots} slots are leased: release() or drop a result, dispatch with "
                "output='owned', or construct the Buffer with more num_slots"
            )
        self._leased.add(free[0])
        return Lease(self, free[0])

    def _keep(self, until: Event, *things: object) -> None:
        """Hold `things` while native code may touch them."""
        self._in_flight = [entry for entry in self._in_flight if not entry[0].done()]
        self._in_flight.append((until, things))


def _wait_on_other_lane(handle: DispatchHandle, lane: int) -> None:
    """Operations of one lane are ordered among themselves; on another lane the handle has to be complete first."""
    if handle.lane != lane and handle.call.received is not None:
        handle.call.received.wait()
