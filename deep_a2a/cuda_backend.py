"""The CUDA backend in Python; with the emulator's native module, the same kernels on the CPU and in host memory."""

from __future__ import annotations

import ctypes
import functools
import time
from typing import TYPE_CHECKING, Any

from deep_a2a.arrays import Device, Library, StreamRef
from deep_a2a.backend import CombineRequest, DispatchRequest
from deep_a2a.cuda_combine import CudaCombine
from deep_a2a.cuda_dispatch import CudaDispatch
from deep_a2a.received import ReceivedLayout
from deep_a2a.results import Event
from deep_a2a.settings import Settings
from deep_a2a.streams import CudaEvent, LaneStream, StreamChoice
from deep_a2a.windows import WindowViews

if TYPE_CHECKING:
    from deep_a2a import _cuda

_GRACE_S = 1.0

# What kernels use that had not ended when their buffer was destroyed: to free it would be to wait for them.
_unfinished: list[object] = []


class CudaBackend:
    """See ``backend.Backend``. `native` is ``_cuda`` or ``_emulated``, and `rank` the engine it has made."""

    def __init__(
        self,
        native: Any,
        rank: _cuda.Rank,
        settings: Settings,
        device: Device,
        ordinal: int,
        window: _cuda.Window,
        timeout_s: float,
        num_sms: int,
        choice: StreamChoice,
    ) -> None:
        self.settings = settings
        self.shape = settings.shape()
        self.device = device
        self.num_sms = num_sms
        self.half: type[_cuda.Half] = native.Half
        self.received_layout = ReceivedLayout(settings, rank)
        self.relay_words = -(-rank.relay_bytes() // 4)
        self.lanes = [LaneStream(native, ordinal, choice) for _ in range(settings.num_lanes)]
        self._native = native
        self._rank: _cuda.Rank | None = rank
        self._timeout_s = timeout_s
        self._capturing = False
        self._released: dict[int, CudaEvent] = {}  # by slot: its last release
        self._window: _cuda.Window | None = window
        self._views: WindowViews | None = WindowViews(self.shape, lambda library: _wrap(library, window, device))

    @property
    def wire_bytes(self) -> dict[str, int]:
        nvlink, network = self.rank.wire_bytes
        return {"nvlink": nvlink, "network": network} if self.settings.num_nodes > 1 else {"nvlink": nvlink}

    def dispatch(self, request: DispatchRequest, slot: int) -> CudaDispatch:
        self.rank.check_faults()
        return CudaDispatch(self, request, slot)

    def combine(self, request: CombineRequest) -> CudaCombine:
        self.rank.check_faults()
        return CudaCombine(self, request)

    def view(
        self, library: Library, region: str, instance: int, rows: int, columns: int, dtype: str, align: int = 1
    ) -> Any:
        assert self._views is not None
        return self._views.rows(library, region, instance, (rows, columns), dtype, align)

    def may_poll(self) -> bool:
        return not self._capturing

    def check(self) -> None:
        if self._rank is not None:
            self._rank.check()

    def close(self, in_flight: object) -> None:
        # A kernel gives up by itself, but needs a moment to come to its end after that.
        end = time.monotonic() + self._timeout_s + _GRACE_S
        is_over = all([lane.wait_idle(end) for lane in self.lanes])
        if not is_over:
            _unfinished.append((self._rank, self.lanes, in_flight))
        # What peers have put may still be on its way here.
        if self.settings.num_nodes > 1 and self._rank is not None and (not is_over or self.is_poisoned()):
            self._native.SymmetricHeap.lose(self._window)
        # With the engine go the windows of the peers; the own one stays while there are views of it. Freeing memory
        # of a GPU waits for what is on callers' streams.
        self._rank, self._window, self._views, self.lanes = None, None, None, []

    # For operations under way.

    @property
    def rank(self) -> _cuda.Rank:
        if self._rank is None:
            raise RuntimeError("the Buffer was destroyed")
        return self._rank

    def begin(self, library: Library) -> tuple[StreamRef, bool]:
        """The caller's current stream, and whether it is being captured."""
        caller = self.current_stream(library)
        self._capturing = self.is_capturing(caller)
        return caller, self._capturing

    def leave(self, lane: LaneStream, stream: int, library: Library, capturing: bool) -> CudaEvent:
        """The point that the lane has come to on `stream`."""
        # An event may be kept for long: it refers to nothing of its operation.
        return lane.leave(stream, functools.partial(self.current_stream, library), self.check, capturing)

    def slot_released(self, slot: int, stream: int, library: Library, capturing: bool) -> None:
        """A release of the slot has been launched on `stream`."""
        native = self._native.Event(self.lanes[0].device)
        native.record(stream)
        current = functools.partial(self.current_stream, library)
        self._released[slot] = CudaEvent(native, stream, current, self.check, capturing)

    def follow_release(self, slot: int, stream: int, capturing: bool) -> None:
        """Makes `stream` wait for the last release of the slot."""
        if slot in self._released:
            self._released[slot].block_within(stream, capturing)

    def current_stream(self, library: Library) -> StreamRef:
        """The caller's. The emulator's null stream does everything at once, as host memory needs it."""
        return StreamRef(0) if self.device.kind == "cpu" else library.current_stream(self.device)

    def is_poisoned(self) -> bool:
        """Whether this rank or another gave up: a refusal is raised once, that always."""
        try:
            self.rank.check_faults()
        except RuntimeError:
            return True
        return False

    def is_capturing(self, stream: StreamRef) -> bool:
        capturing: bool = self._native.is_capturing(stream.handle)
        return capturing

    @staticmethod
    def follow(previous: Event | None, stream: int) -> None:
        """Makes the stream wait for the event; the host for one that no stream can wait for."""
        if isinstance(previous, CudaEvent):
            previous.block(stream)
        elif previous is not None:
            previous.synchronize()


class _HostMemory:
    """Host memory as a buffer that keeps its owner."""

    def __init__(self, address: int, nbytes: int, owner: object) -> None:
        self.array = (ctypes.c_uint8 * nbytes).from_address(address)
        self.array.owner = owner  # type: ignore[attr-defined]


def _wrap(library: Library, window: _cuda.Window, device: Device) -> Any:
    if device.kind == "cuda":
        return library.from_device(window.address, window.nbytes, window, device)
    return library.from_buffer(_HostMemory(window.address, window.nbytes, window).array, "uint8")
