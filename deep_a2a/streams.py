"""Where the kernels of a lane run, and events on GPU streams.

A captured stream makes the difference between points in time and points in a graph: an event that was recorded while a
graph was captured can be waited for within that capture only, and none may be asked for its state meanwhile.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from enum import Enum
from typing import TYPE_CHECKING, Any

from deep_a2a.arrays import StreamRef

if TYPE_CHECKING:
    from deep_a2a import _cuda


class StreamChoice(Enum):
    """On which stream a lane's kernels are launched."""

    own = "own"
    current = "current"


class CudaEvent:
    """A point on a stream: what was launched there before has come to its end when it is passed."""

    def __init__(
        self,
        native: _cuda.Event,
        stream: int,
        current: Callable[[], StreamRef],
        check: Callable[[], None],
        captured: bool,
    ) -> None:
        self.captured = captured
        self._native = native
        self._stream = stream
        self._current = current
        self._check = check

    def wait(self) -> None:
        """Make the caller's current stream wait, not the host. Raises what is known to have failed by now."""
        self.block(self._current().handle)
        self._check()

    def synchronize(self) -> None:
        """Block the host. Raises what was on the stream failed with."""
        if self.captured:
            raise RuntimeError("the event is part of a captured CUDA graph: synchronize with the stream of its replay")
        self._native.synchronize()
        self._check()

    def done(self) -> bool:
        """Whether it has been passed; never blocks, never raises. An event of a captured graph never has."""
        if self.captured:
            return False
        try:
            return self._native.done()
        except RuntimeError:
            return True  # the device has failed, and runs nothing any more

    def block(self, stream: int) -> None:
        """Makes `stream` wait."""
        if stream != self._stream:
            self._native.block(stream)

    def block_within(self, stream: int, capturing: bool) -> None:
        """As `block`, but not for a point on the other side of a capture: the caller has to have waited for that."""
        if self.captured == capturing:
            self.block(stream)


class LaneStream:
    """Runs the operations of one lane one after the other, whatever streams the callers use."""

    def __init__(self, native: Any, device: int, choice: StreamChoice) -> None:
        self._native = native
        self.device = device
        self._own: _cuda.Stream | None = native.Stream(device) if choice is StreamChoice.own else None
        self._joint: _cuda.Event = native.Event(device)
        self._last: CudaEvent | None = None

    def enter(self, caller: StreamRef, capturing: bool) -> int:
        """The stream to launch on: after what is on the caller's stream, and after the lane's last operation."""
        if self._own is not None:
            self._joint.record(caller.handle)
            self._joint.block(self._own.handle)
            return self._own.handle
        if self._last is not None:
            self._last.block_within(caller.handle, capturing)
        return caller.handle

    def current(self, caller: StreamRef, capturing: bool) -> int:
        """As `enter`, but without waiting for what is on the caller's stream if the lane has one of its own."""
        return self._own.handle if self._own is not None else self.enter(caller, capturing)

    def leave(
        self, stream: int, current: Callable[[], StreamRef], check: Callable[[], None], capturing: bool
    ) -> CudaEvent:
        """The point that `stream`, which came from `enter`, is at."""
        native = self._native.Event(self.device)
        native.record(stream)
        self._last = CudaEvent(native, stream, current, check, capturing)
        return self._last

    def block_last(self, stream: int, capturing: bool) -> None:
        """Makes `stream` wait for the lane's last operation."""
        if self._last is not None:
            self._last.block_within(stream, capturing)

    def wait_idle(self, deadline: float) -> bool:
        """Blocks until nothing that the lane has launched is under way; False if something still is at `deadline`."""
        last: CudaEvent | _cuda.Event | None = self._last
        if self._own is not None:  # releases of slots came after the last operation
            self._joint.record(self._own.handle)
            last = self._joint
        elif self._last is not None and self._last.captured:
            last = None
        while last is not None and not last.done():
            if time.monotonic() >= deadline:
                return False
            time.sleep(0.0005)
        return True
