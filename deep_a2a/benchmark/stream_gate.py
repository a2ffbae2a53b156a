"""Timing on a stream: all ranks' streams are held at a gate, released together, and timed by events from there.

1. The stream is held, an event to start from is enqueued behind the hold, then the operation, then an event to end at.
2. The hosts meet. Nothing that they still have to do is inside the measured time.
3. The gate opens: the streams wait for each other, and go.

An operation that stops the host until the GPU has done something (`host_sync`) cannot be enqueued behind the hold: it
is called when the gate has opened, and its launches are inside the measured time. So it is with the emulator, whose
operations run in the calling thread.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any, Literal, Protocol

import torch
import torch.distributed as dist

from deep_a2a.benchmark.agreement import agree, attempt, largest
from deep_a2a.benchmark.place import Place

Enqueue = Literal["held", "released"]

_POLL_S = 2e-4


class Gatekeeper(Protocol):
    """A native Meter, within a node, or PutMeter, across nodes."""

    def hold(self, stream: int) -> None: ...

    def open(self) -> None: ...

    def late(self) -> bool: ...


class Stopwatch(Protocol):
    """Times what lies between `start` and `stop`, on a stream that a meter can hold."""

    enqueue: tuple[Enqueue, ...]

    @property
    def stream(self) -> int: ...

    def hold(self, meter: Any) -> None:
        """`meter`: a native Meter, or across nodes a PutMeter."""

    def start(self) -> None: ...

    def stop(self) -> None: ...

    def microseconds(self) -> float: ...


class GpuStopwatch:
    """Events on torch's current stream."""

    enqueue: tuple[Enqueue, ...] = ("held", "released")

    def __init__(self, device: torch.device) -> None:
        self._device = device
        cuda: Any = torch.cuda  # whose events are untyped in some versions
        self._events = cuda.Event(enable_timing=True), cuda.Event(enable_timing=True)

    @property
    def stream(self) -> int:
        return int(torch.cuda.current_stream(self._device).cuda_stream)

    def hold(self, meter: Any) -> None:
        meter.hold(self.stream)

    def start(self) -> None:
        self._events[0].record(torch.cuda.current_stream(self._device))

    def stop(self) -> None:
        self._events[1].record(torch.cuda.current_stream(self._device))

    def microseconds(self) -> float:
        # Not synchronize(): this process may have to move, as NVSHMEM's proxy, what the operation waits for.
        while not self._events[1].query():
            time.sleep(_POLL_S)
        return float(self._events[0].elapsed_time(self._events[1])) * 1e3


class EmulatorStopwatch:
    """The host's clock. What is held is a stream of its own, for which the caller then waits."""

    enqueue: tuple[Enqueue, ...] = ("released",)
    stream = 0

    def __init__(self, place: Place) -> None:
        self._held = place.native().Stream(place.device_idx)
        self._start_ns = self._stop_ns = 0

    def hold(self, meter: Any) -> None:
        meter.hold(self._held.handle)

    def start(self) -> None:
        self._held.synchronize()
        self._start_ns = time.perf_counter_ns()

    def stop(self) -> None:
        self._stop_ns = time.perf_counter_ns()

    def microseconds(self) -> float:
        return (self._stop_ns - self._start_ns) * 1e-3


class StreamGate:
    """Releases the streams of a group together and measures what is enqueued behind the gate. Collective."""

    def __init__(self, group: dist.ProcessGroup, place: Place, meter: Gatekeeper) -> None:
        self.meter, self.num_ranks = meter, dist.get_world_size(group)
        self._group = group
        self._watch: Stopwatch = GpuStopwatch(place.device) if place.backend == "cuda" else EmulatorStopwatch(place)

    def measure(self, operation: Callable[[int], object], enqueue: Enqueue = "held") -> float:
        """Microseconds from the common release to the end of `operation`, on the slowest rank.

        operation: called with the stream that is timed. Raises MeasurementError on every rank if it fails on one.
        """
        watch, failures = self._watch, []
        held = enqueue in watch.enqueue and enqueue == "held"

        def timed() -> None:
            watch.start()
            try:
                operation(watch.stream)
            finally:
                watch.stop()  # also where it failed: what comes later waits for this event

        failures.append(attempt(lambda: watch.hold(self.meter)))
        if held:
            failures.append(attempt(timed))
        dist.barrier(group=self._group)
        self.meter.open()
        if not held:
            failures.append(attempt(timed))
        times: list[float] = []
        failures.append(attempt(lambda: times.append(watch.microseconds())))
        if self.meter.late():
            failures.append(TimeoutError("the gate gave up: some rank's stream did not come in time"))
        agree(self._group, next((failure for failure in failures if failure is not None), None))
        return largest(self._group, times[0])[0]
