"""`deep-a2a bench`: what it does with its options (`options` has them)."""

from __future__ import annotations

import argparse
import itertools
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from deep_a2a.benchmark.agreement import MeasurementError
from deep_a2a.benchmark.cell import Cell
from deep_a2a.benchmark.launcher import run_ranks, torchrun_ranks
from deep_a2a.benchmark.options import make_parser
from deep_a2a.benchmark.record import Backend
from deep_a2a.benchmark.table import LEGEND, format_table


def main(argv: Sequence[str] | None = None, prog: str = "deep-a2a bench") -> int:
    """Runs the benchmark that `argv` asks for; returns the exit status."""
    arguments = sys.argv[1:] if argv is None else list(argv)
    parser = make_parser(prog)
    options = parser.parse_args(arguments)
    try:
        cells = make_cells(options)
    except ValueError as error:
        parser.error(str(error))
    try:
        run_cells(cells, f"{prog} {shlex.join(arguments)}".rstrip(), options.json)
    except MeasurementError as error:
        print(error, file=sys.stderr)
        return 1
    return 0


def run_cells(cells: Sequence[Cell], command: str, json_path: Path | None) -> None:
    """Measures cells of one backend and number of ranks, prints the table, and writes the result file if asked.

    Raises what a rank raised; MeasurementError, after the table, if cells failed that could be gone past.
    """
    from deep_a2a.benchmark.job import Job, run_job  # the parser works where the native module is missing

    outcome = run_ranks(run_job, Job(cells, command, json_path), cells[0].num_ranks)
    if outcome is None:  # another rank of torchrun prints
        return
    if outcome.results.records:
        print(f"{format_table(outcome.results.records)}\n\n{LEGEND}")
    if outcome.failures:
        raise MeasurementError("\n".join((f"{len(outcome.failures)} of {len(cells)} cells failed:", *outcome.failures)))


def make_cells(options: argparse.Namespace) -> list[Cell]:
    """Every combination of the options that take several values. Raises ValueError as `Cell` does."""
    num_ranks = default_ranks(options.backend) if options.num_ranks is None else options.num_ranks
    combinations = itertools.product(
        options.ranks_per_node or [num_ranks],
        options.num_tokens, options.num_sms, options.dtype, options.layout, options.routing, options.cached,
        options.output, options.input,
    )  # fmt: skip
    return [
        Cell(
            subject="overlap" if options.overlap else "operations",
            num_ranks=num_ranks,
            ranks_per_node=ranks_per_node,
            num_tokens=num_tokens,
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
            num_sms=num_sms,
            stream=options.stream,
            graph=options.graph,
            gemm_channels=options.gemm_channels,
            gemm_leaves=options.gemm_leaves,
            num_iters=options.iters,
            num_warmup=options.warmup,
            seed=options.seed,
            checked=options.check,
            baseline=options.baseline,
        )
        for ranks_per_node, num_tokens, num_sms, dtype, layout, routing, cached, output, lent in combinations
    ]


def default_ranks(backend: Backend) -> int:
    """Torchrun's, if it started this process; else one for each GPU, or as many as a `Cell` has."""
    return torchrun_ranks() or (torch.cuda.device_count() if backend == "cuda" else 0) or Cell().num_ranks
