"""The use of a slot by a dispatch of the CUDA backend, and how it ends."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING

from deep_a2a.arrays import Library, StreamRef
from deep_a2a.leases import Release

if TYPE_CHECKING:
    from deep_a2a.cuda_backend import CudaBackend
    from deep_a2a.streams import CudaEvent, LaneStream


class CudaSlotUse:
    """See ``backend.SlotUse``. Holds nothing of the dispatch: a lease may last much longer than its input.

    `reader` is the caller's stream, `stream` the lane's, and `event` on it the end of the dispatch.

    Kernels count the uses and the releases of a slot without looking out for each other. So all that is done with a
    slot is in one order of events: a release after the lane's last operation (a combine of the lane may still read
    it), the next dispatch after the release, whatever lanes and streams they are on.
    """

    def __init__(
        self,
        backend: CudaBackend,
        library: Library,
        slot: int,
        lane: LaneStream,
        reader: StreamRef,
        stream: int,
        event: CudaEvent,
    ) -> None:
        self._backend, self._library, self._slot = backend, library, slot
        self._lane = lane
        self._ended = False
        self.move_to(reader, stream, event)

    def move_to(self, reader: StreamRef, stream: int, event: CudaEvent) -> None:
        """The receive half may have been called on another stream, and is later in any case."""
        self._reader, self._stream, self._event = reader, stream, event

    def end_on_lane(self) -> None:
        """Release in the order of the lane, before the event of the dispatch is recorded."""
        self._release(self._stream)

    def end(self, release: Release) -> bool:
        """A use that was captured in a graph ends in that graph, another outside of any."""
        backend, captured = self._backend, self._event.captured
        if self._ended:
            return True
        if release is Release.unread:
            with contextlib.suppress(RuntimeError):  # what failed here has failed before, and is being raised
                self._release(self._stream)
            return True
        last = backend.current_stream(self._library) if release is Release.asked else self._reader
        if captured != backend.is_capturing(last):
            if release is Release.dropped:
                return False
            where = ("inside", "outside") if captured else ("outside", "inside")
            raise RuntimeError(
                f"release() of a result that was dispatched {where[0]} of the capture of a CUDA graph was called "
                f"{where[1]} of it: a graph has to release what it dispatches, and nothing else"
            )
        self._event.block(last.handle)
        self._lane.block_last(last.handle, captured)
        self._release(last.handle)
        return True

    def _release(self, stream: int) -> None:
        self._backend.rank.release(stream=stream, slot=self._slot)
        self._backend.slot_released(self._slot, stream, self._library, self._event.captured)
        self._ended = True
