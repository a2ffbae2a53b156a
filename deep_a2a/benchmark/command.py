"""`deep-a2a bench`: its options, and what it does with them."""

from __future__ import annotations

import argparse
import itertools
import shlex
import sys
from collections.abc import Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import get_args

from deep_a2a.benchmark.cell import Cell
from deep_a2a.benchmark.launcher import run_ranks, torchrun_ranks
from deep_a2a.benchmark.machine import describe_machine
from deep_a2a.benchmark.record import Dtype, Input, Layout, Output, ResultFile, ScaleFormat
from deep_a2a.benchmark.table import LEGEND, format_table
from deep_a2a.routing import KINDS

_DESCRIPTION = """\
Measures dispatch and combine, and the same work done by torch.distributed.all_to_all_single on the same ranks.
Starts its ranks as processes of this host; under torchrun it uses torchrun's. Options that take several values run
every combination. Times are of the slowest rank, from a common start until the outputs can be read, median over the
iterations; every iteration has fresh data and is compared with a plain computation.
"""


def main(argv: Sequence[str] | None = None, prog: str = "deep-a2a bench") -> int:
    """Runs the benchmark that `argv` asks for; returns the exit status."""
    arguments = sys.argv[1:] if argv is None else list(argv)
    parser = make_parser(prog)
    options = parser.parse_args(arguments)
    try:
        cells = make_cells(options)
    except ValueError as error:
        parser.error(str(error))
    run_cells(cells, f"{prog} {shlex.join(arguments)}".rstrip(), options.json)
    return 0


def run_cells(cells: Sequence[Cell], command: str, json_path: Path | None) -> None:
    """Measures cells of one number of ranks, prints the table, and writes the result file if asked.

    Raises what a rank raised: a result that is wrong, or the backend's error.
    """
    from deep_a2a.benchmark.measure import measure_cells  # the parser works where the native module is missing

    records = run_ranks(measure_cells, cells, cells[0].num_ranks)
    if records is None:  # another rank of torchrun prints
        return
    print(f"{format_table(records)}\n\n{LEGEND}")
    if json_path is not None:
        date = datetime.now(timezone.utc).isoformat(timespec="seconds")
        ResultFile(describe_machine(), command, date, records).write(json_path)


def make_cells(options: argparse.Namespace) -> list[Cell]:
    """Every combination of the options that take several values. Raises ValueError as `Cell` does."""
    combinations = itertools.product(
        options.ranks_per_node or [options.num_ranks],
        options.dtype, options.layout, options.routing, options.cached, options.output, options.input,
    )  # fmt: skip
    return [
        Cell(
            num_ranks=options.num_ranks,
            ranks_per_node=ranks_per_node,
            num_tokens=options.num_tokens,
            hidden=options.hidden,
            num_topk=options.num_topk,
            num_experts=options.num_experts,
            dtype=dtype,
            scale_format=options.scale_format,
            layout=layout,
            routing=routing,
            topk_groups=options.topk_groups,
            cached=cached == "yes",
            output=output,
            input=lent,
            host_sync=options.host_sync,
            backend=options.backend,
            num_iters=options.iters,
            num_warmup=options.warmup,
            seed=options.seed,
            checked=options.check,
            baseline=options.baseline,
        )
        for ranks_per_node, dtype, layout, routing, cached, output, lent in combinations
    ]


def make_parser(prog: str) -> argparse.ArgumentParser:
    cell = Cell()
    parser = argparse.ArgumentParser(
        prog=prog, description=_DESCRIPTION, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    shape = parser.add_argument_group("shape")
    for name, text in (
        ("num_tokens", "tokens of each rank"), ("hidden", "channels of a token"), ("num_topk", "experts of a token"),
        ("num_experts", "experts of all ranks"),
    ):  # fmt: skip
        _add_int(shape, name, getattr(cell, name), text)
    topology = parser.add_argument_group("topology")
    _add_int(topology, "num_ranks", torchrun_ranks() or cell.num_ranks, "ranks; torchrun's, if it started this process")
    topology.add_argument(
        "--ranks-per-node", type=int, nargs="+", metavar="N", help="ranks of a (pretended) node (default: all)"
    )
    topology.add_argument("--backend", choices=["cpu"], default=cell.backend, help="(default: %(default)s)")
    payload = parser.add_argument_group("payload and layout")
    _add_choices(
        payload,
        "dtype",
        get_args(Dtype),
        cell.dtype,
        "rows; fp8 comes with its scales, fp8_cast is cast from BF16 by dispatch",
    )
    _add_choices(payload, "layout", get_args(Layout), cell.layout, "rows that dispatch delivers")
    payload.add_argument(
        "--scale-format",
        choices=get_args(ScaleFormat),
        default=cell.scale_format,
        help="of FP8 rows (default: %(default)s)",
    )
    routing = parser.add_argument_group("routing")
    _add_choices(routing, "routing", KINDS, cell.routing, "how tokens choose experts")
    routing.add_argument("--topk-groups", type=int, metavar="N", help="nodes that a token may go to (default: any)")
    mode = parser.add_argument_group("mode")
    _add_choices(mode, "cached", ("no", "yes"), "no", "whether dispatch reuses the routing of an earlier one")
    _add_choices(
        mode,
        "output",
        get_args(Output),
        cell.output,
        "dispatched rows are views of the window, or copied to ordinary tensors",
    )
    _add_choices(mode, "input", get_args(Input), cell.input, "inputs lie in the window, or in ordinary tensors")
    mode.add_argument("--host-sync", action="store_true", help="dispatch returns exactly sized tensors")
    run = parser.add_argument_group("run")
    _add_int(run, "iters", cell.num_iters, "iterations that count; a result to quote has at least 20")
    _add_int(run, "warmup", cell.num_warmup, "iterations before that")
    _add_int(run, "seed", cell.seed, "of data and routing")
    run.add_argument(
        "--no-check", dest="check", action="store_false", help="do not compare results with a plain computation"
    )
    run.add_argument("--no-baseline", dest="baseline", action="store_false", help="leave the baseline out")
    run.add_argument("--json", type=Path, metavar="FILE", help="write the records, and the machine, to FILE")
    return parser


def _add_int(group: argparse._ArgumentGroup, name: str, default: int, text: str) -> None:
    flag = "--" + name.replace("_", "-")
    group.add_argument(flag, type=int, default=default, metavar="N", help=f"{text} (default: %(default)s)")


def _add_choices(group: argparse._ArgumentGroup, name: str, choices: Sequence[str], default: str, text: str) -> None:
    described = f"{text}: {', '.join(choices)} (default: {default})"
    group.add_argument(f"--{name}", nargs="+", choices=choices, default=[default], metavar=name.upper(), help=described)
