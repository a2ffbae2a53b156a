"""Writes the tables of docs/planner.md anew, from the planner and the result files.

    python bench/plan_page.py

A test compares the page with this. Run it after a change of the model, of published.json or of h200x4.json.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from pathlib import Path

from deep_a2a.benchmark.record import ResultFile
from deep_a2a.planner.measured import measured_kernels, measured_operations, measured_table
from deep_a2a.planner.plan import Plan, make_plan
from deep_a2a.planner.published import Comparison, compare, context, listed, read_figures
from deep_a2a.planner.rates import RATES
from deep_a2a.planner.report import (
    line_rate_table,
    published_table,
    rates_table,
    scale_table,
    spread_table,
    staging_table,
    window_table,
)
from deep_a2a.planner.tables import Table
from deep_a2a.planner.workload import RoutingName, Workload

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "planner.md"
FIGURES = ROOT / "bench" / "results" / "published.json"
RESULTS = ROOT / "bench" / "results" / "h200x4.json"
SCALES = (64, 128, 256, 512, 1024, 2048)
NODES_PER_TOKEN = 4

_MARKED = re.compile(r"(<!-- table: (\S+) -->)\n.*?(<!-- end -->)", re.DOTALL)


def scales(num_tokens: int, topk_groups: int | None) -> list[Plan]:
    """DeepSeek-V3 on 64 to 2048 ranks; from 512 on an expert a rank."""
    return [
        make_plan(
            Workload(
                num_ranks=ranks, num_experts=max(256, ranks), num_tokens=num_tokens, topk_groups=topk_groups,
            )
        )
        for ranks in SCALES
    ]  # fmt: skip


def windows() -> list[Plan]:
    """2 to 256 nodes."""
    ranks = [8 * nodes for nodes in (2, 4, 8, 16, 32, 64, 128, 256)]
    return [
        make_plan(
            Workload(num_ranks=each, num_experts=max(256, each), topk_groups=min(each // 8, NODES_PER_TOKEN)),
        )
        for each in ranks
    ]


def spreads() -> list[Plan]:
    """What is exact beside what is sampled."""
    kinds: Sequence[tuple[RoutingName, int, int | None]] = (
        ("uniform", 64, None), ("uniform", 64, 4), ("gate", 64, 4), ("zipf", 64, None), ("zipf", 64, 4),
        ("zipf", 4, None),
    )  # fmt: skip
    return [
        make_plan(Workload(num_ranks=ranks, ranks_per_node=min(8, ranks), routing=routing, topk_groups=groups))
        for routing, ranks, groups in kinds
    ]


def comparisons() -> list[Comparison]:
    return compare(read_figures(FIGURES))


def published() -> Table:
    every = comparisons()
    return published_table(listed(every), every)


def line_rate() -> Table:
    figures = [each for each in read_figures(FIGURES) if each.listed and each.num_nodes > 1]
    return line_rate_table(compare(figures), compare(figures, {"network_gbs": RATES["network_line"].value}))


def others() -> Table:
    every = comparisons()
    return published_table(context(every), every)


TABLES: dict[str, Callable[[], Table]] = {
    "rates": lambda: rates_table(RATES),
    "spreads": lambda: spread_table(spreads()),
    "kernels": lambda: measured_table(measured_kernels(FIGURES)),
    "operations": lambda: measured_table(measured_operations(ResultFile.read(RESULTS).records)),
    "published": published,
    "line": line_rate,
    "context": others,
    "limited": lambda: scale_table(scales(4096, NODES_PER_TOKEN)),
    "unlimited": lambda: scale_table(scales(4096, None)),
    "decode": lambda: scale_table(scales(128, NODES_PER_TOKEN)),
    "windows": lambda: window_table(windows()),
    "staging": lambda: staging_table(windows()),
}


def rewrite(page: str) -> str:
    """`page` with its tables as they are now."""
    return _MARKED.sub(lambda marked: f"{marked[1]}\n{TABLES[marked[2]]().markdown()}\n{marked[3]}", page)


def main() -> None:
    PAGE.write_text(rewrite(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
    print(PAGE)


if __name__ == "__main__":
    main()
