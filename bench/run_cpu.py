"""Takes bench/results/cpu.json: the cpu backend beside gloo, at the size that the README quotes. Wants a quiet machine.

python bench/run_cpu.py [FILE]
"""

from __future__ import annotations

import itertools
import sys
from dataclasses import replace
from pathlib import Path
from typing import get_args

from deep_a2a.benchmark.cell import Cell
from deep_a2a.benchmark.command import run_cells
from deep_a2a.benchmark.record import Dtype

RESULTS = Path(__file__).parent / "results"


def cells() -> list[Cell]:
    """8 ranks as one node and as two, with every payload; then one change at a time from BF16 rows by rank."""
    one_node, two_nodes = Cell(ranks_per_node=8), Cell(ranks_per_node=4)
    payloads = itertools.product((one_node, two_nodes), get_args(Dtype))
    chosen = [replace(base, dtype=dtype) for base, dtype in payloads]
    chosen += [
        replace(two_nodes, layout="expert"),
        replace(two_nodes, layout="padded"),
        replace(two_nodes, cached=True),
    ]
    chosen += [
        replace(two_nodes, output="owned"),
        replace(two_nodes, input="copied"),
        replace(two_nodes, routing="zipf"),
    ]
    return chosen


def main() -> None:
    path = Path(sys.argv[1]) if len(sys.argv) > 1 else RESULTS / "cpu.json"
    run_cells(cells(), "python bench/run_cpu.py", path)


if __name__ == "__main__":
    main()
