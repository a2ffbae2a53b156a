"""The benchmark: its record, its bytes, its data, its baseline, and that it notices a wrong result."""

from __future__ import annotations

import itertools
import json
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, get_args

import pytest
import reference
import torch
import torch.distributed as dist
from pool import Pool

from deep_a2a import Buffer
from deep_a2a.benchmark import command, gloo, plain
from deep_a2a.benchmark.ceiling import CopyCeiling
from deep_a2a.benchmark.cell import Cell
from deep_a2a.benchmark.clock import Gate
from deep_a2a.benchmark.contenders import BufferContender, GlooContender
from deep_a2a.benchmark.launcher import run_ranks
from deep_a2a.benchmark.measure import CellRun
from deep_a2a.benchmark.record import Dtype, Layout, Record, ResultFile, WireBytes
from deep_a2a.benchmark.table import LEGEND, format_table
from deep_a2a.benchmark.traffic import combine_traffic, dispatch_traffic
from deep_a2a.benchmark.workload import Workload, expert_output
from deep_a2a.routing import KINDS

RESULTS = Path(__file__).parents[1] / "bench" / "results"
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


# ---- records -----------------------------------------------------------------------------------------------------


def test_record_figures() -> None:
    assert RECORD.speedup == 4.0
    assert RECORD.logical_gbs == 80.0
    assert RECORD.wire_bytes.total == 3_000_000 and RECORD.wire_bytes.slowest == 2_000_000


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"op": "reduce"}, "op is 'reduce'; expected one of dispatch, combine, overlap"),
        ({"dtype": "fp4"}, "dtype is 'fp4'"),
        ({"layout": "rows"}, "layout is 'rows'"),
        ({"total_us": 0.0}, "total_us is 0.0; expected a positive number"),
        ({"kernel_us": float("nan")}, "kernel_us is nan"),
        ({"num_topk": 0}, "num_topk is 0; expected an integer, 1 or more"),
        ({"logical_bytes": 1.5}, "logical_bytes is 1.5"),
        ({"ranks_per_node": 3}, "ranks_per_node is 3; expected a divisor of num_ranks=4"),
        ({"baseline_us": None}, "baseline is 'gloo', baseline_us is None; expected both or neither"),
        ({"scale_format": "float32"}, "scale_format is 'float32' with dtype bf16"),
        ({"dtype": "fp8"}, "scale_format is None with dtype fp8"),
        ({"both_us": 3.0}, r"overlap fields \['both_us'\]; expected \[\]"),
        ({"op": "overlap"}, r"overlap fields \[\]; expected \['gemm_alone_us'"),
    ],
)
def test_bad_record(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        replace(RECORD, **change)


def test_bad_wire_bytes() -> None:
    with pytest.raises(ValueError, match=r"wire_bytes.shm is -1; expected a number of bytes"):
        WireBytes(shm=-1)


def test_result_file_round_trip(tmp_path: Path) -> None:
    overlap = replace(RECORD, op="overlap", gemm_alone_us=10.0, gemm_beside_us=12.0, comm_alone_us=30.0, both_us=35.0)
    cuda = replace(RECORD, backend="cuda", num_sms=12, kernel_us=40.0, graph=True, dtype="fp8", scale_format="ue8m0")
    written = ResultFile({"cpu": "some"}, "a command", "2026-01-02T03:04:05+00:00", (RECORD, overlap, cuda))
    written.write(tmp_path / "new folder" / "results.json")
    assert ResultFile.read(tmp_path / "new folder" / "results.json") == written
    raw = json.loads((tmp_path / "new folder" / "results.json").read_text())
    assert list(raw) == ["machine", "command", "date", "records"]
    assert raw["records"][0]["wire_bytes"] == {"nvlink": 0, "network": 1_000_000, "shm": 2_000_000}
    assert "both_us" not in raw["records"][0] and raw["records"][1]["both_us"] == 35.0


def test_record_from_json_names_fields() -> None:
    values = RECORD.to_json()
    del values["op"]
    with pytest.raises(ValueError, match=r"unknown fields \['colour'\] and lacks \['op'\]"):
        Record.from_json({**values, "colour": "red"})


def test_kept_results_are_worth_quoting() -> None:
    """Every result file in the repository: valid records of at least 20 iterations, all of them checked."""
    for path in RESULTS.glob("*.json"):
        if path.name == "published.json":
            continue
        records = ResultFile.read(path).records
        assert records, path
        assert all(record.checked and record.num_iters >= 20 for record in records), path


def test_published_figures_have_sources() -> None:
    figures = json.loads((RESULTS / "published.json").read_text())["figures"]
    assert figures
    for figure in figures:
        assert figure["source"] and figure["package"] and figure["machine"], figure


def test_table() -> None:
    head, rule, first, second = format_table([RECORD, replace(RECORD, baseline=None, baseline_us=None)]).splitlines()
    assert set(rule) == {"-", " "}
    for column, value in (("total us", "50"), ("baseline us", "200"), ("speed-up", "4.00"), ("GB/s", "80.00")):
        end = head.index(column) + len(column)
        assert first[:end].endswith(f" {value}"), column
    assert "network 1.0 MB, shm 2.0 MB" in first and "2x2" in first
    assert second.split()[-4:] == ["-", "80.00", "2.00", "yes"]


# ---- bytes -------------------------------------------------------------------------------------------------------


def count_by_hand(cell: Cell, topk_idx: list[torch.Tensor], per_expert: bool) -> tuple[int, int, int]:
    """Rows at the busiest rank: within nodes, between nodes, and received with own rows counted."""
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
                for owner in owners if per_expert else set(owners):
                    if owner // cell.ranks_per_node == node:
                        logical[owner] += 1
                        if owner != writer:
                            near["sent"][writer] += 1
                            near["received"][owner] += 1
    most = [max([0, *counts["sent"].values(), *counts["received"].values()]) for counts in (near, far)]
    return most[0], most[1], max([0, *logical.values()])


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
        near, far, logical = count_by_hand(cell, topk_idx, per_expert=layout != "rank")
        row_bytes = 2 * 144 if dtype == "bf16" else 144 + 2 * 4
        dispatch = dispatch_traffic(cell, topk_idx)
        assert dispatch.wire == WireBytes(network=far * row_bytes, shm=near * row_bytes)
        assert dispatch.logical_bytes == logical * row_bytes
        near, far, logical = count_by_hand(cell, topk_idx, per_expert=False)
        combine = combine_traffic(cell, topk_idx)
        assert combine.wire == WireBytes(network=far * 288, shm=near * 288)
        assert combine.logical_bytes == logical * 288


# ---- data and the plain computation ------------------------------------------------------------------------------


def test_workload_is_repeatable_and_fresh() -> None:
    work, again = Workload(SMALL), Workload(SMALL)
    assert torch.equal(work.input(3, 1)[0], again.input(3, 1)[0])
    assert torch.equal(work.routing(3).topk_idx[1], again.routing(3).topk_idx[1])
    for other in (work.input(4, 1), work.input(3, 2), (work.expert_base(3, 1), None), Workload(
        replace(SMALL, seed=1)).input(3, 1)):  # fmt: skip
        assert not torch.equal(work.input(3, 1)[0], other[0])
    assert not torch.equal(work.routing(3).topk_idx[1], work.routing(4).topk_idx[1])
    cached = Workload(replace(SMALL, cached=True))
    assert torch.equal(cached.routing(3).topk_idx[1], cached.routing(4).topk_idx[1])
    assert not torch.equal(cached.input(3, 1)[0], cached.input(4, 1)[0])


def test_workload_values() -> None:
    cell = replace(SMALL, num_tokens=200)
    magnitude = Workload(cell).input(0, 0)[0].float().abs()
    assert 2**-7 <= magnitude.min() < 2**-6 and 1 < magnitude.max() < 2
    rows, scales = Workload(replace(cell, dtype="fp8", scale_format="ue8m0")).input(0, 0)
    assert rows.dtype == torch.float8_e4m3fn and not rows.float().isnan().any() and rows.float().abs().max() > 200
    assert scales is not None and scales.dtype == torch.uint8 and scales.shape == (200, 2)


def test_expert_output_tells_experts_apart() -> None:
    base = Workload(SMALL).expert_base(0, 0)[:1]
    rows = [expert_output(base, expert) for expert in range(256)]
    assert len({bytes(row.view(torch.uint8).flatten().tolist()) for row in rows}) > 200
    magnitude = torch.cat(rows).float().abs()
    assert magnitude.min() >= 2**-7 and magnitude.max() < 2
    together = expert_output(base.expand(256, -1), torch.arange(256))
    assert torch.equal(torch.cat(rows).view(torch.int16), together.view(torch.int16))


def setting_of(cell: Cell, capacity: int) -> reference.Setting:
    return reference.Setting(
        cell.num_ranks, cell.ranks_per_node, cell.num_experts, cell.num_topk, cell.layout, expert_capacity=capacity
    )


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("routing", ["uniform", "none_to_rank"])
def test_plain_computation_agrees_with_oracle(layout: Layout, routing: str) -> None:
    cell = replace(SMALL, layout=layout, routing=routing)
    work, capacity = Workload(cell), 96
    routed = work.routing(0)
    bases = [work.expert_base(0, source) for source in range(cell.num_ranks)]
    setting = setting_of(cell, capacity)
    payload = [work.input(0, source)[0] for source in range(cell.num_ranks)]
    expected = reference.dispatch(setting, payload, None, routed.topk_idx, routed.topk_weights)
    outputs = []
    for rank, want in enumerate(expected):
        got = plain.received_rows(cell, routed, rank)
        assert torch.equal(got.tokens, want.rank_tokens)
        assert torch.equal(got.topk_idx.int(), want.topk_idx) and torch.equal(got.topk_weights, want.topk_weights)
        assert torch.equal(got.rows_per_expert.int(), want.rows_per_expert)
        if layout != "rank":
            assert torch.equal(got.expert_tokens, want.row_tokens[want.row_tokens >= 0])
        room = torch.zeros(capacity * cell.num_local_experts, cell.hidden, dtype=torch.bfloat16)
        written = plain.write_expert_output(cell, got, bases, rank, room, capacity).flatten(0, -2)
        assert torch.equal((written != 0).any(dim=1), want.row_tokens >= 0)
        who = rank if layout == "rank" else got.experts
        rows = expert_output(torch.cat(bases)[want.row_tokens[want.row_tokens >= 0]], who)
        assert torch.equal(written[want.row_tokens >= 0].view(torch.int16), rows.view(torch.int16))
        outputs.append(written)
    sources = reference.token_sources(routed.topk_idx)
    sums = reference.combine(setting, expected, sources, outputs, weighted=layout != "rank")
    for rank, want_sum in enumerate(sums):
        got_sum = plain.combined(cell, routed.topk_idx[rank], routed.topk_weights[rank], bases[rank], rank)
        assert torch.equal(got_sum.view(torch.int16), want_sum.view(torch.int16))


def test_wrong_rows_are_named() -> None:
    source = torch.arange(40.0).view(10, 4)
    parts, tokens, places = [source[:5], source[5:]], torch.tensor([7, 2, 2, 9]), torch.tensor([3, 0, 1, 2])
    rows = torch.empty(4, 4)
    rows[places] = source[tokens]
    plain.require_rows("rows", rows, places, parts, tokens)
    rows[1, 3] += 1
    with pytest.raises(ValueError, match="rows: row 1 is not that of token 2"):
        plain.require_rows("rows", rows, places, parts, tokens)
    minus_zero = torch.zeros(1, 4).neg()
    with pytest.raises(ValueError, match="combined rows: row 0"):
        plain.require_combined(minus_zero, torch.zeros(1, 4), exact=True)
    plain.require_combined(minus_zero, torch.zeros(1, 4), exact=False)
    with pytest.raises(ValueError, match=r"one of rows 0 to 0 is off by 1\.0"):
        plain.require_combined(minus_zero + 1, torch.zeros(1, 4), exact=False)


# ---- on ranks ----------------------------------------------------------------------------------------------------


def run_cells_plainly(group: dist.ProcessGroup, cells: list[Cell]) -> list[dict[str, Any]]:
    return [asdict(record) for cell in cells for record in CellRun(group, cell).run()]


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
            return super().combined().roll(1, dims=0)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("deep_a2a.benchmark.measure.BufferContender", Wrong)
        with pytest.raises(ValueError, match="combined rows: row 0 is not that of token 0"):
            CellRun(group, SMALL).run()


def test_wrong_result_is_noticed(pools: Callable[[int], Pool]) -> None:
    pools(4).run(wrong_combine)


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

    A rank row of dispatch brings its routing, 12 bytes a top-k slot, which the backend counts and `traffic` does not.
    """
    cell = replace(SMALL, layout=layout, dtype=dtype, routing="all_to_one_rank", ranks_per_node=4)
    by_rank = pools(4).run(moved_bytes, cell)
    topk_idx = by_rank[0][1]
    for step, traffic in enumerate((dispatch_traffic(cell, topk_idx), combine_traffic(cell, topk_idx))):
        counted = [moved[step] for moved, _ in by_rank]
        routing_bytes = 12 * cell.num_topk * 3 * cell.num_tokens if step == 0 else 0
        assert sum(count["shm"] for count in counted) == traffic.wire.shm + routing_bytes
        assert sum(count["network"] for count in counted) == traffic.wire.network == 0


def dispatch_by_gloo(group: dist.ProcessGroup, cell: Cell, capacity: int) -> dict[str, torch.Tensor | None]:
    rank, work = dist.get_rank(group), Workload(cell)
    routed = work.routing(0)
    contender = GlooContender(gloo.GlooExchange(group, cell, capacity * cell.num_local_experts, capacity), cell)
    contender.load(work.input(0, rank), routed.topk_idx[rank], routed.topk_weights[rank])
    contender.dispatch()
    got = contender.delivered()
    places = plain.row_places(cell, plain.received_rows(cell, routed, rank), capacity)
    return {
        "rows": got.rows.flatten(0, -2)[places],
        "topk_idx": got.topk_idx,
        "topk_weights": got.topk_weights,
    }


@pytest.mark.parametrize("layout", LAYOUTS)
def test_baseline_agrees_with_oracle(pools: Callable[[int], Pool], layout: Layout) -> None:
    cell = replace(SMALL, layout=layout)
    work = Workload(cell)
    routed = work.routing(0)
    payload = [work.input(0, source)[0] for source in range(cell.num_ranks)]
    want = reference.dispatch(setting_of(cell, 96), payload, None, routed.topk_idx, routed.topk_weights)
    for got, expected in zip(pools(4).run(dispatch_by_gloo, cell, 96), want, strict=True):
        assert torch.equal(got["rows"], expected.x[expected.row_tokens >= 0])
        assert torch.equal(got["topk_idx"], expected.topk_idx)
        assert torch.equal(got["topk_weights"], expected.topk_weights)


def start_too_late(group: dist.ProcessGroup) -> list[bool]:
    """Whether two measurements were taken, the first of them with no time to agree on its start."""
    gate = Gate(group, margin_ns=0)
    return [gate.measure(lambda: None) is not None, Gate(group, margin_ns=10**9).measure(lambda: None) is not None]


def test_gate_refuses_a_late_start(pools: Callable[[int], Pool]) -> None:
    assert pools(4).run(start_too_late) == [[False, True]] * 4


def neighbour_memory(group: dist.ProcessGroup) -> tuple[bool, float]:
    """Whether the window of this rank's neighbour holds what this rank copied, and the speed of a round of 1 ms."""
    ceiling = CopyCeiling(group, 3_000_000)
    dist.barrier(group=group)
    window = torch.frombuffer(ceiling.window, dtype=torch.uint8).view(3, -1)
    return all(torch.equal(part, ceiling.piece) for part in window), ceiling.gbs(1000.0)


def test_ceiling_counts_what_it_copies(pools: Callable[[int], Pool]) -> None:
    assert pools(4).run(neighbour_memory) == [(True, 3 * 2**20 / 1e6)] * 4


def start_together(group: dist.ProcessGroup) -> tuple[int, bool]:
    """How often the operation ran, and whether the ranks agree on how long it took."""
    ran: list[int] = []
    microseconds = Gate(group).measure(lambda: ran.append(1))
    times: list[Any] = [None] * dist.get_world_size(group)
    dist.all_gather_object(times, microseconds, group=group)
    return len(ran), len(set(times)) == 1


def test_gate_gives_every_rank_the_same_time(pools: Callable[[int], Pool]) -> None:
    assert pools(4).run(start_together) == [(1, True)] * 4


def double_on_rank_0(group: dist.ProcessGroup, value: int) -> int | None:
    if value < 0:
        raise ValueError(f"value is {value}, and this is rank {dist.get_rank(group)}")
    return 2 * value if dist.get_rank(group) == 0 else None


def test_launcher() -> None:
    assert run_ranks(double_on_rank_0, 21, 2) == 42
    with pytest.raises(Exception, match="value is -1, and this is rank"):
        run_ranks(double_on_rank_0, -1, 2)


def test_launcher_under_torchrun(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "3")
    with pytest.raises(ValueError, match="num_ranks is 2, but torchrun started 3 ranks"):
        run_ranks(double_on_rank_0, 21, 2)


# ---- the command -------------------------------------------------------------------------------------------------


def test_command_writes_what_it_prints(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "results.json"
    arguments = (
        "--num-tokens 16 --hidden 64 --num-topk 2 --num-experts 8 --num-ranks 2 --ranks-per-node 1 2 --dtype fp8_cast "
        f"--layout expert --iters 2 --warmup 1 --json {path}"
    )
    assert command.main(arguments.split()) == 0
    written = ResultFile.read(path)
    assert capsys.readouterr().out == f"{format_table(written.records)}\n\n{LEGEND}\n"
    assert written.command == f"deep-a2a bench {arguments}"
    assert [(record.op, record.ranks_per_node) for record in written.records] == [
        ("dispatch", 1), ("combine", 1), ("dispatch", 2), ("combine", 2),
    ]  # fmt: skip
    assert all(record.checked and record.scale_format == "float32" for record in written.records)
    assert torch.__version__.startswith(str(written.machine["torch"])) and written.machine["cores"] >= 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--num-ranks 3", "num_ranks is 3, which does not divide num_experts=256"),
        ("--ranks-per-node 3", "ranks_per_node is 3, which does not divide num_ranks=8"),
        ("--hidden 20", "hidden is 20: a bf16 row has 40 bytes; expected a multiple of 16"),
        ("--num-topk 300", "num_topk is 300; expected at most num_experts=256"),
        ("--topk-groups 2", "topk_groups is 2; expected 1 to 1, the number of nodes"),
        ("--iters 0", "num_iters is 0; expected 1 or more"),
        ("--dtype fp4", "invalid choice: 'fp4'"),
    ],
)
def test_bad_options(arguments: str, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_info:
        command.main(arguments.split())
    assert exit_info.value.code == 2
    assert message in capsys.readouterr().err
