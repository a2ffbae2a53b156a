"""Bytes that the benchmark says an operation moves: counted again by hand, and by the cpu backend."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
import torch.distributed as dist
from bench_cells import DTYPES, LAYOUTS, SMALL, count_by_hand
from pool import Pool

from deep_a2a import Buffer
from deep_a2a.benchmark.cell import Cell
from deep_a2a.benchmark.record import Dtype, Layout, WireBytes
from deep_a2a.benchmark.traffic import combine_traffic, dispatch_traffic
from deep_a2a.benchmark.workload import Workload
from deep_a2a.routing import KINDS


def test_rows_cross_to_a_gpu_once() -> None:
    """Rows by expert are doubled where they arrive: they cost the link what rows by rank do."""
    cell = replace(SMALL, backend="cuda", ranks_per_node=4, routing="zipf")
    topk_idx = Workload(cell).routing(0).topk_idx
    for layout in LAYOUTS:
        moved = dispatch_traffic(replace(cell, layout=layout), topk_idx)
        assert moved == dispatch_traffic(cell, topk_idx)
        assert moved.wire.nvlink == dispatch_traffic(replace(cell, backend="cpu"), topk_idx).wire.shm > 0
        assert moved.wire.shm == moved.wire.network == 0


@pytest.mark.parametrize("routing", KINDS)
@pytest.mark.parametrize(("num_ranks", "ranks_per_node"), [(1, 1), (4, 4), (4, 2), (4, 1), (6, 3)])
def test_traffic(routing: str, num_ranks: int, ranks_per_node: int) -> None:
    for layout, dtype in itertools.product(LAYOUTS, DTYPES[:2]):
        cell = replace(
            SMALL, num_ranks=num_ranks, ranks_per_node=ranks_per_node, num_experts=24, num_topk=3, layout=layout,
            dtype=dtype, routing=routing if num_ranks > 1 else "uniform",
        )  # fmt: skip
        topk_idx = Workload(cell).routing(0).topk_idx
        topk_idx[0][::3, 1] = -1
        near, far, logical = count_by_hand(cell, topk_idx, layout != "rank", layout != "rank")
        row_bytes = 2 * 144 if dtype == "bf16" else 144 + 2 * 4
        dispatch = dispatch_traffic(cell, topk_idx)
        assert dispatch.wire == WireBytes(network=far * row_bytes, shm=near * row_bytes)
        assert dispatch.logical_bytes == logical * row_bytes
        near, far, logical = count_by_hand(cell, topk_idx, False, False)
        combine = combine_traffic(cell, topk_idx)
        assert combine.wire == WireBytes(network=far * 288, shm=near * 288)
        assert combine.logical_bytes == logical * 288


def moved_bytes(group: dist.ProcessGroup, cell: Cell) -> tuple[list[dict[str, int]], list[torch.Tensor]]:
    """What the buffer says it moved in a dispatch and in a combine."""
    rank, work = dist.get_rank(group), Workload(cell)
    routed = work.routing(0)
    with Buffer(
        group, hidden=cell.hidden, num_experts=cell.num_experts, num_topk=cell.num_topk,
        num_max_tokens_per_rank=cell.num_tokens, ranks_per_node=cell.ranks_per_node, layout=cell.layout,
    ) as buffer:  # fmt: skip
        x, scales = work.input(0, rank)
        result = buffer.dispatch(x if scales is None else (x, scales), routed.topk_idx[rank], routed.topk_weights[rank])
        after_dispatch = buffer.wire_bytes
        buffer.combine(torch.zeros(*result.x.shape, dtype=torch.bfloat16), result.handle)
        after_combine = {name: count - after_dispatch[name] for name, count in buffer.wire_bytes.items()}
        result.release()
        dist.barrier(group=group)
    return [after_dispatch, after_combine], routed.topk_idx


@pytest.mark.parametrize("dtype", ["bf16", "fp8"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_traffic_is_what_the_backend_moves(pools: Callable[[int], Pool], layout: Layout, dtype: Dtype) -> None:
    """All rows to one rank, so that the busiest rank's bytes follow from what the ranks count for themselves.

    A rank row of dispatch brings its routing, which the backend counts and `traffic` does not: expert and weight of
    each top-k slot; where rows are per expert, its row as well and one more word; in whole 16 bytes.
    """
    cell = replace(SMALL, layout=layout, dtype=dtype, routing="all_to_one_rank", ranks_per_node=4)
    by_rank = pools(4).run(moved_bytes, cell)
    topk_idx = by_rank[0][1]
    for step, traffic in enumerate((dispatch_traffic(cell, topk_idx), combine_traffic(cell, topk_idx))):
        counted = [moved[step] for moved, _ in by_rank]
        words = 2 * cell.num_topk if layout == "rank" else 3 * cell.num_topk + 1
        routing_bytes = -(-4 * words // 16) * 16 * 3 * cell.num_tokens if step == 0 else 0
        assert sum(count["shm"] for count in counted) == traffic.wire.shm + routing_bytes
        assert sum(count["network"] for count in counted) == traffic.wire.network == 0
