"""The blocks of device memory in which a receiver finds its counts and its routing."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from deep_a2a.arrays import Array, Library
from deep_a2a.backend import Received
from deep_a2a.results import Event

if TYPE_CHECKING:
    from deep_a2a.cuda_backend import CudaBackend


@dataclass
class ReceivedBlocks:
    """Blocks of int32 as native code lays them out. The routing of `capacity` rank rows comes when that is known."""

    counts: Array
    routing: Array | None = None
    capacity: int = 0

    @classmethod
    def for_counts(cls, backend: CudaBackend, library: Library) -> ReceivedBlocks:
        return cls(_words(backend, library, backend.rank.counts_words()))

    def add_routing(self, backend: CudaBackend, library: Library, capacity: int) -> None:
        self.capacity = capacity
        self.routing = _words(backend, library, backend.rank.routing_words(capacity))

    def drop_routing(self) -> None:
        """What has no room is not written."""
        self.routing, self.capacity = None, 0

    @property
    def routing_pointer(self) -> int:
        return 0 if self.routing is None else self.routing.pointer

    def as_received(
        self,
        backend: CudaBackend,
        library: Library,
        x: Any,
        scales: Any,
        known: tuple[int | None, int | None],
        event: Event,
    ) -> Received:
        """With the fields of a result as views of the blocks."""
        assert self.routing is not None
        settings, counts, routing = backend.settings, self.counts.value, self.routing.value
        per_expert, num_local = settings.layout != "rank", backend.shape.num_local_experts
        place = 0

        def numbers(count: int) -> Any:
            nonlocal place
            place += count
            return library.cut(counts, place - count, (count,), "int32")

        def slots(part: int, dtype: str = "int32") -> Any:
            shape = (self.capacity, settings.num_topk)
            return library.cut(routing, part * self.capacity * settings.num_topk, shape, dtype)

        num_rows_tensor, rows_per_rank = numbers(2), numbers(settings.num_ranks)
        rows_per_expert, expert_offsets = numbers(num_local), numbers(num_local + 1)
        return Received(
            x=x,
            scales=scales,
            topk_idx=slots(0),
            topk_weights=slots(1, "float32"),
            expert_rows=slots(2) if per_expert else None,
            rows_per_expert=rows_per_expert,
            expert_offsets=expert_offsets if per_expert else None,
            rows_per_rank=rows_per_rank,
            expert_load=numbers(settings.num_experts),
            num_rows_tensor=num_rows_tensor,
            num_rows=known[0],
            num_rank_rows=known[1],
            event=event,
        )


def _words(backend: CudaBackend, library: Library, count: int) -> Array:
    return library.describe(library.empty((count,), "int32", backend.device))
