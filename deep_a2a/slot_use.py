"""The use of a slot by a dispatch of the CUDA backend, and how it ends."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING

from deep_a2a.arrays import Library, StreamRef
from deep_a2a.leases import Release

if TYPE_CHECKING:
    from deep_a2a.cuda_backend import CudaBackend
    from deep_a2a.streams import CudaEvent


class CudaSlotUse:
    """See ``backend.SlotUse``. Holds nothing of the dispatch: a lease may last much longer than its input.

    `reader` is the caller's stream, `stream` the lane's, and `event` on it the end of the dispatch.
    """

    def __init__(
        self, backend: CudaBackend, library: Library, slot: int, reader: StreamRef, stream: int, event: CudaEvent
    ) -> None:
        self._backend, self._library, self._slot = backend, library, slot
        self.move_to(reader, stream, event)

    def move_to(self, reader: StreamRef, stream: int, event: CudaEvent) -> None:
        """The receive half may have been called on another stream, and is later in any case."""
        self._reader, self._stream, self._event = reader, stream, event

    def end(self, release: Release) -> bool:
        """A use that was captured in a graph ends in that graph, another outside of any."""
        backend, captured = self._backend, self._event.captured
        if release is Release.unread:
            with contextlib.suppress(RuntimeError):  # what failed here has failed before, and is being raised
                backend.rank.release(stream=self._stream, slot=self._slot)
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
        backend.rank.release(stream=last.handle, slot=self._slot)
        return True
