"""The options of `deep-a2a bench`."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import get_args

from deep_a2a.benchmark.cell import Cell
from deep_a2a.benchmark.place import default_backend
from deep_a2a.benchmark.record import Backend, Dtype, Input, Layout, Output, ScaleFormat, StreamName
from deep_a2a.routing import KINDS

_DESCRIPTION = """\
Measures dispatch and combine, and the same work done by torch.distributed.all_to_all_single on the same ranks.
Starts its ranks as processes of this host, or with --nnodes of several hosts; under torchrun and srun it is a rank.
Options that take several values run every combination. Times are of the slowest rank, from a common start until the
outputs can be read, median over the iterations; every iteration has fresh data and is compared with a plain
computation.
"""


def make_parser(prog: str) -> argparse.ArgumentParser:
    cell = Cell()
    parser = argparse.ArgumentParser(
        prog=prog, description=_DESCRIPTION, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    shape = parser.add_argument_group("shape")
    for name, text in (
        ("hidden", "channels of a token"), ("num_topk", "experts of a token"),
        ("num_experts", "experts of all ranks"),
    ):  # fmt: skip
        _add_int(shape, name, getattr(cell, name), text)
    shape.add_argument(
        "--num-tokens", type=int, nargs="+", default=[cell.num_tokens], metavar="N",
        help=f"tokens of each rank (default: {cell.num_tokens})",
    )  # fmt: skip
    topology = parser.add_argument_group("topology")
    add_launch_options(topology)
    topology.add_argument(
        "--ranks-per-node", type=int, nargs="+", metavar="N",
        help="ranks of a node; fewer than a host has pretend that it is several (default: those of a host)",
    )  # fmt: skip
    topology.add_argument(
        "--backend", choices=get_args(Backend), default=default_backend(),
        help="emulated: the GPU's kernels on the CPU, for tests at tiny sizes; its times mean nothing "
        "(default: %(default)s)",
    )  # fmt: skip
    topology.add_argument(
        "--num-sms", type=int, nargs="+", default=[None], metavar="N", help="SMs of a kernel (default: the backend's)"
    )
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
    routing.add_argument(
        "--topk-groups", type=int, nargs="+", default=[None], metavar="N",
        help="the node limit: nodes that a token may go to (default: any)",
    )  # fmt: skip
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
    mode.add_argument("--graph", action="store_true", help="replay CUDA graphs (cuda; with --stream current)")
    mode.add_argument(
        "--stream", choices=get_args(StreamName), default=cell.stream,
        help="where the backend's kernels run: on a stream of its own, or the caller's (default: %(default)s)",
    )  # fmt: skip
    overlap = parser.add_argument_group("overlap")
    overlap.add_argument(
        "--overlap",
        action="store_true",
        help="a dispatch and a combine beside matrix products, instead of by themselves",
    )
    _add_int(overlap, "gemm_rows", cell.gemm_rows, "rows of a product")
    _add_int(overlap, "gemm_channels", cell.gemm_channels, "columns of what they are multiplied by")
    _add_int(overlap, "gemm_leaves", cell.gemm_leaves, "SMs that the products are told to leave to others")
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


def add_launch_options(group: argparse._ActionsContainer) -> None:
    """How many ranks, and on which hosts: `command.launch_of` takes them."""
    group.add_argument(
        "--num-ranks", type=int, metavar="N",
        help="ranks of all hosts (default: those that torchrun or srun started; one a GPU; "
        f"{Cell().num_ranks} without GPUs)",
    )  # fmt: skip
    group.add_argument(
        "--nnodes", type=int, metavar="N",
        help="hosts, on each of which this command is started with the same options but for --node-rank",
    )  # fmt: skip
    group.add_argument("--node-rank", type=int, metavar="I", help="which of the hosts this is, from 0 (srun tells)")
    group.add_argument("--rendezvous", metavar="HOST:PORT", help="host 0, and a port there that is free (srun tells)")


def _add_int(group: argparse._ArgumentGroup, name: str, default: int, text: str) -> None:
    flag = "--" + name.replace("_", "-")
    group.add_argument(flag, type=int, default=default, metavar="N", help=f"{text} (default: %(default)s)")


def _add_choices(group: argparse._ArgumentGroup, name: str, choices: Sequence[str], default: str, text: str) -> None:
    described = f"{text}: {', '.join(choices)} (default: {default})"
    group.add_argument(f"--{name}", nargs="+", choices=choices, default=[default], metavar=name.upper(), help=described)
