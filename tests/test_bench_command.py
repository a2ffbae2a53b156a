"""`deep-a2a bench`, and the lists of cells that whole result files are made of."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from deep_a2a.benchmark import command
from deep_a2a.benchmark.cell import Cell
from deep_a2a.benchmark.job import Job
from deep_a2a.benchmark.record import ResultFile
from deep_a2a.benchmark.table import LEGEND, format_table


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
        ("--num-sms 4", "num_sms is 4; expected None with backend cpu"),
        ("--overlap", "subject is overlap; expected operations with backend cpu"),
        ("--graph --stream current", "graph is True with backend cpu"),
        ("--backend cuda --graph", "stream is own; expected current for graphs"),
        ("--topk-groups 1 3 --ranks-per-node 4", "topk_groups is 3; expected 1 to 2, the number of nodes"),
        ("--nnodes 2 --node-rank 2", "--node-rank is 2; expected 0 to 1, with --nnodes 2"),
        ("--backend cuda --num-sms 0", "num_sms is 0; expected 1 or more"),
        ("--backend cuda --overlap --layout expert", "layout is expert, host_sync False with subject overlap"),
    ],
)
def test_bad_options(arguments: str, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_info:
        command.main(arguments.split())
    assert exit_info.value.code == 2
    assert message in capsys.readouterr().err


def test_cells_of_a_run_go_together() -> None:
    with pytest.raises(ValueError, match=r"num_ranks is \[4, 8\] in the cells of a run; expected one value"):
        Job([Cell(), Cell(num_ranks=4, ranks_per_node=4)], "")
