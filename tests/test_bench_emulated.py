"""The benchmark of the CUDA backend, run by the emulator: times mean nothing, everything else has to be there."""

from __future__ import annotations

import itertools
import runpy
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from bench_cells import require_link
from pool import Pool

from deep_a2a.benchmark.agreement import MeasurementError
from deep_a2a.benchmark.cell import Cell
from deep_a2a.benchmark.contenders import BufferContender
from deep_a2a.benchmark.job import Job, run_job
from deep_a2a.benchmark.link import measure_link
from deep_a2a.benchmark.place import Place
from deep_a2a.benchmark.record import ResultFile
from deep_a2a.benchmark.session import Session
from deep_a2a.benchmark.stream_gate import Enqueue, StreamGate
from deep_a2a.benchmark.suites import SUITES, suite

pytest.importorskip("deep_a2a._emulated", reason="the emulator was not built")

RUN_GPU = Path(__file__).parents[1] / "bench" / "run_gpu.py"
TINY = Cell(
    backend="emulated", num_ranks=2, ranks_per_node=2, num_tokens=6, hidden=128, num_topk=2, num_experts=8, num_sms=2,
    num_iters=2, num_warmup=1,
)  # fmt: skip


def measure(group: dist.ProcessGroup, cells: list[Cell], path: Path) -> tuple[ResultFile, list[str]]:
    outcome = run_job(group, Job(cells, "a test", path))
    return outcome.results, list(outcome.failures)


def test_cells(pools: Callable[[int], Pool], tmp_path: Path) -> None:
    """Records of both operations, complete and checked, and the same on every rank and in the file."""
    changes: list[dict[str, Any]] = [
        {},
        {"layout": "expert", "dtype": "fp8", "cached": True},
        {"layout": "padded", "dtype": "fp8_cast", "output": "owned", "input": "copied", "num_sms": 1},
        {"stream": "current", "layout": "padded", "num_sms": None},
        {"routing": "zipf", "host_sync": True, "scale_format": "ue8m0", "dtype": "fp8", "baseline": False},
    ]
    cells = [replace(TINY, **change) for change in changes]
    (results, failures), (others, _) = pools(2).run(measure, cells, tmp_path / "results.json")
    assert failures == [] and results == replace(others, date=results.date) == ResultFile.read(
        tmp_path / "results.json"
    )
    assert len(results.records) == 2 * len(cells)
    for index, record in enumerate(results.records):
        cell = cells[index // 2]
        assert record.op == ("dispatch", "combine")[index % 2] and record.checked and record.num_gpus is None
        assert (record.backend, record.layout) == ("emulated", cell.layout)
        assert (record.num_sms, record.stream) == (cell.num_sms, cell.stream)
        require_link(record, results.machine["link"])
        assert (record.baseline_us is not None) is cell.baseline


def test_overlap(pools: Callable[[int], Pool], tmp_path: Path) -> None:
    cell = replace(TINY, subject="overlap", gemm_rows=24, gemm_channels=16, gemm_leaves=2)
    (results, failures), _ = pools(2).run(measure, [cell], tmp_path / "results.json")
    assert failures == []
    (record,) = results.records
    assert record.op == "overlap" and record.checked and record.both_us == record.total_us
    assert record.gemm is not None and "x [24, 128] @ [128, 16] bf16, told to leave 2 SMs" in record.gemm
    assert record.share_hidden is not None and record.gemm_slowdown is not None


def measure_wrongly(group: dist.ProcessGroup, cells: list[Cell], path: Path) -> tuple[ResultFile, list[str]]:
    """Rank 1 sees one bit of its first combine turned over."""

    class Wrong(BufferContender):
        times = 0

        def combined(self) -> torch.Tensor:
            rows = super().combined()
            if dist.get_rank(group) == 1 and Wrong.times == 0:
                rows.view(torch.int16)[3, 5] ^= 1
            Wrong.times += 1
            return rows

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("deep_a2a.benchmark.measure.BufferContender", Wrong)
        return measure(group, cells, path)


def test_wrong_result_costs_only_its_cell(pools: Callable[[int], Pool], tmp_path: Path) -> None:
    cells = [TINY, replace(TINY, layout="expert")]
    for results, failures in pools(2).run(measure_wrongly, cells, tmp_path / "results.json"):
        assert len(failures) == 1 and "rank 1: ValueError: combined rows: row 3 is not that of token 3" in failures[0]
        assert [record.layout for record in results.records] == ["expert", "expert"]


def fail_behind_the_gate(group: dist.ProcessGroup) -> list[str]:
    """What a rank raises when rank 1 fails, and that the gate still works."""
    session = Session(group, "emulated")
    session.open()
    gate = session.fabrics[2].gate

    def fail(stream: int) -> None:
        if session.rank == 1:
            raise KeyError("lost")

    with pytest.raises(MeasurementError) as caught:
        gate.measure(fail)
    assert gate.measure(lambda stream: None) > 0
    session.close()
    return [str(caught.value)]


def test_failure_reaches_every_rank(pools: Callable[[int], Pool]) -> None:
    assert pools(2).run(fail_behind_the_gate) == [["rank 1: KeyError: 'lost'"]] * 2


def test_refused_cell_costs_only_itself(pools: Callable[[int], Pool], tmp_path: Path) -> None:
    cells = [replace(TINY, num_sms=4000), TINY]
    for results, failures in pools(2).run(measure, cells, tmp_path / "results.json"):
        assert len(failures) == 1 and "num_sms" in failures[0] and "4000" in failures[0]
        assert len(results.records) == 2


def link_of_one_gpu(group: dist.ProcessGroup) -> str:
    session = Session(group, "emulated")
    session.open()
    gate = session.fabrics[2].gate
    meter: Any = gate.meter
    link = measure_link(gate, meter, 1, replace(session.place, num_gpus=1), 7168, [1])
    session.close()
    assert link is not None
    return link.describe()


def test_ceiling_says_that_ranks_share_a_gpu(pools: Callable[[int], Pool]) -> None:
    for text in pools(2).run(link_of_one_gpu):
        assert text.endswith("; 2 ranks share 1 GPU(s), so this is their memory too")


def measure_without_baseline(group: dist.ProcessGroup, cells: list[Cell], path: Path) -> tuple[ResultFile, list[str]]:
    def fail(*_: object) -> None:
        raise RuntimeError("no such library")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("deep_a2a.benchmark.alltoall.AllToAll.dispatch", fail)
        return measure(group, cells, path)


def test_broken_baseline_costs_no_figure(pools: Callable[[int], Pool], tmp_path: Path) -> None:
    for results, failures in pools(2).run(measure_without_baseline, [TINY, TINY], tmp_path / "results.json"):
        assert failures == [] and len(results.records) == 4
        assert all(record.checked and record.baseline_us is None for record in results.records)


class Script:
    """A meter and a stopwatch that write down what is asked of them."""

    enqueue: tuple[Enqueue, ...] = ("held", "released")
    stream = 5

    def __init__(self) -> None:
        self.lines: list[str] = []

    def __getattr__(self, name: str) -> Callable[..., Any]:
        return lambda *_: self.lines.append(name)

    def late(self) -> bool:
        return "hold" not in self.lines

    def microseconds(self) -> float:
        return float(len(self.lines))


def order_of(group: dist.ProcessGroup, enqueue: Enqueue) -> tuple[list[str], float]:
    script: Any = Script()
    gate = StreamGate(group, Place("emulated", torch.device("cpu"), None), script)
    gate._watch = script
    return script.lines, gate.measure(lambda stream: script.lines.append(f"operation on {stream}"), enqueue)


@pytest.mark.parametrize(
    ("enqueue", "order"),
    [
        ("held", ["hold", "start", "operation on 5", "stop", "open"]),
        ("released", ["hold", "open", "start", "operation on 5", "stop"]),
    ],
)
def test_what_comes_behind_the_gate(pools: Callable[[int], Pool], enqueue: Enqueue, order: list[str]) -> None:
    assert pools(2).run(order_of, enqueue) == [(order, 5.0)] * 2


@pytest.mark.parametrize("name", SUITES)
def test_suites(name: str) -> None:
    """Valid cells, at least 20 iterations where times count; small ones for the emulator."""
    on_gpus, emulated = suite(name, "cuda", 4), suite(name, "emulated", 4)
    assert on_gpus and emulated and len(set(on_gpus)) == len(on_gpus)
    assert all(cell.num_iters >= 20 and cell.checked and cell.num_experts == 256 for cell in on_gpus)
    assert all(cell.num_tokens * cell.hidden < 2**14 and not cell.graph for cell in emulated)
    assert {cell.num_experts for cell in suite(name, "cuda", 3)} == {255}


def test_sweep_has_what_is_reported() -> None:
    """At 4096 tokens: cached or not, and skewed, at every number of SMs, and a baseline beside both payloads."""
    cells = [cell for cell in suite("sweep", "cuda", 4) if cell.num_tokens == 4096 and cell.layout != "padded"]
    sms = (4, 8, 12, 16, 24)
    for layout, dtype in itertools.product(("rank", "expert"), ("bf16", "fp8")):
        these = [cell for cell in cells if (cell.layout, cell.dtype) == (layout, dtype)]
        for cached in (False, True):
            assert {cell.num_sms for cell in these if cell.cached == cached} == set(sms)
        assert any(cell.baseline for cell in these)
        if dtype == "fp8":
            assert {cell.num_sms for cell in these if cell.routing == "zipf"} == set(sms)


def test_command_of_suites(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """One file a suite; progress with times goes to stderr, tables to stdout."""
    main = runpy.run_path(str(RUN_GPU))["main"]
    path = tmp_path / "mine.json"
    assert main(["overlap", "--backend", "emulated", "--num-ranks", "2", "--json", str(path)]) == 0
    results = ResultFile.read(path)
    assert results.command.startswith("python bench/run_gpu.py overlap --backend emulated")
    assert [record.op for record in results.records] == ["overlap"] * len(suite("overlap", "emulated", 2))
    assert all(record.checked for record in results.records)
    assert "gemm slower by" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        main(["everything"])
    assert "SUITE is 'everything'; expected one of targets, sweep, overlap, nodes" in capsys.readouterr().err
