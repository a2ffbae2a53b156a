"""Takes result files on GPUs: the figures that have targets, everything, communication beside computation, nodes.

python bench/run_gpu.py [targets] [sweep] [overlap] [nodes] [--num-ranks N] [--ranks-per-node N] [--json FILE]

Writes FILE (default: bench/results/gpu_SUITE.json) after every cell, so that a run that is cut off leaves what it has.
On several hosts it is started as `deep-a2a bench` is: bench/README.md has the recipes.
"""

from __future__ import annotations

import argparse
import shlex
import sys
from pathlib import Path

from deep_a2a.benchmark.agreement import MeasurementError
from deep_a2a.benchmark.command import launch_of, run_cells
from deep_a2a.benchmark.options import add_launch_options
from deep_a2a.benchmark.suites import SUITES, suite

RESULTS = Path(__file__).parent / "results"


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(description="Takes result files on the GPUs of one host, or of several.")
    parser.add_argument("suites", nargs="*", metavar="SUITE", default=["targets"], help=", ".join(SUITES))
    parser.add_argument("--backend", choices=["cuda", "emulated"], default="cuda", help="emulated: sizes cut down")
    add_launch_options(parser)
    parser.add_argument(
        "--ranks-per-node", type=int, metavar="N",
        help="ranks of a node (default: those of a host; suite nodes on one host: half of them)",
    )  # fmt: skip
    parser.add_argument(
        "--json", type=Path, metavar="FILE", help="where to write; with several suites, their names follow"
    )
    options = parser.parse_args(arguments)
    unknown = [name for name in options.suites if name not in SUITES]
    if unknown:
        parser.error(f"SUITE is {unknown[0]!r}; expected one of {', '.join(SUITES)}")
    try:
        launch = launch_of(options)
        if len(options.suites) > 1 and not launch.is_alone:
            raise ValueError(
                f"SUITE is {' '.join(options.suites)}; expected one at a time on several hosts or in ranks"
            )
        ranks_per_node = options.ranks_per_node or launch.local_ranks
        cells = {name: suite(name, options.backend, launch.num_ranks, ranks_per_node) for name in options.suites}
    except ValueError as error:
        parser.error(str(error))
    status = 0
    for name in options.suites:
        path: Path = options.json or RESULTS / "gpu.json"
        if options.json is None or len(options.suites) > 1:
            path = path.with_stem(f"{path.stem}_{name}")
        try:
            run_cells(cells[name], f"python bench/run_gpu.py {shlex.join(arguments)}".rstrip(), path, launch)
        except MeasurementError as error:
            print(error, file=sys.stderr)
            status = 1
    return status


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
