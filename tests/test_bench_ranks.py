"""Cells measured on ranks: complete records, checked, baseline and all; and that a wrong result is noticed."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import asdict, replace
from typing import Any, get_args

import pytest
import reference
import torch
import torch.distributed as dist
from bench_cells import DTYPES, LAYOUTS, SMALL, setting_of
from pool import Pool

from deep_a2a.benchmark import plain
from deep_a2a.benchmark.agreement import MeasurementError
from deep_a2a.benchmark.alltoall import AllToAll
from deep_a2a.benchmark.cell import Cell
from deep_a2a.benchmark.contenders import AllToAllContender, BufferContender, Counting
from deep_a2a.benchmark.measure import CellRun
from deep_a2a.benchmark.record import Layout
from deep_a2a.benchmark.session import Session
from deep_a2a.benchmark.workload import Workload
from deep_a2a.routing import KINDS


def run_cells_plainly(group: dist.ProcessGroup, cells: list[Cell]) -> list[dict[str, Any]]:
    session = Session(group, "cpu")
    session.open()
    return [asdict(record) for cell in cells for record in CellRun(session, cell).run()]


def test_cells_of_all_kinds(pools: Callable[[int], Pool]) -> None:
    """Buffer and baseline in every layout and payload; `checked` cells raise if either is wrong."""
    cells = [replace(SMALL, layout=layout, dtype=dtype) for layout, dtype in itertools.product(LAYOUTS, DTYPES)]
    cells += [
        replace(SMALL, layout=layout, cached=True, output="owned", input="copied", host_sync=host_sync)
        for layout, host_sync in itertools.product(LAYOUTS, (False, True))
    ]
    cells += [
        replace(SMALL, layout=layout, routing=routing, dtype="fp8", scale_format="ue8m0", ranks_per_node=4)
        for layout, routing in zip(itertools.cycle(LAYOUTS), KINDS, strict=False)
    ]
    cells += [replace(SMALL, ranks_per_node=1, topk_groups=2, num_iters=3, num_warmup=1)]
    cells += [replace(SMALL, checked=False, baseline=False)]
    by_rank = pools(4).run(run_cells_plainly, cells)
    for index, cell in enumerate(cells):
        for record, op in zip(by_rank[0][2 * index : 2 * index + 2], ("dispatch", "combine"), strict=True):
            assert record["op"] == op and record["layout"] == cell.layout and record["total_us"] > 0
            assert record["checked"] is cell.checked
            assert (record["baseline_us"] is None) is not cell.baseline
            assert record["output"] == (cell.output if op == "dispatch" else "owned")
    assert by_rank[0] == by_rank[3]


def wrong_combine(group: dist.ProcessGroup) -> None:
    class Wrong(BufferContender):
        def combined(self) -> torch.Tensor:
            rows = super().combined()
            return rows.roll(1, dims=0) if dist.get_rank(group) == 1 else rows

    session = Session(group, "cpu")
    session.open()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("deep_a2a.benchmark.measure.BufferContender", Wrong)
        with pytest.raises(MeasurementError, match="rank 1: ValueError: combined rows: row 0 is not"):
            CellRun(session, SMALL).run()
    CellRun(session, SMALL).run()  # no rank has gone ahead


def test_wrong_result_is_noticed(pools: Callable[[int], Pool]) -> None:
    pools(4).run(wrong_combine)


def dispatch_by_gloo(
    group: dist.ProcessGroup, cell: Cell, capacity: int, counting: Counting
) -> dict[str, torch.Tensor | None]:
    rank, work = dist.get_rank(group), Workload(cell)
    routed = work.routing(0)
    exchange = AllToAll(group, group, cell, capacity * cell.num_local_experts, capacity, torch.device("cpu"))
    contender = AllToAllContender(exchange, cell, counting)
    contender.load(work.input(0, rank), routed.topk_idx[rank], routed.topk_weights[rank])
    contender.dispatch()
    got = contender.delivered()
    places = plain.row_places(cell, plain.received_rows(cell, routed, rank), capacity)
    return {
        "rows": got.rows.flatten(0, -2)[places],
        "topk_idx": got.topk_idx,
        "topk_weights": got.topk_weights,
    }


@pytest.mark.parametrize("counting", get_args(Counting))
@pytest.mark.parametrize("layout", LAYOUTS)
def test_baseline_agrees_with_oracle(pools: Callable[[int], Pool], layout: Layout, counting: Counting) -> None:
    cell = replace(SMALL, layout=layout)
    work = Workload(cell)
    routed = work.routing(0)
    payload = [work.input(0, source)[0] for source in range(cell.num_ranks)]
    want = reference.dispatch(setting_of(cell, 96), payload, None, routed.topk_idx, routed.topk_weights)
    for got, expected in zip(pools(4).run(dispatch_by_gloo, cell, 96, counting), want, strict=True):
        assert torch.equal(got["rows"], expected.x[expected.row_tokens >= 0])
        assert torch.equal(got["topk_idx"], expected.topk_idx)
        assert torch.equal(got["topk_weights"], expected.topk_weights)
