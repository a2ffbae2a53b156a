"""The benchmark's records: what they refuse, what follows from them, the files and tables they become."""

from __future__ import annotations

import itertools
import json
import runpy
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from bench_cells import RECORD

from deep_a2a.benchmark.link import Link, LinkSpeed, ceiling_fields, whole_pieces
from deep_a2a.benchmark.machine import sources_digest
from deep_a2a.benchmark.record import Record, ResultFile, WireBytes
from deep_a2a.benchmark.table import format_table

BENCH = Path(__file__).parents[1] / "bench"
RESULTS = BENCH / "results"


OVERLAP = replace(
    RECORD, op="overlap", gemm_alone_us=100.0, gemm_beside_us=106.0, comm_alone_us=80.0, both_us=110.0, gemm="1 x"
)


def test_record_figures() -> None:
    assert RECORD.speedup == 4.0
    assert RECORD.logical_gbs == 80.0
    assert RECORD.wire_bytes.total == 3_000_000 and RECORD.wire_bytes.slowest == 2_000_000
    assert RECORD.wire_gbs == 40.0 and RECORD.link_efficiency == 0.5 and RECORD.gbs_per_sm is None
    assert replace(RECORD, backend="cuda", num_sms=8).gbs_per_sm == 10.0
    assert replace(RECORD, ceiling_gbs=None).link_efficiency is None
    assert RECORD.share_hidden is None and RECORD.gemm_slowdown is None


def test_overlap_figures() -> None:
    assert OVERLAP.share_hidden == 0.875 and OVERLAP.gemm_slowdown == pytest.approx(0.06)
    assert replace(OVERLAP, both_us=180.0).share_hidden == 0.0, "one after the other"


def test_link_arithmetic() -> None:
    wire = WireBytes(nvlink=300_000_000, shm=1)
    fields = ceiling_fields(1200.0, wire, 300.0, "bulk push, 8 SMs")
    assert fields == {"ceiling_gbs": 300.0, "ceiling_of": "bulk push, 8 SMs", "link_time_ratio": 1.2}
    assert ceiling_fields(1200.0, WireBytes(), 300.0, "")["link_time_ratio"] is None
    assert set(ceiling_fields(1200.0, wire, None, None).values()) == {None}
    link = Link([LinkSpeed("push", 4, 170.0), LinkSpeed("push", 8, 336.0), LinkSpeed("pull", 8, 322.0)], "; so")
    assert link.ceiling.gbs == 336.0 and link.describe() == "bulk push, 8 SMs; so"
    assert [whole_pieces(n) for n in (1, 7168, 7169)] == [7168, 7168, 14336]


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
        ({"stream": "any"}, "stream is 'any'; expected one of own, current"),
        ({"scale_format": "float32"}, "scale_format is 'float32' with dtype bf16"),
        ({"dtype": "fp8"}, "scale_format is None with dtype fp8"),
        ({"both_us": 3.0}, r"overlap fields \['both_us'\]; expected \[\]"),
        ({"op": "overlap"}, r"overlap fields \[\]; expected \['gemm_alone_us'"),
        ({"slowest_us": 60.0}, r"slowest_us is 60.0 and devices is None; expected None without devices"),
        ({"devices": (0, 1)}, r"devices is \(0, 1\); expected one for each of num_ranks=4"),
        ({"devices": (0, 1, 1, -1)}, r"a device of devices is -1; expected an integer, 0 or more"),
        ({"devices": (0, 1, 1, 1), "slowest_us": 49.9}, r"slowest_us is 49.9; expected at least total_us=50.0"),
        ({"run": 0}, r"run is 0; expected an integer, 1 or more"),
    ],
)
def test_bad_record(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        replace(RECORD, **change)


def test_bad_wire_bytes() -> None:
    with pytest.raises(ValueError, match=r"wire_bytes.shm is -1; expected a number of bytes"):
        WireBytes(shm=-1)


def test_result_file_round_trip(tmp_path: Path) -> None:
    cuda = replace(RECORD, backend="cuda", num_sms=12, kernel_us=40.0, graph=True, dtype="fp8", scale_format="ue8m0")
    kernels = replace(cuda, devices=(0, 1, 1, 1), slowest_us=51.5, run=2)
    written = ResultFile({"cpu": "some"}, "a command", "2026-01-02T03:04:05+00:00", (RECORD, OVERLAP, cuda, kernels))
    written.write(tmp_path / "new folder" / "results.json")
    assert ResultFile.read(tmp_path / "new folder" / "results.json") == written
    raw = json.loads((tmp_path / "new folder" / "results.json").read_text())
    assert list(raw) == ["machine", "command", "date", "records"]
    assert raw["records"][0]["wire_bytes"] == {"nvlink": 0, "network": 1_000_000, "shm": 2_000_000}
    assert "both_us" not in raw["records"][0] and raw["records"][1]["both_us"] == 110.0
    assert set(raw["records"][3]) - set(raw["records"][2]) == {"devices", "slowest_us", "run"}
    assert raw["records"][3]["devices"] == [0, 1, 1, 1]
    assert raw["records"][2]["gbs_per_sm"] == pytest.approx(4_000_000 / 50 / 1e3 / 12, rel=1e-5)
    assert raw["records"][2]["link_efficiency"] == pytest.approx(2_000_000 / 80e3 / 50, rel=1e-5)


def test_sources_digest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same for the same files, another when one has changed or goes by another name."""
    for name in ("csrc/a.cu", "csrc/cuda/b.cu", "deep_a2a/__init__.py"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(name)
    monkeypatch.setattr("deep_a2a.benchmark.machine.deep_a2a.__file__", str(tmp_path / "deep_a2a" / "__init__.py"))
    digests = [sources_digest()]
    (tmp_path / "deep_a2a" / "built.so").write_text("not a source")
    assert sources_digest() == digests[0]
    (tmp_path / "csrc" / "a.cu").rename(tmp_path / "csrc" / "c.cu")
    digests.append(sources_digest())
    (tmp_path / "csrc" / "c.cu").write_text("changed")
    digests.append(sources_digest())
    assert None not in digests and len(set(digests)) == 3
    shutil.rmtree(tmp_path / "csrc")
    assert sources_digest() is None


def test_record_from_json_names_fields() -> None:
    values = RECORD.to_json()
    del values["op"]
    with pytest.raises(ValueError, match=r"unknown fields \['colour'\] and lacks \['op'\]"):
        Record.from_json({**values, "colour": "red"})


def test_kept_results_are_worth_quoting() -> None:
    """Every result file in the repository: valid records of at least 20 iterations, all of them checked.

    Those of bench/kernels.py have at least 8, and say that nothing was checked.
    """
    for path in RESULTS.glob("*.json"):
        if path.name == "published.json":
            continue
        records = ResultFile.read(path).records
        assert records, path
        for record in records:
            of_kernels = record.devices is not None
            assert record.checked is not of_kernels and record.num_iters >= (8 if of_kernels else 20), path


def test_published_figures_have_sources() -> None:
    figures = json.loads((RESULTS / "published.json").read_text())["figures"]
    assert figures
    for figure in figures:
        assert figure["source"] and figure["package"] and figure["machine"], figure


def test_table() -> None:
    one_node = replace(RECORD, ranks_per_node=4)
    head, rule, first, second = format_table(
        [one_node, replace(one_node, baseline=None, baseline_us=None)]
    ).splitlines()
    assert set(rule) == {"-", " "}
    for column, value in (("total us", "50.0"), ("baseline us", "200"), ("speed-up", "4.00"), ("GB/s", "80.00")):
        end = head.index(column) + len(column)
        assert first[:end].endswith(f" {value}"), column
    assert "network 1.0 MB, shm 2.0 MB" in first and "1x4" in first
    assert second.split()[-10:] == ["50.0", "-", "-", "4.0", "MB", "80.00", "-", "2.00", "50%", "yes"]


def test_table_of_overlap() -> None:
    operations, overlaps = format_table([replace(RECORD, ranks_per_node=4), OVERLAP]).split("\n\n")
    assert "hidden" in overlaps and "hidden" not in operations
    assert overlaps.splitlines()[2].split()[-7:] == ["100", "106", "80", "110", "87.5%", "6.0%", "yes"]


ODD: dict[str, Any] = {"cached": True, "input": "copied", "output": "owned", "routing": "zipf", "graph": True}


def test_curves() -> None:
    """A curve for each payload and layout, and nothing in it that is not plain."""
    of = replace(RECORD, backend="cuda", wire_bytes=WireBytes(nvlink=1_000_000), logical_bytes=1)
    records = [replace(of, num_sms=sms, total_us=100.0 / sms) for sms in (8, 4, 16)]
    records += [replace(of, num_sms=8, total_us=1.0, **{name: value}) for name, value in ODD.items()]
    records += [replace(of, num_sms=8, num_tokens=1), replace(of, num_sms=8, op="combine")]
    curves = runpy.run_path(str(BENCH / "plot.py"))["curves"]
    at, drawn = curves(records, lambda record: record.num_sms, lambda record: record.num_tokens)
    assert at == of.num_tokens and drawn == {"dispatch bf16 rank": [(4, 40.0), (8, 80.0), (16, 160.0)]}


def test_plot(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    draw = runpy.run_path(str(BENCH / "plot.py"))["draw"]
    on_gpu = [replace(RECORD, backend="cuda", num_sms=sms) for sms in (4, 8)]
    for name, records in (("cpu", [RECORD]), ("gpu", [*on_gpu, OVERLAP])):
        draw(ResultFile({}, "", "", records), tmp_path / f"{name}.png")
        assert (tmp_path / f"{name}.png").read_bytes().startswith(b"\x89PNG")


def test_plot_of_one_node() -> None:
    """Each plot says what it fixes: of token counts with as many points the most. No curve leaves it."""
    pytest.importorskip("matplotlib")
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    draw_bandwidth = runpy.run_path(str(BENCH / "plot.py"))["draw_bandwidth"]
    of = replace(RECORD, backend="cuda", ranks_per_node=4, num_gpus=1, ceiling_gbs=30.0, ceiling_of="bulk push")
    of = replace(of, wire_bytes=WireBytes(nvlink=1_000_000))
    records = [
        replace(of, num_tokens=num_tokens, num_sms=num_sms, total_us=num_tokens / 40.96 / num_sms)
        for num_tokens, num_sms in itertools.product((4096, 128), (8, 12, 16))
    ]
    figure: Any = pyplot.figure()
    draw_bandwidth(records, figure)
    left, right = figure.axes
    assert (left.get_title(), right.get_title()) == ("4096 tokens per rank", "12 SMs")
    assert [float(value) for value in left.lines[0].get_ydata()] == pytest.approx([80, 120, 160])
    assert [float(value) for value in right.lines[0].get_ydata()] == pytest.approx([3840, 120])
    assert left.lines[1].get_label() == "ceiling: bulk push, all ranks on one GPU"
    assert left.get_ylim()[0] == 0 and left.get_ylim()[1] > 3840
    figure.clear()
    draw_bandwidth(records[:3], figure)
    assert [axes.get_title() for axes in figure.axes] == ["4096 tokens per rank"]
    pyplot.close(figure)
