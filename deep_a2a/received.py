"""The device memory in which a receiver finds its counts and its routing."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from deep_a2a.arrays import Device, Library
from deep_a2a.backend import LaneEvent, Received
from deep_a2a.settings import Settings

if TYPE_CHECKING:
    from deep_a2a import _cuda
    from deep_a2a.cuda_backend import CudaBackend

_LINE_WORDS = 32  # parts of a block start at multiples of 128 bytes
_WORD_BYTES = 4


class ReceivedLayout:
    """How many words of int32 each array takes, in the order of ReceivedCounts and ReceivedRouting (team.hpp)."""

    def __init__(self, settings: Settings, rank: _cuda.Rank) -> None:
        num_local = settings.num_experts // settings.num_ranks
        self.counts = [2, settings.num_ranks, num_local, num_local + 1, settings.num_experts]
        self.counts_words = sum(self.counts)
        assert self.counts_words == rank.counts_words()
        self.num_topk = settings.num_topk
        self.per_expert = settings.layout != "rank"
        assert self.routing_words(1) == rank.routing_words(1)

    def routing(self, capacity: int) -> list[int]:
        """Of `capacity` rank rows."""
        entries = capacity * self.num_topk
        return [entries, entries, entries, capacity] if self.per_expert else [entries, entries]

    def routing_words(self, capacity: int) -> int:
        return sum(self.routing(capacity))


@dataclass(slots=True, eq=False)
class ReceivedArrays:
    """Addresses, as native code takes them, in `blocks` of int32. Of the routing once its capacity is known.

    What a handle keeps is in one block where it can be: to take memory costs the host most. What a result shows is in
    two, since whoever keeps its counts should not keep all of its routing.
    """

    blocks: list[Any]
    counts: int
    routing: int = 0
    capacity: int | None = None  # rank rows

    @classmethod
    def take(
        cls, backend: CudaBackend, library: Library, capacity: int | None, *before: int
    ) -> tuple[ReceivedArrays, list[int]]:
        """All in one block, behind parts of so many words `before`, whose addresses come second."""
        layout = backend.received_layout
        words = [*before, layout.counts_words]
        if capacity is not None:
            words.append(layout.routing_words(capacity))
        block, places = _take(library, backend.device, words)
        arrays = cls([block], *places[len(before) :])
        arrays.capacity = capacity
        return arrays, places[: len(before)]

    def add_routing(self, backend: CudaBackend, library: Library, capacity: int) -> None:
        """In a block of its own."""
        block, [self.routing] = _take(library, backend.device, [backend.received_layout.routing_words(capacity)])
        self.blocks.append(block)
        self.capacity = capacity

    def drop_routing(self) -> None:
        """What has no room is not written."""
        self.routing, self.capacity = 0, 0

    def as_received(
        self,
        layout: ReceivedLayout,
        library: Library,
        x: Any,
        scales: Any,
        known: tuple[int | None, int | None],
        event: LaneEvent,
    ) -> Received:
        """With the fields of a result as views of its blocks."""
        assert self.capacity is not None
        capacity, num_topk = self.capacity, layout.num_topk
        counts, routing = self.blocks
        by_slot = library.parts(routing, layout.routing(capacity))
        num_rows_tensor, rows_per_rank, rows_per_expert, expert_offsets, expert_load = library.parts(
            counts, layout.counts
        )
        return Received(
            x=x,
            scales=scales,
            topk_idx=library.table(by_slot[0], capacity, num_topk, "int32"),
            topk_weights=library.table(by_slot[1], capacity, num_topk, "float32"),
            expert_rows=library.table(by_slot[2], capacity, num_topk, "int32") if layout.per_expert else None,
            rows_per_expert=rows_per_expert,
            expert_offsets=expert_offsets if layout.per_expert else None,
            rows_per_rank=rows_per_rank,
            expert_load=expert_load,
            num_rows_tensor=num_rows_tensor,
            num_rows=known[0],
            num_rank_rows=known[1],
            event=event,
        )


def _take(library: Library, device: Device, words: list[int]) -> tuple[Any, list[int]]:
    """A block of int32 for parts of so many words, and the parts' addresses."""
    offsets, end = [], 0
    for count in words:
        offsets.append(-(-end // _LINE_WORDS) * _LINE_WORDS)
        end = offsets[-1] + count
    block = library.empty((end,), "int32", device)
    address = library.pointer(block)
    return block, [address + offset * _WORD_BYTES for offset in offsets]
