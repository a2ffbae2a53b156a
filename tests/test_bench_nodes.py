"""The benchmark across nodes: bytes of each link counted again from the routing, ceilings, ratios, the node limit."""

from __future__ import annotations

import runpy
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import reference
import torch.distributed as dist
from bench_cells import count_by_hand, setting_of
from pool import Pool

from deep_a2a.benchmark.agreement import MeasurementError
from deep_a2a.benchmark.cell import Cell
from deep_a2a.benchmark.fabric import Fabric
from deep_a2a.benchmark.job import Job, run_job
from deep_a2a.benchmark.record import Record, ResultFile, WireBytes
from deep_a2a.benchmark.session import Session
from deep_a2a.benchmark.suites import suite
from deep_a2a.benchmark.table import format_table
from deep_a2a.benchmark.workload import Workload

BENCH = Path(__file__).parents[1] / "bench"
NODES = Cell(
    num_ranks=4, ranks_per_node=2, num_tokens=10, hidden=128, num_topk=3, num_experts=8, num_iters=1, num_warmup=1,
    baseline=False,
)  # fmt: skip
ROUTE_BYTES, COUNT_HEADER_BYTES = 16, 32
CHANGES: tuple[dict[str, Any], ...] = (
    {},
    {"dtype": "fp8", "layout": "expert"},
    {"dtype": "fp8_cast", "layout": "padded"},
    {"dtype": "fp8", "cached": True, "output": "owned", "input": "copied"},
    {"host_sync": True, "routing": "zipf"},
    {"ranks_per_node": 1, "topk_groups": 2, "baseline": True},
)


def run(group: dist.ProcessGroup, cells: Sequence[Cell]) -> tuple[ResultFile, list[str]]:
    outcome = run_job(group, Job(cells, "a test"))
    return outcome.results, list(outcome.failures)


def aligned(nbytes: int) -> int:
    return -(-nbytes // 16) * 16


def require_bytes(cell: Cell, record: Record) -> None:
    """What the record says of its bytes is what its routing asks for, and for headers what docs/protocol.md says."""
    topk_idx = Workload(cell).routing(1).topk_idx
    per_expert = cell.layout != "rank" and record.op == "dispatch"
    row = cell.hidden * 2 if record.op == "combine" else cell.row_bytes
    near, far, logical = count_by_hand(cell, topk_idx, per_expert and cell.backend == "cpu", per_expert)
    name = "shm" if cell.backend == "cpu" else "nvlink"
    assert record.wire_bytes == WireBytes(**{name: near * row, "network": far * row})
    assert record.logical_bytes == logical * row
    _, sent = reference.wire_rows(setting_of(cell, 0), topk_idx, record.op == "combine")
    assert record.network_least_bytes == sum(sent) * row > 0
    stream_row, vectors = row, 0
    if record.op == "dispatch":
        stream_row = aligned(cell.hidden * cell.bytes_per_channel) + aligned(cell.scale_bytes)
        stream_row += 0 if cell.cached else cell.num_topk * ROUTE_BYTES
        if cell.backend == "cpu" and not cell.cached:  # which counts what it tells others of its counts as well
            counts = 4 * (cell.num_nodes + cell.num_ranks + cell.num_experts)
            vectors = cell.num_ranks * (cell.num_nodes - 1) * aligned(COUNT_HEADER_BYTES + counts)
    assert record.network_put_bytes == sum(sent) * stream_row + vectors
    assert record.network_header_share == record.network_put_bytes / record.network_least_bytes - 1


def test_cells_on_the_cpu(pools: Callable[[int], Pool]) -> None:
    cells = [replace(NODES, **change) for change in CHANGES]
    (results, failures), *_ = pools(4).run(run, cells)
    assert failures == [] and len(results.records) == 2 * len(cells)
    for index, record in enumerate(results.records):
        require_bytes(cells[index // 2], record)
        assert record.network_ceiling_gbs is None and record.network_ratio is None, "it is memory like the rest"
        assert record.slowest_class == ("network" if record.wire_bytes.network > record.wire_bytes.shm else "shm")


@pytest.mark.parametrize("ranks_per_node", [1, 2])
def test_cells_on_the_emulator(pools: Callable[[int], Pool], ranks_per_node: int) -> None:
    """2 nodes of 1 and of 2 ranks: bytes, and ceilings that were measured and that ratios are of."""
    pytest.importorskip("deep_a2a._emulated", reason="the emulator was not built")
    base = replace(NODES, num_ranks=2 * ranks_per_node, ranks_per_node=ranks_per_node, backend="emulated", num_sms=1)
    cells = [replace(base, **change) for change in CHANGES[:5]] + [replace(base, num_sms=None, stream="current")]
    (results, failures), *others = pools(base.num_ranks).run(run, cells)
    assert failures == [] and len(results.records) == 2 * len(cells)
    assert all(other.records == results.records for other, _ in others)
    speeds = results.machine["network"]
    assert [speed["num_sms"] for speed in speeds] == [1, 2]
    assert all(speed["gbs"] > 0 and speed["ranks_per_node"] == ranks_per_node for speed in speeds)
    assert len(results.machine.get("link", [])) == (0 if ranks_per_node == 1 else 4)
    ceiling = max(speed["gbs"] for speed in speeds)
    for index, record in enumerate(results.records):
        cell = cells[index // 2]
        require_bytes(cell, record)
        assert record.checked and record.network_ceiling_gbs == ceiling
        assert record.network_ceiling_of is not None and record.network_ceiling_of.startswith("puts by ")
        assert record.network_ceiling_at_sms_gbs == (None if cell.num_sms is None else speeds[0]["gbs"])
        network_us = record.wire_bytes.network / ceiling / 1e3
        node_us = record.wire_bytes.nvlink / (record.ceiling_gbs or 1.0) / 1e3
        assert record.network_ratio == pytest.approx(record.total_us / network_us, rel=1e-3, abs=2e-3)
        assert record.link_time_ratio == pytest.approx(
            record.total_us / max(network_us, node_us), rel=1e-3, abs=2e-3
        )  # fmt: skip
        assert record.network_gbs == record.wire_bytes.network / record.total_us / 1e3
        assert (record.ceiling_gbs is None) is (ranks_per_node == 1)


def test_node_limit(pools: Callable[[int], Pool]) -> None:
    """Fewer nodes per token, fewer bytes: as counted from the routing, which keeps to the limit."""
    base = replace(NODES, ranks_per_node=1, num_tokens=60, num_topk=4, num_experts=16, num_iters=1)
    cells = [replace(base, topk_groups=limit) for limit in (1, 2, 3, 4)] + [base]
    (results, failures), *_ = pools(4).run(run, cells)
    assert failures == []
    dispatches = results.records[::2]
    for cell, record in zip(cells, dispatches, strict=True):
        require_bytes(cell, record)
        assert record.topk_groups == cell.topk_groups
        nodes = (Workload(cell).routing(1).topk_idx[0] // 4).sort(dim=1).values.diff(dim=1).ne(0).sum(dim=1) + 1
        assert int(nodes.max()) == (cell.topk_groups or 4)
    least = [record.network_least_bytes or 0 for record in dispatches]
    assert least[0] < least[1] < least[2] <= least[3] == least[4]


def test_several_splits_in_one_run(pools: Callable[[int], Pool]) -> None:
    """One node, two, four: each has gates and ceilings of its own."""
    pytest.importorskip("deep_a2a._emulated", reason="the emulator was not built")
    base = replace(NODES, backend="emulated", num_sms=1, num_warmup=0, layout="expert")
    cells = [replace(base, ranks_per_node=size) for size in (4, 1, 2)]
    (results, failures), *_ = pools(4).run(run, cells)
    assert failures == []
    assert [record.num_nodes for record in results.records] == [1, 1, 4, 4, 2, 2]
    for record in results.records:
        assert (record.network_ceiling_gbs is None) is (record.num_nodes == 1)
        assert record.network_put_bytes is None if record.num_nodes == 1 else record.network_put_bytes
    assert {speed.get("ranks_per_node") for speed in results.machine["link"]} == {None, 2}
    assert {speed["ranks_per_node"] for speed in results.machine["network"]} == {1, 2}


def refused_then_run(group: dist.ProcessGroup) -> tuple[list[str], int]:
    base = replace(NODES, num_ranks=2, ranks_per_node=1, backend="emulated", num_sms=1)
    results, failures = run(group, [replace(base, num_sms=4000), base])
    return failures, len(results.records)


def test_refused_cell_costs_only_itself(pools: Callable[[int], Pool]) -> None:
    pytest.importorskip("deep_a2a._emulated", reason="the emulator was not built")
    for failures, num_records in pools(2).run(refused_then_run):
        assert len(failures) == 1 and "num_sms" in failures[0] and num_records == 2


class Absent:
    """The meter of a rank that does not come to the gate."""

    def hold(self, stream: int) -> None:
        raise OSError("gone")

    def open(self) -> None:
        pass

    def late(self) -> bool:
        return False


def miss_the_gate(group: dist.ProcessGroup) -> str:
    """Rank 1 does, once; the other gives up by its deadline, and a new gate works."""
    session = Session(group, "emulated")
    fabric = Fabric(group, session.place, ranks_per_node=1, timeout_s=1.0)
    if session.rank == 1:
        fabric.gate.meter = Absent()
    with pytest.raises(MeasurementError) as caught:
        fabric.gate.measure(lambda stream: None)
    assert fabric.renew_gate() is fabric.gate and fabric.gate.measure(lambda stream: None) > 0
    session.close()
    return str(caught.value)


def test_gate_has_a_deadline(fresh_pool: Callable[..., Pool]) -> None:
    pytest.importorskip("deep_a2a._emulated", reason="the emulator was not built")
    message = "rank 0: TimeoutError: the gate gave up: some rank's stream did not come in time; rank 1: OSError: gone"
    assert fresh_pool(2).run(miss_the_gate) == [message] * 2


def other_hosts(group: dist.ProcessGroup, backend: Any) -> str:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("deep_a2a.benchmark.hosts.host_identity", lambda: f"host {dist.get_rank(group)}")
        with pytest.raises(ValueError) as caught:
            Session(group, backend)
    return str(caught.value)


def test_one_host_only(pools: Callable[[int], Pool]) -> None:
    for message in pools(2).run(other_hosts, "cpu"):
        assert message == "backend is cpu, but the ranks are on 2 hosts; expected one"


def test_suite() -> None:
    """Every number of SMs, and every node limit that there is, up to 8."""
    for num_ranks, ranks_per_node, shape, limits in (
        (4, None, (2, 2), [1, 2]), (4, 4, (2, 2), [1, 2]), (4, 1, (4, 1), [1, 2, 3, 4]), (3, None, (3, 1), [1, 2, 3]),
        (32, 2, (16, 2), [*range(1, 9)]),
    ):  # fmt: skip
        cells = suite("nodes", "cuda", num_ranks, ranks_per_node)
        assert {(cell.num_nodes, cell.ranks_per_node) for cell in cells} == {shape}
        for dtype in ("fp8", "bf16"):
            of = [cell for cell in cells if cell.dtype == dtype]
            assert sorted(cell.topk_groups for cell in of if cell.topk_groups is not None) == limits
            for layout in ("rank", "expert"):
                assert {cell.num_sms for cell in of if cell.layout == layout} == {4, 8, 12, 16, 24}
    with pytest.raises(ValueError, match="num_ranks is 1; expected 2 or more"):
        suite("nodes", "cuda", 1)


def test_command_of_the_suite(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("deep_a2a._emulated", reason="the emulator was not built")
    monkeypatch.setattr("deep_a2a.benchmark.suites.SUITES", {"nodes": lambda base: [replace(base, topk_groups=1)]})
    main = runpy.run_path(str(BENCH / "run_gpu.py"))["main"]
    path = tmp_path / "mine.json"
    arguments = f"nodes --backend emulated --num-ranks 4 --ranks-per-node 1 --json {path}"
    assert main(arguments.split()) == 0
    results = ResultFile.read(path)
    assert results.command == f"python bench/run_gpu.py {arguments}"
    assert [(record.num_nodes, record.topk_groups) for record in results.records] == [(4, 1), (4, 1)]
    assert format_table(results.records) in capsys.readouterr().out
