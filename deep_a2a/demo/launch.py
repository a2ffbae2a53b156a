"""Starts the ranks of the demo: as processes of its own, or as torchrun has started them."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Sequence
from datetime import timedelta
from multiprocessing import set_forkserver_preload
from pathlib import Path

import torch
import torch.distributed as dist
from torch.multiprocessing.spawn import start_processes

from deep_a2a.demo.config import DemoConfig, parse_config, started_by_torchrun
from deep_a2a.demo.corpus import load_corpus
from deep_a2a.demo.report import Progress, headline, plot, summary
from deep_a2a.demo.train import History, train_distributed, train_single_process


def main(argv: Sequence[str] | None = None, prog: str = "deep-a2a demo") -> int:
    """Train with the settings in `argv`, print the results, write the curves. Returns the exit status."""
    config, single_process = parse_config(argv, prog)
    if single_process:
        print(headline(config, single_process), flush=True)
        _show(config, train_single_process(config, load_corpus(config.corpus_bytes), Progress(config.steps)))
    elif started_by_torchrun():
        _run_rank(config, "env://", rank=int(os.environ["RANK"]))
    else:
        _start_ranks(config)
    return 0


def _start_ranks(config: DemoConfig) -> None:
    # Forked from a server that has loaded torch once: on two cores, eight interpreters that each load it take as long
    # as many steps of training. A file as the meeting point needs no free port.
    set_forkserver_preload([__name__])
    with tempfile.TemporaryDirectory(prefix="deep_a2a_demo_") as folder:
        meeting_point = (Path(folder) / "ranks").as_uri()
        start_processes(  # type: ignore[no-untyped-call]
            _run_spawned, args=(config, meeting_point), nprocs=config.num_ranks, start_method="forkserver"
        )


def _run_spawned(rank: int, config: DemoConfig, meeting_point: str) -> None:
    _run_rank(config, meeting_point, rank)


def _run_rank(config: DemoConfig, meeting_point: str, rank: int) -> None:
    torch.set_num_threads(1)
    # All ranks are on this host, whose name need not resolve.
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    dist.init_process_group(
        "gloo",
        init_method=meeting_point,
        rank=rank,
        world_size=config.num_ranks,
        timeout=timedelta(seconds=config.timeout_s),
    )
    try:
        group = dist.group.WORLD
        assert group is not None
        if rank == 0:
            print(headline(config, single_process=False), flush=True)
        progress = Progress(config.steps) if rank == 0 else None
        history = train_distributed(config, load_corpus(config.corpus_bytes), group, progress)
        if rank == 0:
            _show(config, history)
    finally:
        dist.destroy_process_group()


def _show(config: DemoConfig, history: History) -> None:
    print(summary(history))
    print(plot(history, config.plot), flush=True)
