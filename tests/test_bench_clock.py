"""How the benchmark starts its ranks, releases them together, and finds what memory carries."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from pool import Pool

from deep_a2a.benchmark.ceiling import CopyCeiling
from deep_a2a.benchmark.clock import Gate
from deep_a2a.benchmark.launch import Launch
from deep_a2a.benchmark.launcher import run_ranks


def start_too_late(group: dist.ProcessGroup) -> list[bool]:
    """Whether two measurements were taken, the first of them with no time to agree on its start."""
    gate = Gate(group, margin_ns=0)
    return [gate.measure(lambda: None) is not None, Gate(group, margin_ns=10**9).measure(lambda: None) is not None]


def test_gate_refuses_a_late_start(pools: Callable[[int], Pool]) -> None:
    assert pools(4).run(start_too_late) == [[False, True]] * 4


def neighbour_memory(group: dist.ProcessGroup) -> tuple[bool, float]:
    """Whether the window of this rank's neighbour holds what this rank copied, and the speed of a round of 1 ms."""
    ceiling = CopyCeiling(group, 3_000_000)
    dist.barrier(group=group)
    window = torch.frombuffer(ceiling.window, dtype=torch.uint8).view(3, -1)
    return all(torch.equal(part, ceiling.piece) for part in window), ceiling.gbs(1000.0)


def test_ceiling_counts_what_it_copies(pools: Callable[[int], Pool]) -> None:
    assert pools(4).run(neighbour_memory) == [(True, 3 * 2**20 / 1e6)] * 4


def start_together(group: dist.ProcessGroup) -> tuple[int, bool]:
    """How often the operation ran, and whether the ranks agree on how long it took."""
    ran: list[int] = []
    microseconds = Gate(group).measure(lambda: ran.append(1))
    times: list[Any] = [None] * dist.get_world_size(group)
    dist.all_gather_object(times, microseconds, group=group)
    return len(ran), len(set(times)) == 1


def test_gate_gives_every_rank_the_same_time(pools: Callable[[int], Pool]) -> None:
    assert pools(4).run(start_together) == [(1, True)] * 4


def double_on_rank_0(group: dist.ProcessGroup, value: int) -> int | None:
    if value < 0:
        raise ValueError(f"value is {value}, and this is rank {dist.get_rank(group)}")
    return 2 * value if dist.get_rank(group) == 0 else None


def test_launcher() -> None:
    assert run_ranks(double_on_rank_0, 21, Launch(ranks_per_host=2)) == 42
    with pytest.raises(Exception, match="value is -1, and this is rank"):
        run_ranks(double_on_rank_0, -1, Launch(ranks_per_host=2))
