"""`deep-a2a plan`."""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, get_args

from deep_a2a.settings import LayoutName

from .plan import Plan, make_plan
from .published import DEFAULT_FIGURES, WITHIN, compare, context, listed, read_figures
from .rates import RATES, Hardware
from .reasons import reason
from .report import format_plan, published_table, scale_table
from .windows import DEFAULT_SLACK
from .workload import Dtype, RoutingName, Workload

_DESCRIPTION = """\
Bytes, times and memory of dispatch and combine on machines that one does not have: lower bounds, from rates that were
measured or published. One number of ranks gives all about it, several give a line each. docs/planner.md explains it.
"""
_MIN_EXPERTS = Workload().num_experts


def main(argv: Sequence[str] | None = None, prog: str = "deep-a2a plan") -> int:
    """Prints the plan and returns 0, or 1 if its reader went away. Bad arguments exit with 2."""
    parser = make_parser(prog)
    options = parser.parse_args(argv)
    try:
        text = _published(options) if options.published else _plans(options)
    except (TypeError, ValueError) as error:
        parser.error(str(error))
    try:
        print(text)
        sys.stdout.flush()
    except BrokenPipeError:
        # What is left goes nowhere, or the interpreter would fail to write it when it ends.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    return 0


def make_parser(prog: str) -> argparse.ArgumentParser:
    default, machine = Workload(), Hardware()
    parser = argparse.ArgumentParser(
        prog=prog, description=_DESCRIPTION, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    job = parser.add_argument_group("job")
    job.add_argument(
        "--num-ranks", type=int, nargs="+", default=[default.num_ranks], metavar="N",
        help=f"ranks, a GPU each; several give a line each (default: {default.num_ranks})",
    )  # fmt: skip
    _add_int(job, "ranks-per-node", None, f"ranks of a node (default: {default.ranks_per_node}, or all if fewer)")
    _add_int(job, "num-tokens", default.num_tokens, "tokens of each rank (default: %(default)s)")
    _add_int(job, "hidden", default.hidden, "channels of a token (default: %(default)s)")
    _add_int(
        job, "num-experts", None, f"experts of all ranks (default: {_MIN_EXPERTS}, or one a rank if there are more)"
    )
    _add_int(job, "num-topk", default.num_topk, "experts of a token (default: %(default)s)")
    _add_choice(job, "dtype", get_args(Dtype), default.dtype, "rows of dispatch; combine moves BF16")
    _add_choice(job, "layout", get_args(LayoutName), default.layout, "rows that dispatch delivers")
    routing = parser.add_argument_group("routing")
    _add_choice(
        routing, "routing", get_args(RoutingName), default.routing,
        "how tokens choose experts; gate is DeepSeek-V3's, on random scores. zipf and gate are sampled (torch)",
    )  # fmt: skip
    _add_int(routing, "topk-groups", None, "groups of experts that a token keeps (default: all)")
    _add_int(routing, "num-groups", None, "groups of experts (default: one a node)")
    rates = parser.add_argument_group("hardware, in 1e9 bytes a second and direction")
    _add_int(rates, "num-sms", None, "SMs of a kernel (default: as many as it takes)")
    for name, value, text in (
        (
            "nvlink-gbs",
            machine.nvlink_push_gbs,
            "NVLink of a GPU; by itself it is {machine.nvlink_pull_gbs:g} for loads",
        ),
        ("network-gbs", machine.network_gbs, "network of a GPU: what puts reach, not the line rate"),
        ("sm-out-gbs", machine.sm_out_gbs, "what an SM stores"),
        ("sm-in-gbs", machine.sm_in_gbs, "what an SM loads"),
        ("memory-gbs", machine.memory_gbs, "memory of a GPU"),
    ):
        described = text.format(machine=machine)
        rates.add_argument(f"--{name}", type=float, metavar="X", help=f"{described} (default: {value:g})")
    memory = parser.add_argument_group("memory")
    memory.add_argument(
        "--slack", type=float, default=DEFAULT_SLACK, metavar="X",
        help="received rows that the bounded window has room for, over those expected (default: %(default)s)",
    )  # fmt: skip
    _add_int(memory, "staging-bytes", None, "room of a lane for rows between nodes (default: that of Buffer, 1 GiB)")
    output = parser.add_argument_group("output")
    output.add_argument("--json", action="store_true", help="print JSON: bytes, us, 1e9 bytes a second")
    output.add_argument(
        "--published",
        action="store_true",
        help="compare the model with published figures instead, with their workloads, SMs and GPUs",
    )
    output.add_argument(
        "--figures", type=Path, default=DEFAULT_FIGURES, metavar="FILE",
        help="of --published (default: bench/results/published.json of the clone that this runs from)",
    )  # fmt: skip
    return parser


def _add_int(group: argparse._ArgumentGroup, name: str, default: int | None, text: str) -> None:
    group.add_argument(f"--{name}", type=int, default=default, metavar="N", help=text)


def _add_choice(group: argparse._ArgumentGroup, name: str, choices: tuple[str, ...], default: str, text: str) -> None:
    described = f"{text}: {', '.join(choices)} (default: %(default)s)"
    group.add_argument(f"--{name}", choices=choices, default=default, metavar=name.upper(), help=described)


def _plans(options: argparse.Namespace) -> str:
    plans = [_plan(options, num_ranks) for num_ranks in options.num_ranks]
    if options.json:
        rates = {name: asdict(rate) for name, rate in RATES.items()}
        return json.dumps({"rates": rates, "plans": [plan.to_json() for plan in plans]}, indent=2)
    return format_plan(plans[0]) if len(plans) == 1 else scale_table(plans).text()


def _plan(options: argparse.Namespace, num_ranks: int) -> Plan:
    usual = Workload().ranks_per_node
    workload = Workload(
        num_ranks=num_ranks,
        ranks_per_node=max(1, min(num_ranks, usual)) if options.ranks_per_node is None else options.ranks_per_node,
        num_tokens=options.num_tokens,
        hidden=options.hidden,
        num_experts=max(_MIN_EXPERTS, num_ranks) if options.num_experts is None else options.num_experts,
        num_topk=options.num_topk,
        dtype=options.dtype,
        layout=options.layout,
        routing=options.routing,
        topk_groups=options.topk_groups,
        num_groups=options.num_groups,
        staging_bytes=options.staging_bytes,
    )
    return make_plan(workload, Hardware(**_given_rates(options)), options.num_sms, options.slack)


def _given_rates(options: argparse.Namespace) -> dict[str, float]:
    """Fields of `Hardware`."""
    given = {
        "nvlink_push_gbs": options.nvlink_gbs,
        "nvlink_pull_gbs": options.nvlink_gbs,
        "network_gbs": options.network_gbs,
        "sm_out_gbs": options.sm_out_gbs,
        "sm_in_gbs": options.sm_in_gbs,
        "memory_gbs": options.memory_gbs,
    }
    return {name: value for name, value in given.items() if value is not None}


def _published(options: argparse.Namespace) -> str:
    comparisons = compare(read_figures(options.figures), _given_rates(options))
    shown = [*listed(comparisons), *context(comparisons)]
    if options.json:
        figures: list[dict[str, Any]] = [
            {
                "figure": asdict(each.figure),
                "model_us": each.model.estimate.total_us,
                "model_gbs": each.model_gbs,
                "published_us": each.published_us,
                "deviation": each.deviation,
                "limit": each.model.estimate.limit,
                "reason": reason(each, comparisons),
            }
            for each in shown
        ]
        return json.dumps({"within": WITHIN, "figures": figures}, indent=2)
    return "\n".join(
        [
            f"deviation: the model's time over the published one; beyond {WITHIN:.0%} there is a reason",
            "",
            published_table(listed(comparisons), comparisons).text(),
            "",
            "context:",
            published_table(context(comparisons), comparisons).text(),
        ]
    )
