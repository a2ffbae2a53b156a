"""A small cell and its record, for the tests of the benchmark."""

from __future__ import annotations

from typing import get_args

import reference

from deep_a2a.benchmark.cell import Cell
from deep_a2a.benchmark.record import Dtype, Layout, WireBytes

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


def setting_of(cell: Cell, capacity: int) -> reference.Setting:
    return reference.Setting(
        cell.num_ranks, cell.ranks_per_node, cell.num_experts, cell.num_topk, cell.layout, expert_capacity=capacity
    )
