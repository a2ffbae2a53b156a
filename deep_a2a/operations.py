"""Launching operations: which slot, which lane, and what has to stay alive meanwhile."""

from __future__ import annotations

import threading
import weakref
from collections import deque

from deep_a2a._cpu import STAGED_ROUNDS
from deep_a2a.backend import Backend, CombineRequest, DispatchCall, DispatchRequest, LaneEvent, Received
from deep_a2a.errors import LeaseError
from deep_a2a.formats import ScaleLayout
from deep_a2a.leases import Lease, Release, SlotUse
from deep_a2a.pending import Pending, PendingCombine, PendingDispatch
from deep_a2a.results import CombineResult, DispatchHandle, DispatchResult
from deep_a2a.settings import Settings


class Operations:
    """What one Buffer has under way. Arguments are checked by then."""

    def __init__(self, settings: Settings, backend: Backend) -> None:
        self.backend = backend
        self._closed = False
        self._settings = settings
        self._lock = threading.RLock()  # reentrant: the collector may drop a result while a call holds it
        self._leased: set[int] = set()
        self._overdue: list[tuple[int, SlotUse]] = []  # leases that were dropped where they could not end
        self._half_open: dict[int, str] = {}  # by lane: the operation that waits for its recv()
        # By lane: what native code still points to until an event, in the order of the events.
        self._in_flight: list[deque[tuple[LaneEvent, tuple[object, ...]]]] = [
            deque() for _ in range(settings.num_lanes)
        ]
        self._in_graphs: list[tuple[object, ...]] = []  # what it points to whenever a graph is replayed

    def dispatch(self, request: DispatchRequest, *, async_op: bool) -> PendingDispatch:
        """Launch the send half of a dispatch, cached where there is a handle."""
        with self._lock:
            self._check_lane(request.lane)
            lease = self._take_slot()
            try:
                call = self.backend.dispatch(request, lease.slot)
            except BaseException:
                lease.end(Release.unread)
                raise
            lease.bind(call.slot_use)
            self._half_open[request.lane] = "dispatch"
            self._keep(request.lane, call.sent, call, request)
        # Of the half that reads the input last; None before it is launched.
        sent = None if self.backend.shape.num_rounds > STAGED_ROUNDS else call.sent

        def receive() -> DispatchResult:
            nonlocal sent
            try:
                self._check_open()
                call.wait_counts()
                with self._lock:
                    self._check_open()
                    received = call.receive()
                    self._keep(request.lane, received.event, call, request, received)
                    sent = received.event if sent is None else sent
                    result = self._result(call, request, received, lease, async_op)
                if not async_op:
                    received.event.wait()
            except BaseException:
                with self._lock:
                    abandoned = None if self._closed else call.abandon()
                    if abandoned is not None:
                        self._keep(request.lane, abandoned, call, request)
                    if sent is None:
                        sent = abandoned or call.sent
                lease.end(Release.unread)
                raise
            finally:
                self._end(request.lane)
            return result

        return Pending(receive, lambda: sent is not None and sent.done())

    def combine(self, request: CombineRequest, *, async_op: bool) -> PendingCombine:
        """Launch the send half of a combine."""
        with self._lock:
            self._check_lane(request.lane)
            call = self.backend.combine(request)
            self._half_open[request.lane] = "combine"
            self._keep(request.lane, call.sent, call, request)

        def receive() -> CombineResult:
            try:
                with self._lock:
                    self._check_open()
                    event = call.receive()
                    # The rows too: where they are lent, peers read them until the end.
                    self._keep(request.lane, event, call, request)
            finally:
                self._end(request.lane)
            if not async_op:
                event.wait()
            return CombineResult(call.x, call.side, event if async_op else None)

        return Pending(receive, call.sent.done)

    def give_back(self, slot: int, use: SlotUse | None, release: Release) -> None:
        """A lease ends: the slot is free here at once, and for its writers when `release` says so."""
        with self._lock:
            if use is None or self._closed or use.end(release):
                self._leased.discard(slot)
            else:
                self._overdue.append((slot, use))

    def close(self) -> None:
        """Finish what is under way, stop the lanes."""
        with self._lock:
            self._closed = True
        in_use = (self._in_flight, self._in_graphs)
        self._in_flight, self._in_graphs = [], []
        self.backend.close(in_use)

    def _result(
        self, call: DispatchCall, request: DispatchRequest, received: Received, lease: Lease, async_op: bool
    ) -> DispatchResult:
        fixed_shapes, x, scales = request.fixed_shapes, received.x, received.scales
        if self._settings.layout == "padded":
            library, num_groups = request.payload.library, self.backend.shape.num_local_experts
            x = library.split(x, num_groups)
            if scales is not None and request.scale_layout is ScaleLayout.row_major:
                scales = library.split(scales, num_groups)
        handle = request.handle or DispatchHandle(
            request.payload.num_tokens,
            received.num_rows,
            received.num_rank_rows,
            fixed_shapes,
            request.lane,
            self,
            call.handle,
        )
        result = DispatchResult(
            x=x,
            scales=scales,
            topk_idx=received.topk_idx,
            topk_weights=received.topk_weights,
            expert_rows=received.expert_rows,
            rows_per_expert=received.rows_per_expert,
            expert_offsets=received.expert_offsets,
            rows_per_rank=received.rows_per_rank,
            expert_load=received.expert_load,
            num_rows_tensor=received.num_rows_tensor,
            num_rows=None if fixed_shapes else received.num_rows,
            num_rank_rows=None if fixed_shapes else received.num_rank_rows,
            handle=handle,
            event=received.event if async_op else None,
            lease=None if request.owned else lease,
        )
        if request.owned:
            lease.end(Release.unread)
        else:
            weakref.finalize(result, lease.end, Release.dropped).atexit = False
        return result

    def _check_open(self) -> None:
        if self._closed:
            raise RuntimeError("the Buffer was destroyed")

    def _check_lane(self, lane: int) -> None:
        self._check_open()
        if lane in self._half_open:
            raise RuntimeError(
                f"lane {lane} waits for recv() of a {self._half_open[lane]}: call it, or use another lane"
            )

    def _end(self, lane: int) -> None:
        with self._lock:
            self._half_open.pop(lane, None)

    def _take_slot(self) -> Lease:
        overdue, self._overdue = self._overdue, []
        for slot, use in overdue:
            self.give_back(slot, use, Release.dropped)
        free = [slot for slot in range(self._settings.num_slots) if slot not in self._leased]
        if not free:
            raise LeaseError(
                f"all {self._settings.num_slots} slots are leased: release() or drop a result, dispatch with "
                "output='owned', or construct the Buffer with more num_slots"
            )
        self._leased.add(free[0])
        return Lease(self, free[0])

    def _keep(self, lane: int, until: LaneEvent, *things: object) -> None:
        """Hold `things` while native code may touch them, and let go of others that it no longer does."""
        if until.captured:
            self._in_graphs.append(things)
            return
        mine = self._in_flight[lane]
        if mine and mine[-1][0] is until:
            things = (*mine.pop()[1], *things)
        mine.append((until, things))
        for in_flight in self._in_flight if self.backend.may_poll() else ():
            while in_flight and in_flight[0][0].done():
                in_flight.popleft()
