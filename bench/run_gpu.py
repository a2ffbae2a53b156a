"""Takes result files on GPUs: the figures that have targets, everything, or communication beside computation.

python bench/run_gpu.py [targets] [sweep] [overlap] [--num-ranks N] [--json FILE]

Writes FILE (default: bench/results/gpu_SUITE.json) after every cell, so that a run that is cut off leaves what it has.
"""

from __future__ import annotations

import argparse
import shlex
import sys
from pathlib import Path

from deep_a2a.benchmark.agreement import MeasurementError
from deep_a2a.benchmark.command import default_ranks, run_cells
from deep_a2a.benchmark.suites import SUITES, suite

RESULTS = Path(__file__).parent / "results"


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(description="Takes result files on the GPUs of this host.")
    parser.add_argument("suites", nargs="*", metavar="SUITE", default=["targets"], help=", ".join(SUITES))
    parser.add_argument("--num-ranks", type=int, metavar="N", help="ranks, which take GPUs in turn (default: one each)")
    parser.add_argument("--backend", choices=["cuda", "emulated"], default="cuda", help="emulated: sizes cut down")
    parser.add_argument(
        "--json", type=Path, metavar="FILE", help="where to write; with several suites, their names follow"
    )
    options = parser.parse_args(arguments)
    unknown = [name for name in options.suites if name not in SUITES]
    if unknown:
        parser.error(f"SUITE is {unknown[0]!r}; expected one of {', '.join(SUITES)}")
    num_ranks = default_ranks(options.backend) if options.num_ranks is None else options.num_ranks
    status = 0
    for name in options.suites:
        path: Path = options.json or RESULTS / "gpu.json"
        if options.json is None or len(options.suites) > 1:
            path = path.with_stem(f"{path.stem}_{name}")
        try:
            cells = suite(name, options.backend, num_ranks)
            run_cells(cells, f"python bench/run_gpu.py {shlex.join(arguments)}".rstrip(), path)
        except MeasurementError as error:
            print(error, file=sys.stderr)
            status = 1
    return status


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
