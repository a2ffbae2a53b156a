"""Rounds of dispatch and combine under compute-sanitizer, every rank a program of its own, on the GPUs there are.

    python tests/sanitize.py --tool racecheck --topology 2x1 --layout expert --payload 'cast fp8_e4m3:float32'

What comes out is compared with the oracle, too. Ends with 1 if the tool finds anything or a bit differs.
"""

from __future__ import annotations

import argparse
import os
import shlex
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from backends import device_of
from checks import check_case
from exchange import Turn, run_case
from generators import LAYOUTS, PAYLOADS, Case, case_on

import deep_a2a

TOOLS = ("memcheck", "racecheck", "synccheck", "initcheck")
MOST_TOKENS, HIDDEN, NUM_SMS = 20, 640, 2  # a kernel takes a hundred times as long; scales of a row: 20 bytes
TIMEOUT_S = 100.0


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tool", choices=(*TOOLS, "none"), default="memcheck", help="(default: %(default)s)")
    parser.add_argument("--topology", default="1x2", metavar="NxL", help="nodes and ranks per node (default: 1x2)")
    parser.add_argument("--layout", choices=LAYOUTS, default="rank", help="(default: %(default)s)")
    parser.add_argument("--payload", choices=PAYLOADS, default="bf16", help="(default: %(default)s)")
    parser.add_argument("--side", action="store_true", help="combine with a side payload")
    parser.add_argument("--rounds", type=int, default=3, metavar="N", help="each with a cached one (default: 3)")
    parser.add_argument("--backend", choices=("cuda", "emulated"), default="cuda", help="(default: %(default)s)")
    parser.add_argument("--rank", nargs=2, metavar=("RANK", "FILE"), help=argparse.SUPPRESS)
    return parser


def cases_of(options: argparse.Namespace) -> list[Case]:
    usual = case_on(
        options.backend, topology=options.topology, layout=options.layout, payload=options.payload, side=options.side,
        max_tokens=MOST_TOKENS, hidden=HIDDEN, num_sms=NUM_SMS, cached=True,
    )  # fmt: skip
    tokens = (MOST_TOKENS, 0, 7, 13, 1, MOST_TOKENS, 3, 8)
    return [
        replace(usual, seed=seed, tokens=(tokens[seed:] + tokens[:seed])[: usual.num_ranks])
        for seed in range(options.rounds)
    ]


def be_rank(rank: int, directory: Path, cases: Sequence[Case]) -> None:
    """Leaves what it has got in the directory."""
    num_ranks = cases[0].num_ranks
    dist.init_process_group("gloo", init_method=f"file://{directory / 'store'}", rank=rank, world_size=num_ranks)
    device_of(cases[0].backend)
    arguments: dict[str, Any] = {**cases[0].buffer_arguments(), "timeout_s": TIMEOUT_S}
    with deep_a2a.Buffer(dist.group.WORLD, **arguments) as buffer:
        turns = [run_case(buffer, case) for case in cases]
    torch.save(turns, directory / str(rank))
    dist.barrier()
    sys.stdout.flush()
    os._exit(0)  # NVSHMEM's own end, under the tool, takes longer than the rounds


def main(arguments: Sequence[str]) -> int:
    options = make_parser().parse_args(arguments)
    cases = cases_of(options)
    if options.rank is not None:
        be_rank(int(options.rank[0]), Path(options.rank[1]), cases)
    tool = ["compute-sanitizer", "--tool", options.tool, "--report-api-errors", "no", "--error-exitcode", "1"]
    environment = {**os.environ, "NVSHMEM_BOOTSTRAP_UID_SOCK_IFNAME": "lo", "NVSHMEM_DISABLE_NVLS": "1"}
    with tempfile.TemporaryDirectory() as directory:
        program = [sys.executable, __file__, *arguments, "--rank"]
        ranks = [
            subprocess.Popen(
                [*(tool if options.tool != "none" else []), *program, str(rank), directory], env=environment
            )
            for rank in range(cases[0].num_ranks)
        ]
        ended = [rank.wait() for rank in ranks]
        if any(ended):
            print(f"{shlex.join(arguments)}: the ranks ended with {ended}")
            return 1
        files = [Path(directory) / str(rank) for rank in range(len(ranks))]
        by_rank: list[list[list[Turn]]] = [torch.load(file, weights_only=False) for file in files]
    for case, *turns in zip(cases, *by_rank, strict=True):
        check_case(case, turns)
    print(f"{shlex.join(arguments)}: nothing found, no bit differs")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
