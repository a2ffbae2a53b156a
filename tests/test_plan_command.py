"""`deep-a2a plan`, and that its documentation says what it says."""

from __future__ import annotations

import json
import os
import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

from deep_a2a import cli
from deep_a2a.planner import Workload, make_plan
from deep_a2a.planner.command import main
from deep_a2a.planner.rates import RATES
from deep_a2a.planner.tables import Table, binary_bytes, decimal_bytes, microseconds

ROOT = Path(__file__).parents[1]


def run(arguments: str, capsys: pytest.CaptureFixture[str]) -> str:
    assert main(arguments.split()) == 0
    return capsys.readouterr().out


def test_help(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_info:
        cli.main(["plan", "--help"])
    assert exit_info.value.code == 0
    printed = capsys.readouterr().out
    assert printed.startswith("usage: deep-a2a plan") and "--topk-groups" in printed
    with pytest.raises(SystemExit):
        cli.main(["--help"])
    assert "\n  plan " in capsys.readouterr().out


def test_one_job(capsys: pytest.CaptureFixture[str]) -> None:
    printed = run("--num-ranks 32 --topk-groups 2 --num-sms 8 --network-gbs 23.5", capsys)
    plan = make_plan(Workload(num_ranks=32, topk_groups=2), num_sms=8)
    assert "32 ranks in 4 nodes, 4096 tokens of 7168 a rank" in printed and "at most 2 of 4 groups" in printed
    assert (
        f"a token goes to {plan.spread.ranks_per_token:.2f} ranks and {plan.spread.nodes_per_token:.2f} nodes"
        in printed
    )
    lines = {line[:22].strip(): line[22:].split() for line in printed.splitlines()}
    both = (plan.dispatch, plan.combine)
    assert lines["us, network out"] == [microseconds(2 * each.estimate.terms["network out"]) for each in both]
    assert lines["us, SMs out"] == [microseconds(each.estimate.terms["SMs out"]) for each in both]
    wire = " ".join(decimal_bytes(each.traffic.network_wire_bytes) for each in both)
    assert " ".join(lines["wire bytes, network"]) == wire
    assert f"max_recv_rows={plan.window.max_recv_rows}" in printed
    assert binary_bytes(plan.window.worst.total_bytes) in printed
    assert RATES["nvlink_push"].source in printed and RATES["network_put"].source not in printed, "another was given"


def test_json(capsys: pytest.CaptureFixture[str]) -> None:
    printed = json.loads(run("--num-ranks 64 512 --json --dtype bf16 --num-tokens 128", capsys))
    assert printed["rates"]["flag"] == {
        "name": "flag", "value": 1.2, "unit": "us", "source": RATES["flag"].source,
    }  # fmt: skip
    for plan, ranks in zip(printed["plans"], (64, 512), strict=True):
        expected = make_plan(Workload(num_ranks=ranks, num_experts=max(256, ranks), dtype="bf16", num_tokens=128))
        assert plan == json.loads(json.dumps(expected.to_json()))
        assert plan["dispatch"]["network_wire_bytes"] == plan["dispatch"]["network_rows"] * 14336
        assert plan["dispatch"]["total_us"] == plan["dispatch"]["fixed_us"] + max(plan["dispatch"]["terms"].values())


def test_rounds(capsys: pytest.CaptureFixture[str]) -> None:
    printed = run("--num-ranks 256 --topk-groups 4", capsys)
    assert "between nodes in 7 rounds of 588 tokens; all at once would take 7.0 GiB" in printed
    assert "us, rounds" in printed
    printed = run(f"--num-ranks 256 --topk-groups 4 --staging-bytes {2**40}", capsys)
    assert "rounds" not in printed


def test_several_jobs(capsys: pytest.CaptureFixture[str]) -> None:
    head, _, *lines = run("--num-ranks 64 2048 --topk-groups 4", capsys).splitlines()
    assert head.split()[:4] == ["ranks", "nodes", "experts", "ranks/token"]
    assert [line.split()[:3] for line in lines] == [["64", "8", "256"], ["2048", "256", "2048"]]


def test_published(capsys: pytest.CaptureFixture[str]) -> None:
    printed = run("--published", capsys)
    line = next(line for line in printed.splitlines() if "2x8 H100" in line and "combine" in line)
    assert "81 GB/s" in line and "-13.5%" in line
    slower = run("--published --network-gbs 23.5", capsys)
    assert "46.9 GB/s" in next(line for line in slower.splitlines() if "2x8 H100" in line and "combine" in line)
    as_json = json.loads(run("--published --json", capsys))
    found = [each for each in as_json["figures"] if each["figure"]["listed"]]
    assert len(found) == 10 and all(abs(each["deviation"]) <= as_json["within"] for each in found[4:])
    assert all(each["reason"] or abs(each["deviation"]) <= as_json["within"] for each in as_json["figures"])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--num-ranks 12", "ranks_per_node must divide num_ranks = 12, got 8"),
        ("--num-ranks 0", "num_ranks must be at least 1, got 0"),
        ("--num-ranks 24", "num_experts must be a positive multiple of num_ranks = 24, got 256"),
        ("--ranks-per-node 0", "ranks_per_node must divide num_ranks = 64, got 0"),
        ("--hidden 20", "hidden must be a positive multiple of 8"),
        ("--hidden 24", "hidden is 24, expected a multiple of 16"),
        ("--topk-groups 9", "topk_groups is 9, expected 1 to 8, the number of groups"),
        ("--num-groups 7", "num_groups is 7, expected a divisor of num_experts = 256"),
        ("--num-topk 33", "num_topk must be between 1 and 32, got 33"),
        ("--num-sms 0", "num_sms is 0, expected 1 or more"),
        ("--network-gbs nan", "network_gbs is nan, expected a positive number"),
        ("--staging-bytes 0", "staging_bytes must be at least 1 or None, got 0"),
        ("--staging-bytes 1000", "staging_bytes must be at least"),
        ("--slack 0.5", "slack is 0.5, expected a number of at least 1"),
        ("--dtype fp4", "invalid choice: 'fp4'"),
        ("--published --figures nowhere.json", "figures is nowhere.json, expected bench/results/published.json"),
    ],
)
def test_bad_options(arguments: str, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_info:
        main(arguments.split())
    assert exit_info.value.code == 2
    assert message in capsys.readouterr().err


def test_torch_is_not_loaded() -> None:
    code = "import sys; from deep_a2a.cli import main; main(['plan', '--published']); sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, timeout=60).returncode == 0


def test_reader_that_goes_away() -> None:
    reader, writer = os.pipe()
    os.close(reader)
    command = [sys.executable, "-m", "deep_a2a.cli", "plan"]
    ended = subprocess.run(command, stdout=writer, stderr=subprocess.PIPE, text=True, timeout=60)
    os.close(writer)
    assert (ended.returncode, ended.stderr) == (1, "")


def test_tables() -> None:
    table = Table(("what", "us", "why"), (("a", "10", "so"), ("bcdef", "2", "")), notes=True)
    assert table.text() == "what   us  why\n-----  --  ---\na      10  so\nbcdef   2"
    assert table.markdown() == "| what | us | why |\n| --- | --: | --- |\n| a | 10 | so |\n| bcdef | 2 |  |"
    assert [decimal_bytes(count) for count in (999, 1500, 2.5e6, 3e9)] == ["999 B", "1.5 kB", "2.5 MB", "3.0 GB"]
    assert [binary_bytes(count) for count in (999, 1536, 1000 * 2**20, 2**41)] == [
        "999 B",
        "1.5 KiB",
        "1.0 GiB",
        "2.0 TiB",
    ]
    assert [microseconds(value) for value in (99.94, 100.4)] == ["99.9", "100"]


# ---- the page --------------------------------------------------------------------------------------------------


def numbers(text: str) -> tuple[str, list[float]]:
    """`text` without its numbers, and these."""
    pattern = r"(?<![\w.])-?\d+(?:\.\d+)?"
    return re.sub(pattern, "#", text), [float(number) for number in re.findall(pattern, text)]


def test_tables_of_the_page() -> None:
    """All of it to the letter, but for what is sampled: a library may draw other numbers from a seed."""
    page = runpy.run_path(str(ROOT / "bench" / "plan_page.py"))
    text = (ROOT / "docs" / "planner.md").read_text()
    marked = dict(re.findall(r"<!-- table: (\S+) -->\n(.*?)\n<!-- end -->", text, re.DOTALL))
    assert set(marked) == set(page["TABLES"])
    for name, make in page["TABLES"].items():
        now = make().markdown()
        remedy = f"table {name}: run python bench/plan_page.py"
        if name in ("spreads", "operations"):  # the latter has Zipf routing
            assert numbers(marked[name])[0] == numbers(now)[0], remedy
            assert numbers(marked[name])[1] == pytest.approx(numbers(now)[1], rel=0.02), remedy
        else:
            assert marked[name] == now, remedy


def test_page_is_rewritten_between_its_marks() -> None:
    rewrite = runpy.run_path(str(ROOT / "bench" / "plan_page.py"))["rewrite"]
    marks = "<!-- table: rates -->\n{}<!-- end -->"
    page = "\n".join(["above", marks.format(""), "between", marks.format("old\n"), "below", ""])
    new = rewrite(page)
    assert new.count("| network_put | 47 GB/s |") == 2 and "old" not in new
    assert [new.count(word) for word in ("above\n<!--", "end -->\nbetween\n<!--", "end -->\nbelow")] == [1, 1, 1]
    assert rewrite(new) == new


def test_plot(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    path = tmp_path / "planner.png"
    runpy.run_path(str(ROOT / "bench" / "plot_plan.py"))["draw"](path)
    assert path.read_bytes().startswith(b"\x89PNG")
    kept = (ROOT / "docs" / "planner.png").read_bytes()
    assert kept.startswith(b"\x89PNG") and len(kept) < 200_000
