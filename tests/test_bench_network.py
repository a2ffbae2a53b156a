"""What records, tables and plots say of the network between nodes, and what NVSHMEM is told beforehand."""

from __future__ import annotations

import itertools
import runpy
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from bench_cells import RECORD

from deep_a2a import memory_table
from deep_a2a.benchmark.cell import Cell
from deep_a2a.benchmark.network import Network, PutSpeed, measure_network, prepare_network
from deep_a2a.benchmark.place import Place
from deep_a2a.benchmark.record import Record, ResultFile, WireBytes
from deep_a2a.benchmark.table import format_table

BENCH = Path(__file__).parents[1] / "bench"


class Script:
    """A gate at which everything takes 100 us, and puts that write down what is asked of them."""

    num_ranks, num_streams, bytes_per_stream, carrier = 4, 3, 1_000_000, "nothing"

    def __init__(self, *, is_mapped: bool) -> None:
        self.is_mapped = is_mapped
        self.seen: list[tuple[str, int, int]] = []

    def measure(self, operation: Callable[[int], object], enqueue: str = "held") -> float:
        operation(5)
        return 100.0

    def put(self, stream: int, speed: PutSpeed) -> None:
        assert stream == 5
        self.seen.append((speed.by, speed.chunk_bytes, speed.num_sms))


@pytest.mark.parametrize("is_mapped", [False, True])
def test_ways_to_put(is_mapped: bool) -> None:
    """Each is measured as often, on the SMs of the cells too; stores only where the memory is mapped."""
    script: Any = Script(is_mapped=is_mapped)
    found = measure_network(script, script, Place("emulated", torch.device("cpu"), None), [7])
    ways = {(speed.by, speed.chunk_bytes, speed.num_sms) for speed in found.speeds}
    assert ways == set(
        itertools.product(("warp", "stores" if is_mapped else "thread"), (1024, 4096), (1, 2, 7))
    )  # fmt: skip
    assert {script.seen.count(way) for way in ways} == {13} and len(script.seen) == 13 * len(ways)
    assert {speed.gbs for speed in found.speeds} == {30.0}, "3 MB in 100 us"


def test_which_speeds_count() -> None:
    ways = [("warp", 4, 20.0), ("stores", 4, 10.0), ("warp", 8, 40.0), ("stores", 8, 45.0), ("warp", 24, 44.0)]
    network = Network([PutSpeed(by, 4096, num_sms, gbs) for by, num_sms, gbs in ways], "some way", "; so")
    assert network.ceiling.gbs == 45.0 and network.describe() == "puts by stores, 4096 bytes each, 8 SMs; so"
    assert [network.gbs_at(num_sms) for num_sms in (None, 2, 4, 12, 24)] == [None, None, 20.0, 45.0, 45.0]
    assert [(speed["num_sms"], speed["by"]) for speed in network.to_json()] == [
        (4, "warp"),
        (8, "stores"),
        (24, "warp"),
    ]


ACROSS = replace(
    RECORD, backend="cuda", num_sms=8, wire_bytes=WireBytes(nvlink=3_000_000, network=1_000_000), ceiling_gbs=300.0,
    network_put_bytes=4_060_000, network_least_bytes=4_000_000, network_ceiling_gbs=50.0, network_ceiling_of="puts",
    network_ceiling_at_sms_gbs=40.0, network_ratio=2.5, link_time_ratio=2.5,
)  # fmt: skip


def test_figures() -> None:
    """The network takes 20 us at its ceiling, the links of a node 10: it is what counts, though it carries less."""
    assert ACROSS.slowest_class == "network" and ACROSS.wire_gbs == ACROSS.network_gbs == 20.0
    assert ACROSS.nvlink_gbs == 60.0 and ACROSS.link_efficiency == 0.4
    assert ACROSS.network_header_share == pytest.approx(0.015)
    fast = replace(ACROSS, network_ceiling_gbs=200.0)
    assert fast.slowest_class == "nvlink" and fast.link_efficiency == 0.2
    assert replace(ACROSS, network_least_bytes=0).network_header_share is None
    assert ACROSS.wire_bytes + WireBytes(shm=1, network=2) == WireBytes(3_000_000, 1_000_002, 1)


def test_record_as_json() -> None:
    values = ACROSS.to_json()
    assert values["network_gbs"] == 20.0 and values["nvlink_gbs"] == 60.0 and values["network_header_share"] == 0.015
    assert Record.from_json(values) == ACROSS
    one_node = replace(RECORD, ranks_per_node=4).to_json()
    assert not [name for name in one_node if name.startswith("network")]
    with pytest.raises(ValueError, match=r"there is one node, but network_put_bytes, .* of several; expected None"):
        replace(ACROSS, ranks_per_node=4)
    with pytest.raises(ValueError, match=r"network_ratio is 0.0; expected a positive number"):
        replace(ACROSS, network_ratio=0.0)
    with pytest.raises(ValueError, match=r"network_put_bytes is -1; expected an integer, 0 or more"):
        replace(ACROSS, network_put_bytes=-1)


def test_table() -> None:
    operations, across = format_table([replace(ACROSS, topk_groups=2), replace(RECORD, ranks_per_node=4)]).split("\n\n")
    assert len(operations.splitlines()) == 4
    head, _, line = across.splitlines()
    names = "limit  total us  network GB/s ceiling same SMs network ratio headers node GB/s"
    assert " ".join(head.split()).endswith(" ".join(names.split()))
    assert line.split()[-12:] == [
        "2",
        "50.0",
        "1.0",
        "MB",
        "20.00",
        "50.00",
        "40.00",
        "2.50",
        "1.50%",
        "3.0",
        "MB",
        "60.00",
    ]


def test_plot(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    plot = runpy.run_path(str(BENCH / "plot.py"))
    records = [replace(ACROSS, num_sms=num_sms, total_us=400.0 / num_sms) for num_sms in (4, 8)]
    records += [replace(ACROSS, topk_groups=limit, total_us=10.0 * limit) for limit in (1, 2)]
    plot["draw"](ResultFile({}, "", "", records), tmp_path / "nodes.png")
    assert (tmp_path / "nodes.png").read_bytes().startswith(b"\x89PNG")

    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure: Any = pyplot.figure()
    plot["draw_nodes"](records, figure)
    drawn = [[[float(value) for value in line.get_ydata()] for line in axes.lines] for axes in figure.axes]
    assert drawn == [[[10.0, 20.0], [50.0, 50.0]], [[1.0, 1.0]], [[10.0, 20.0]]]
    pyplot.close(figure)


def test_what_nvshmem_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    """Before it is joined, for the largest Buffer and the most SMs that will come; on the cpu nothing."""
    nodes = Cell(num_ranks=4, ranks_per_node=2, num_experts=8, num_topk=3, num_tokens=10, hidden=128)
    told: list[tuple[int, int]] = []
    monkeypatch.setattr(
        "deep_a2a.nvshmem_environment.prepare", lambda heap_bytes, num_queues: told.append((heap_bytes, num_queues))
    )
    prepare_network([nodes, replace(nodes, ranks_per_node=4, backend="cuda")])
    assert told == []
    large = replace(nodes, backend="cuda", num_tokens=4096, hidden=7168, num_sms=32)
    prepare_network([replace(nodes, backend="cuda"), large])
    window = memory_table(
        num_ranks=4, ranks_per_node=2, hidden=7168, num_experts=8, num_topk=3, num_max_tokens_per_rank=4096
    )
    assert told == [(4 * window.total_bytes, 64)]
