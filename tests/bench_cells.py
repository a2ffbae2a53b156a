"""A small cell and its record, for the tests of the benchmark."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, get_args

import pytest
import reference

from deep_a2a.benchmark.cell import Cell
from deep_a2a.benchmark.record import Dtype, Layout, Record, WireBytes

LAYOUTS: tuple[Layout, ...] = get_args(Layout)
DTYPES: tuple[Dtype, ...] = get_args(Dtype)
SMALL = Cell(
    num_ranks=4, ranks_per_node=2, num_tokens=24, hidden=144, num_topk=4, num_experts=16, num_iters=1, num_warmup=0
)
RECORD = SMALL.record(
    op="dispatch",
    total_us=50.0,
    wire_bytes=WireBytes(network=1_000_000, shm=2_000_000),
    logical_bytes=4_000_000,
    ceiling_gbs=80.0,
    link_time_ratio=2.0,
    baseline="gloo",
    baseline_us=200.0,
)


def require_link(record: Record, speeds: Sequence[Mapping[str, Any]]) -> None:
    """What a record on GPUs says of the link is what was measured beside it, and fits its time and its bytes."""
    assert record.wire_bytes.nvlink > 0 and record.wire_bytes.slowest == record.wire_bytes.nvlink
    assert {speed["direction"] for speed in speeds} == {"push", "pull"}
    assert record.ceiling_gbs is not None and record.ceiling_gbs == max(speed["gbs"] for speed in speeds)
    assert record.ceiling_of is not None and record.ceiling_of.startswith("bulk pu")
    assert record.link_time_ratio == pytest.approx(
        record.total_us / (record.wire_bytes.nvlink / record.ceiling_gbs / 1e3), rel=0.05, abs=1e-3
    )


def setting_of(cell: Cell, capacity: int) -> reference.Setting:
    return reference.Setting(
        cell.num_ranks, cell.ranks_per_node, cell.num_experts, cell.num_topk, cell.layout, expert_capacity=capacity
    )
