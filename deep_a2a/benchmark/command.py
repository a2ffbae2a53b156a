"""`deep-a2a bench`: what it does with its options (`options` has them)."""

from __future__ import annotations

import argparse
import itertools
import os
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from deep_a2a.benchmark.agreement import MeasurementError
from deep_a2a.benchmark.cell import Cell
from deep_a2a.benchmark.launch import Launch, find_launch
from deep_a2a.benchmark.launcher import run_ranks
from deep_a2a.benchmark.options import make_parser
from deep_a2a.benchmark.record import Backend
from deep_a2a.benchmark.table import LEGEND, format_table


def main(argv: Sequence[str] | None = None, prog: str = "deep-a2a bench") -> int:
    """Runs the benchmark that `argv` asks for; returns the exit status."""
    arguments = sys.argv[1:] if argv is None else list(argv)
    parser = make_parser(prog)
    options = parser.parse_args(arguments)
    try:
        launch = launch_of(options)
        cells = make_cells(options, launch)
    except ValueError as error:
        parser.error(str(error))
    try:
        run_cells(cells, f"{prog} {shlex.join(arguments)}".rstrip(), options.json, launch)
    except MeasurementError as error:
        print(error, file=sys.stderr)
        return 1
    return 0


def run_cells(cells: Sequence[Cell], command: str, json_path: Path | None, launch: Launch | None = None) -> None:
    """Measures cells of one backend and number of ranks, prints the table, and writes the result file if asked.

    Without a `launch` the ranks are processes of this host. Raises what a rank raised; MeasurementError, after the
    table, if cells failed that could be gone past.
    """
    from deep_a2a.benchmark.job import Job, run_job  # the parser works where the native module is missing

    launch = launch or Launch(ranks_per_host=cells[0].num_ranks)
    outcome = run_ranks(run_job, Job(cells, command, json_path), launch)
    if outcome is None:  # rank 0 prints, and is elsewhere
        return
    if outcome.results.records:
        print(f"{format_table(outcome.results.records)}\n\n{LEGEND}")
    if outcome.failures:
        raise MeasurementError("\n".join((f"{len(outcome.failures)} of {len(cells)} cells failed:", *outcome.failures)))


def make_cells(options: argparse.Namespace, launch: Launch) -> list[Cell]:
    """Every combination of the options that take several values. Raises ValueError as `Cell` does."""
    varied = {
        "ranks_per_node": options.ranks_per_node or [launch.local_ranks],
        "topk_groups": options.topk_groups,
        "num_tokens": options.num_tokens,
        "num_sms": options.num_sms,
        "dtype": options.dtype,
        "layout": options.layout,
        "routing": options.routing,
        "cached": [choice == "yes" for choice in options.cached],
        "output": options.output,
        "input": options.input,
    }
    same: dict[str, Any] = {
        "subject": "overlap" if options.overlap else "operations",
        "num_ranks": launch.num_ranks,
        "hidden": options.hidden,
        "num_topk": options.num_topk,
        "num_experts": options.num_experts,
        "scale_format": options.scale_format,
        "host_sync": options.host_sync,
        "backend": options.backend,
        "stream": options.stream,
        "graph": options.graph,
        "gemm_rows": options.gemm_rows,
        "gemm_channels": options.gemm_channels,
        "gemm_leaves": options.gemm_leaves,
        "num_iters": options.iters,
        "num_warmup": options.warmup,
        "seed": options.seed,
        "checked": options.check,
        "baseline": options.baseline,
    }
    combinations = itertools.product(*varied.values())
    return [Cell(**same, **dict(zip(varied, values, strict=True))) for values in combinations]


def launch_of(options: argparse.Namespace) -> Launch:
    """Who starts which ranks, by the options of `add_launch_options` and the environment. Raises ValueError."""
    launch = find_launch(os.environ, options.nnodes, options.node_rank, options.rendezvous)
    return launch.with_ranks(options.num_ranks, default_ranks(options.backend))


def default_ranks(backend: Backend) -> int:
    """Of a host: one for each GPU, or as many as a `Cell` has."""
    return (torch.cuda.device_count() if backend == "cuda" else 0) or Cell().num_ranks
