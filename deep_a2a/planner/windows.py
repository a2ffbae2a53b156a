"""What the window of a rank takes, from the very table that `Buffer.memory` prints."""

from __future__ import annotations

import math
from dataclasses import dataclass

from deep_a2a.memory import MemoryTable, table_of

from .spread import Spread
from .workload import Workload

DEFAULT_SLACK = 1.25
# The prefixes of regions that grow with the tokens; what is left is flags and lent inputs.
_PARTS = {"received": "recv_", "combine": "combine_", "between nodes": "net_", "counts": "counts"}


@dataclass(frozen=True)
class WindowPlan:
    """A window with the default capacity, which no routing can exceed, and one with room for the expected rows.

    Attributes:
        worst: the default of ``Buffer``.
        bounded: with ``max_recv_rows`` rows, None in layout `padded` (see ``expert_capacity`` there).
        max_recv_rows: the rows that the busiest rank expects, times the slack.
    """

    worst: MemoryTable
    bounded: MemoryTable | None
    max_recv_rows: int | None


def plan_window(workload: Workload, spread: Spread, slack: float = DEFAULT_SLACK) -> WindowPlan:
    """`slack`: room for rows over their expected number.

    Raises:
        ValueError: ``slack`` is below 1.
    """
    if not math.isfinite(slack) or slack < 1:
        raise ValueError(f"slack is {slack}, expected a number of at least 1")
    worst = table_of(workload.settings().shape())
    if workload.layout == "padded":
        return WindowPlan(worst, None, None)
    hits = spread.rank_hits if workload.layout == "rank" else spread.rank_slots
    rows = math.ceil(slack * workload.num_tokens * workload.num_ranks * max(hits))
    capacity = min(rows, workload.num_ranks * workload.num_tokens * workload.num_topk)
    return WindowPlan(worst, table_of(workload.settings(capacity).shape()), capacity)


def part_bytes(table: MemoryTable) -> dict[str, int]:
    """The table in a few lines; their sum is its total."""
    parts = dict.fromkeys((*_PARTS, "other"), 0)
    for region in table.regions:
        name = next((name for name, prefix in _PARTS.items() if region.name.startswith(prefix)), "other")
        parts[name] += region.bytes
    return parts
