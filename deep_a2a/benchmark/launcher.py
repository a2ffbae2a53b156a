"""Runs a function on the ranks of a run: processes of this host that it starts, or this process if it is a rank."""

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

from deep_a2a.benchmark.launch import Launch

# What torch.multiprocessing takes from its submodules by * is unknown to type checkers.
mp: Any = torch.multiprocessing

Argument = TypeVar("Argument")
Result = TypeVar("Result")
Task = Callable[[dist.ProcessGroup, Argument], Result]

_GROUP_TIMEOUT_S = 300.0
_MEETING_POINT, _ANSWER = "ranks", "answer"


def run_ranks(
    task: Task[Argument, Result], argument: Argument, launch: Launch, timeout_s: float = _GROUP_TIMEOUT_S
) -> Result | None:
    """Calls `task(group, argument)` on every rank; returns what rank 0 returned, where it runs, and else None.

    `task` has to be a function of a module, argument and result have to be picklable. The ranks run with one torch
    thread each. If a rank fails the others of its host are ended and its traceback is raised; those of other hosts give
    up after `timeout_s`, which is how long the ranks wait for each other, at the start and later.
    """
    if launch.rank is not None:
        assert launch.meeting_point is not None, "a rank that was started has been told where to meet"
        result = _run_rank(task, argument, launch, launch.rank, launch.meeting_point, timeout_s)
        return result if launch.rank == 0 else None
    # Forked from a server that has loaded torch once.
    mp.set_forkserver_preload([__name__])
    with tempfile.TemporaryDirectory(prefix="deep_a2a_ranks_") as folder:
        mp.start_processes(
            _rank_main,
            args=(task, argument, launch, folder, timeout_s),
            nprocs=launch.local_ranks,
            daemon=True,
            start_method="forkserver",
        )
        if launch.host_idx > 0:
            return None
        return cast(Result, pickle.loads((Path(folder) / _ANSWER).read_bytes()))


def _rank_main(
    local_rank: int, task: Task[Argument, Result], argument: Argument, launch: Launch, folder: str, timeout_s: float
) -> None:
    rank = launch.host_idx * launch.local_ranks + local_rank
    # On one host a file as meeting point needs no free port.
    meeting_point = launch.meeting_point or (Path(folder) / _MEETING_POINT).as_uri()
    result = _run_rank(task, argument, launch, rank, meeting_point, timeout_s)
    if rank == 0:
        (Path(folder) / _ANSWER).write_bytes(pickle.dumps(result))


def _run_rank(
    task: Task[Argument, Result], argument: Argument, launch: Launch, rank: int, meeting_point: str, timeout_s: float
) -> Result:
    torch.set_num_threads(1)
    if launch.is_local:  # by the name of the host gloo would need one that resolves
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    timeout = timedelta(seconds=timeout_s)
    dist.init_process_group("gloo", meeting_point, rank=rank, world_size=launch.num_ranks, timeout=timeout)
    try:
        group = dist.group.WORLD
        assert group is not None
        result = task(group, argument)
        dist.barrier()  # nobody leaves while others still need its connections
        return result
    finally:
        dist.destroy_process_group()
