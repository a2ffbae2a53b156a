"""What a Buffer takes, before it takes it."""

from __future__ import annotations

import os
from dataclasses import dataclass

from deep_a2a._cpu import Shape, regions


def format_bytes(count: int) -> str:
    """Binary units, three digits: ``format_bytes(1536) == "1.5 KiB"``."""
    value = float(count)
    for unit in ("B", "KiB", "MiB", "GiB"):
        if value < 1024:
            return f"{value:.3g} {unit}"
        value /= 1024
    return f"{value:.4g} TiB"


@dataclass(frozen=True)
class RegionSize:
    """One region of a rank's window: `count` instances (one per lane or slot, or a single one) of `bytes_each`."""

    name: str
    count: int
    bytes_each: int
    offset: int
    stride: int
    holds: str

    @property
    def bytes(self) -> int:
        return self.stride * self.count


@dataclass(frozen=True)
class MemoryTable:
    """The regions of one rank's window and their sizes in bytes; ``str()`` is a table.

    On the CPU backend these are upper bounds: pages of a window take memory when they are first written. On the CUDA
    backend a window is memory of the GPU, taken at once; beside it each rank takes some hundred KiB for its kernels.
    """

    regions: tuple[RegionSize, ...]
    total_bytes: int

    def __str__(self) -> str:
        header = f"{'region':<18} {'count':>5}   {'each':>10}   {'total':>10}   holds"
        rows = [
            f"{r.name:<18} {r.count:>5} x {format_bytes(r.bytes_each):>10} = {format_bytes(r.bytes):>10}   {r.holds}"
            for r in self.regions
        ]
        return "\n".join([header, *rows, f"one rank's window: {format_bytes(self.total_bytes)}"])


def table_of(shape: Shape) -> MemoryTable:
    return MemoryTable(tuple(RegionSize(*row) for row in regions(shape)), shape.window_bytes)


def check_affordable(window_bytes: int, ranks_on_host: int) -> None:
    """MemoryError where the windows of a host could outgrow its memory."""
    available = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    if window_bytes * ranks_on_host > available:
        raise MemoryError(
            f"{ranks_on_host} windows of {format_bytes(window_bytes)} exceed this host's memory of "
            f"{format_bytes(available)}"
        )


def with_advice(error: MemoryError, table: MemoryTable) -> MemoryError:
    """`error` with what can be done, and the table that shows what for."""
    return MemoryError(
        f"{error}: lower num_max_tokens_per_rank, num_slots, num_lanes or, with several nodes, staging_bytes, or bound "
        f"the received rows (max_recv_rows; layout 'padded': expert_capacity)\n{table}"
    )
