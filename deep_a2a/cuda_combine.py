"""A combine of the CUDA backend: its output, and the launches of its halves."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from deep_a2a.backend import CombineRequest, Halves
from deep_a2a.cuda_dispatch import CudaHandle
from deep_a2a.streams import CudaEvent

if TYPE_CHECKING:
    from deep_a2a.cuda_backend import CudaBackend


class CudaCombine:
    """See ``backend.CombineCall``."""

    def __init__(self, backend: CudaBackend, request: CombineRequest) -> None:
        self._backend, self._request = backend, request
        self._library = library = request.rows.library
        self._lane = backend.lanes[request.lane]
        caller, capturing = backend.begin(library)
        num_tokens, settings = request.handle.num_tokens, backend.settings
        self.x = library.empty((num_tokens, settings.hidden), "bfloat16", backend.device)
        self.side: Any = None
        if request.side is not None:
            self.side = library.empty((num_tokens, settings.num_topk), "float32", backend.device)
        stream = self._lane.enter(caller, capturing)
        handle: CudaHandle = request.handle.call
        assert handle.received is not None
        handle.received.block_within(stream, capturing)
        backend.follow(request.previous, stream)
        together = request.halves is Halves.together
        self._launched = backend.half.both if together else backend.half.send
        self._launch(stream)
        self.sent = self._event = backend.leave(self._lane, stream, library, capturing)

    def receive(self) -> CudaEvent:
        half = self._backend.half
        if self._launched is half.send:
            self._launched = half.receive
            caller, capturing = self._backend.begin(self._library)
            stream = self._lane.current(caller, capturing)
            self._launch(stream)
            self._event = self._backend.leave(self._lane, stream, self._library, capturing)
        return self._event

    def _launch(self, stream: int) -> None:
        request, library = self._request, self._library
        handle: CudaHandle = request.handle.call
        self._backend.rank.combine(
            stream=stream,
            lane=request.lane,
            half=self._launched,
            num_sms=self._backend.num_sms,
            rows=request.rows.pointer,
            num_rows=request.rows.shape[0],
            side=0 if request.side is None else request.side.pointer,
            weighted=request.weighted,
            with_side=request.side is not None,
            out=library.pointer(self.x),
            side_out=0 if self.side is None else library.pointer(self.side),
            num_tokens=request.handle.num_tokens,
            source=handle.source,
            relay=handle.relay,
            kept_counts=handle.kept.counts,
            kept_routing=handle.kept.routing,
            kept_capacity=handle.kept.capacity or 0,
        )
