"""Takes bench/results/cpu.json: the cpu backend beside gloo, at the size that the README quotes. Wants a quiet machine.

python bench/run_cpu.py [FILE]
"""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

from deep_a2a.benchmark.cell import Cell
from deep_a2a.benchmark.command import run_cells

CHANGES: tuple[dict[str, Any], ...] = (
    {"dtype": "fp8"},
    {"dtype": "fp8_cast"},
    {"layout": "expert"},
    {"cached": True},
    {"output": "owned", "input": "copied"},
)
RESULTS = Path(__file__).parent / "results"


def cells() -> list[Cell]:
    """8 ranks as one node and as two; then one change at a time."""
    one_node, two_nodes = Cell(ranks_per_node=8), Cell(ranks_per_node=4)
    changed = [replace(two_nodes, **change) for change in CHANGES]
    return [one_node, two_nodes, *changed]


def main() -> None:
    path = Path(sys.argv[1]) if len(sys.argv) > 1 else RESULTS / "cpu.json"
    run_cells(cells(), "python bench/run_cpu.py", path)


if __name__ == "__main__":
    main()
