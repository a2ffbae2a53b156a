"""Runs a function on N ranks: processes of this host that share a gloo group, or the ranks of a torchrun job."""

from __future__ import annotations

import os
import pickle
import tempfile
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar, cast

import torch
import torch.distributed as dist
import torch.multiprocessing

# What torch.multiprocessing takes from its submodules by * is unknown to type checkers.
mp: Any = torch.multiprocessing

Argument = TypeVar("Argument")
Result = TypeVar("Result")
Task = Callable[[dist.ProcessGroup, Argument], Result]

_GROUP_TIMEOUT = timedelta(minutes=5)
_MEETING_POINT, _ANSWER = "ranks", "answer"


def torchrun_ranks() -> int | None:
    """The world size, if torchrun (or the like) started this process as a rank, else None."""
    return int(os.environ["WORLD_SIZE"]) if {"RANK", "WORLD_SIZE"} <= os.environ.keys() else None


def run_ranks(task: Task[Argument, Result], argument: Argument, num_ranks: int) -> Result | None:
    """Calls `task(group, argument)` on every rank; returns what rank 0 returned (None on torchrun's other ranks).

    `task` has to be a function of a module, argument and result have to be picklable. The ranks run with one torch
    thread each. If a rank fails the others are ended and its traceback is raised. Under torchrun this process is a
    rank itself; ValueError if `num_ranks` is not the world size.
    """
    world_size = torchrun_ranks()
    if world_size is not None:
        if world_size != num_ranks:
            raise ValueError(f"num_ranks is {num_ranks}, but torchrun started {world_size} ranks")
        result = _run_rank(task, argument, int(os.environ["RANK"]), num_ranks, "env://")
        return result if int(os.environ["RANK"]) == 0 else None
    # Forked from a server that has loaded torch once. A file as meeting point needs no free port.
    mp.set_forkserver_preload([__name__])
    with tempfile.TemporaryDirectory(prefix="deep_a2a_ranks_") as folder:
        mp.start_processes(
            _rank_main,
            args=(task, argument, num_ranks, folder),
            nprocs=num_ranks,
            daemon=True,
            start_method="forkserver",
        )
        return cast(Result, pickle.loads((Path(folder) / _ANSWER).read_bytes()))


def _rank_main(rank: int, task: Task[Argument, Result], argument: Argument, num_ranks: int, folder: str) -> None:
    result = _run_rank(task, argument, rank, num_ranks, (Path(folder) / _MEETING_POINT).as_uri())
    if rank == 0:
        (Path(folder) / _ANSWER).write_bytes(pickle.dumps(result))


def _run_rank(
    task: Task[Argument, Result], argument: Argument, rank: int, num_ranks: int, meeting_point: str
) -> Result:
    torch.set_num_threads(1)
    # All ranks are on this host. By the name of the host gloo would need one that resolves.
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    dist.init_process_group("gloo", meeting_point, rank=rank, world_size=num_ranks, timeout=_GROUP_TIMEOUT)
    try:
        group = dist.group.WORLD
        assert group is not None
        result = task(group, argument)
        dist.barrier()  # nobody leaves while others still need its connections
        return result
    finally:
        dist.destroy_process_group()
