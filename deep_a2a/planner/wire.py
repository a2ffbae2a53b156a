"""Bytes of what crosses: rows, what travels with them, count vectors. As `csrc/protocol/wire.hpp` has it."""

from __future__ import annotations

from deep_a2a.formats import num_scale_groups

from .workload import Workload

ROW_ALIGNMENT = 16
ROUTE_ENTRY_BYTES = 16
COUNT_HEADER_BYTES = 32
CHUNK_BYTES = 256 * 1024
_BF16_BYTES = 2
_WORD_BYTES = 4


def align_up(value: int, unit: int) -> int:
    """The smallest multiple of `unit` that is not below `value`."""
    return -(-value // unit) * unit


def payload_bytes(workload: Workload) -> int:
    """Of a dispatched row."""
    return workload.hidden * (_BF16_BYTES if workload.dtype == "bf16" else 1)


def scale_bytes(workload: Workload) -> int:
    """Of a dispatched row; float32."""
    return num_scale_groups(workload.hidden) * _WORD_BYTES if workload.dtype == "fp8" else 0


def row_bytes(workload: Workload) -> int:
    """A dispatched row: payload and scales."""
    return payload_bytes(workload) + scale_bytes(workload)


def sum_bytes(workload: Workload) -> int:
    """A row of combine, always BF16."""
    return workload.hidden * _BF16_BYTES


def record_bytes(workload: Workload) -> int:
    """The route record beside a rank row (`RouteRecord`)."""
    words = 2 * workload.num_topk if workload.layout == "rank" else 3 * workload.num_topk + 1
    return align_up(words * _WORD_BYTES, ROW_ALIGNMENT)


def stream_row_bytes(workload: Workload) -> int:
    """A dispatched row between nodes (`StreamRow`): payload, scales and an entry for each top-k slot."""
    aligned = align_up(payload_bytes(workload), ROW_ALIGNMENT) + align_up(scale_bytes(workload), ROW_ALIGNMENT)
    return aligned + workload.num_topk * ROUTE_ENTRY_BYTES


def count_vector_bytes(workload: Workload) -> int:
    """What each rank tells all others before a dispatch (`CountVector`)."""
    counts = workload.num_nodes + workload.num_ranks + workload.num_experts
    return align_up(COUNT_HEADER_BYTES + counts * _WORD_BYTES, ROW_ALIGNMENT)


def count_words_bytes(workload: Workload) -> int:
    """The same within a node of GPUs: a word of 64 bits for each 32, with the epoch beside the value (`CountWord`)."""
    return 2 * count_vector_bytes(workload)
