"""A small cell, its record, and its bytes counted by hand, for the tests of the benchmark."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any, get_args

import pytest
import reference
import torch

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


def count_by_hand(
    cell: Cell, topk_idx: list[torch.Tensor], per_expert: bool, relayed_per_expert: bool
) -> tuple[int, int, int]:
    """Rows at the busiest rank: within nodes, between nodes, and received with own rows counted.

    Rows go to a rank once, or `per_expert`; those that come from other nodes may differ.
    """
    near: dict[str, Counter[int]] = {"sent": Counter(), "received": Counter()}
    far: dict[str, Counter[int]] = {"sent": Counter(), "received": Counter()}
    logical: Counter[int] = Counter()
    for source, idx in enumerate(topk_idx):
        for experts in idx.tolist():
            owners = [expert // cell.num_local_experts for expert in experts if expert >= 0]
            for node in {owner // cell.ranks_per_node for owner in owners}:
                writer = node * cell.ranks_per_node + source % cell.ranks_per_node
                if writer != source:
                    far["sent"][source] += 1
                    far["received"][writer] += 1
                logical.update(o for o in (owners if per_expert else set(owners)) if o // cell.ranks_per_node == node)
                for owner in owners if (per_expert if writer == source else relayed_per_expert) else set(owners):
                    if owner // cell.ranks_per_node == node and owner != writer:
                        near["sent"][writer] += 1
                        near["received"][owner] += 1
    most = [max([0, *counts["sent"].values(), *counts["received"].values()]) for counts in (near, far)]
    return most[0], most[1], max([0, *logical.values()])


def setting_of(cell: Cell, capacity: int) -> reference.Setting:
    return reference.Setting(
        cell.num_ranks, cell.ranks_per_node, cell.num_experts, cell.num_topk, cell.layout, expert_capacity=capacity
    )
