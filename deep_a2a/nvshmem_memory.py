"""Windows in symmetric memory: the ranks of a Buffer compare what each has free, and take the same range."""

from __future__ import annotations

from typing import Any

import deep_a2a.nvshmem_environment as environment
from deep_a2a.bootstrap import together
from deep_a2a.errors import CommError
from deep_a2a.group import Group
from deep_a2a.memory import format_bytes
from deep_a2a.nvshmem_job import Job, within

_MOST_RANGES = 64  # that a rank offers: a message has its limit
_BLOCK_BYTES = 2 * 2**20

Range = tuple[int, int, int]
"""Block, offset and bytes."""


def allocate(job: Job, group: Group, nbytes: int, timeout_s: float) -> list[Any]:
    """With all ranks of the group: windows of `nbytes`, zeroed, by rank; None for ranks whose memory is not mapped.

    The own window's range is given back when its last view goes, with no word to other ranks. After a fault
    ``SymmetricHeap.lose(window)`` keeps it from being used again.
    """
    heap = job.native.SymmetricHeap
    found = common_range(_offers(job, group, timeout_s), nbytes, heap.alignment)
    if found is None:
        if not job.is_whole:
            raise CommError(
                f"a window of {format_bytes(nbytes)} does not fit what the {job.num_pes} PEs of the NVSHMEM job have "
                f"reserved, and the {group.size} ranks of this Buffer cannot reserve more by themselves: make the "
                "first Buffer over all ranks of the job, and the largest first"
            )
        _grow(job, group, nbytes, timeout_s)
        found = common_range(_offers(job, group, timeout_s), nbytes, heap.alignment)
        if found is None:
            raise CommError(f"the ranks do not agree about a window of {format_bytes(nbytes)} in symmetric memory")
    block, offset = found
    taken: list[Any] = []

    def take() -> None:
        taken.append(
            heap.take(block=block, offset=offset, nbytes=nbytes, pes=list(job.pes), device=job.device),
        )

    together(group, take, timeout_s, "take its window")  # all are zeroed before anyone puts
    own = taken[0]
    windows: list[Any] = []

    def reach() -> None:
        for rank, pe in enumerate(job.pes):
            windows.append(own if rank == group.rank else heap.reach(window=own, pe=pe, device=job.device))

    together(group, reach, timeout_s, "reach the windows of its peers")
    return windows


def common_range(offers: list[list[Range]], nbytes: int, alignment: int) -> tuple[int, int] | None:
    """Block and offset of `nbytes` that all have free: where the least is left over, then the first."""
    common = [(block, offset, offset + size) for block, offset, size in offers[0]]
    for offer in offers[1:]:
        theirs = [(block, offset, offset + size) for block, offset, size in offer]
        common = [
            (block, max(begin, other_begin), min(end, other_end))
            for block, begin, end in common
            for other, other_begin, other_end in theirs
            if block == other and max(begin, other_begin) < min(end, other_end)
        ]
    needed = -(-nbytes // alignment) * alignment
    fitting = [(end - begin, block, begin) for block, begin, end in common if end - begin >= needed]
    return min(fitting)[1:] if fitting else None


def _offers(job: Job, group: Group, timeout_s: float) -> list[list[Range]]:
    heap = job.native.SymmetricHeap

    def offer() -> list[Range]:
        heap.settle(timeout_s=timeout_s, device=job.device)  # what it cannot settle is not offered
        ranges: list[Range] = heap.free_ranges(pes=list(job.pes), most=_MOST_RANGES)
        return ranges

    return together(group, offer, timeout_s, "look for memory")


def _grow(job: Job, group: Group, nbytes: int, timeout_s: float) -> None:
    heap = job.native.SymmetricHeap
    size = -(-nbytes // _BLOCK_BYTES) * _BLOCK_BYTES

    def grow() -> None:
        try:
            within(timeout_s, lambda: heap.grow(nbytes=size, device=job.device))
        except MemoryError as error:
            raise MemoryError(
                f"NVSHMEM's heap, {environment.heap_size()} on each PE, has no room for another {format_bytes(size)}: "
                "make the largest Buffer first, or set NVSHMEM_SYMMETRIC_SIZE to what all Buffers take together"
            ) from error

    together(group, grow, timeout_s, f"reserve {format_bytes(size)} of symmetric memory")
