"""The NVSHMEM transport's foundation over the emulator: jobs, symmetric memory and puts between processes."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from typing import Any

import pytest
import torch.distributed as dist
from backends import place
from network_rank import Rank, native_of, put_rounds
from pool import Pool, RankError
from small import SMALL, error_of, send_ones

import deep_a2a
from deep_a2a.nvshmem_job import leave
from deep_a2a.nvshmem_memory import allocate

TIMEOUT_S = 30.0


def puts(group: Any, ranks_per_node: int, network_seed: int | None, remote_is_mapped: bool) -> tuple[int, int]:
    rank = Rank(group, "emulated", ranks_per_node, TIMEOUT_S)
    rank.native.set_network_seed(None if network_seed is None else network_seed + rank.group.rank)
    arrived = put_rounds(rank, 12, seed=network_seed or 0, remote_is_mapped=remote_is_mapped)
    return arrived, rank.native.SymmetricHeap.nbytes()


@pytest.mark.parametrize("network_seed", [None, 1, 2])
@pytest.mark.parametrize("ranks_per_node", [1, 2])
def test_bytes_arrive_before_their_signals(
    pools: Callable[[int], Pool], ranks_per_node: int, network_seed: int | None
) -> None:
    answers = pools(4).run(puts, ranks_per_node, network_seed, True)
    assert all(arrived > 0 for arrived, _ in answers)


def node_of_its_own(group: Any, network_seed: int) -> str:
    os.environ["NVSHMEM_FAKE_HOST"] = f"node{group.rank() // 2}"
    puts(group, 2, network_seed, False)
    return Rank(group, "emulated", 2, TIMEOUT_S).job.describe()


def test_memory_of_other_nodes_is_not_mapped(fresh_pool: Callable[..., Pool]) -> None:
    described = fresh_pool(4).run(node_of_its_own, 3)
    assert [text.partition(",")[0] for text in described] == [f"PE {pe} of 4" for pe in range(4)]


def windows_come_and_go(group: Any) -> list[tuple[int, int]]:
    """Where windows lie, and how large the heap is, as they are taken and dropped."""
    rank = Rank(group, "emulated", 1, TIMEOUT_S)
    heap = rank.native.SymmetricHeap
    seen = []

    def take(nbytes: int) -> Any:
        window = allocate(rank.job, rank.group, nbytes, TIMEOUT_S)[rank.group.rank]
        memory = rank.memory(window)
        assert int(memory.max()) == 0, "a window has to be zeroed"
        memory.fill_(7)
        seen.append((window.address, heap.nbytes()))
        return window

    first, second = take(3 << 20), take(1 << 16)
    kept_by_one = first if rank.group.rank == 1 else None
    del first
    third = take(3 << 20)  # not where the first one is: one rank has it still
    del kept_by_one, third
    fourth = take(3 << 20)
    heap.lose(fourth)
    del fourth
    fifth = take(3 << 20)
    del second, fifth
    return seen


def test_ranges_are_used_again_once_all_ranks_have_given_them_back(fresh_pool: Callable[..., Pool]) -> None:
    for seen in fresh_pool(3).run(windows_come_and_go):
        (first, third, fourth, fifth) = (seen[i][0] for i in (0, 2, 3, 4))
        assert third != first and fourth == first and fifth == third
        assert seen[4][1] == seen[2][1], "nothing more was reserved than two windows take"


def part_of_a_job(group: Any) -> str:
    """A Buffer of some ranks of a job, which cannot reserve memory by themselves."""
    rank = Rank(group, "emulated", 1, TIMEOUT_S)
    spare = allocate(rank.job, rank.group, 1 << 20, TIMEOUT_S)
    del spare
    pairs = [dist.new_group([0, 2], backend="gloo"), dist.new_group([1, 3], backend="gloo")]
    mine = Rank(pairs[rank.group.rank % 2], "emulated", 1, TIMEOUT_S)
    assert mine.job.pes == ((0, 2), (1, 3))[rank.group.rank % 2] and not mine.job.is_whole
    # All four may still put into what the four of them have had.
    try:
        allocate(mine.job, mine.group, 1 << 16, TIMEOUT_S)
    except RuntimeError as error:
        return str(error)
    return ""


def test_part_of_a_job(fresh_pool: Callable[..., Pool]) -> None:
    for message in fresh_pool(4).run(part_of_a_job):
        assert "64 KiB" in message and "cannot reserve more by themselves" in message


def buffers_come_and_go(group: Any, faulty: int) -> list[int]:
    """How large the heap is after each of four Buffers; the one of number `faulty` ends with a fault."""
    native, sizes = native_of("emulated"), []
    for number in range(4):
        settings = {**SMALL, "timeout_s": 1.0 if number == faulty else TIMEOUT_S}
        settings |= {"hidden": 4096, "num_max_tokens_per_rank": 64}  # more than what is left of a block
        with deep_a2a.Buffer(group, **place("emulated", 1), **settings) as buffer:
            send_ones(buffer).release()
            if number == faulty and buffer.rank > 0:
                assert error_of(lambda buffer=buffer: send_ones(buffer))[0] != ""  # type: ignore[misc]
            elif number == faulty:
                time.sleep(2.0)
        sizes.append(native.SymmetricHeap.nbytes())
    return sizes


@pytest.mark.parametrize("faulty", [1, 4])
def test_buffers_use_memory_again(fresh_pool: Callable[..., Pool], faulty: int) -> None:
    """But not what puts may still come to."""
    for sizes in fresh_pool(2).run(buffers_come_and_go, faulty):
        first = sizes[0]
        assert sizes == [first] * 4 if faulty == 4 else sizes == [first, first, 2 * first, 2 * first]


def two_jobs(group: Any) -> str:
    """Ranks that are in jobs with others already."""
    halves = [dist.new_group([0, 1], backend="gloo"), dist.new_group([2, 3], backend="gloo")]
    Rank(halves[group.rank() // 2], "emulated", 1, TIMEOUT_S)
    try:
        Rank(group, "emulated", 1, TIMEOUT_S)
    except RuntimeError as error:
        return str(error)
    return ""


def test_ranks_of_different_jobs(fresh_pool: Callable[..., Pool]) -> None:
    for message in fresh_pool(4).run(two_jobs):
        assert "different NVSHMEM jobs: PEs [0, 1, 0, 1] of [2, 2, 2, 2]" in message


def leave_and_join_again(group: Any) -> tuple[str, int]:
    rank = Rank(group, "emulated", 1, TIMEOUT_S)
    window = allocate(rank.job, rank.group, 1 << 16, TIMEOUT_S)
    try:
        leave(rank.job, rank.group, TIMEOUT_S)
    except (RuntimeError, ValueError) as error:
        refused = str(error)
    del window
    leave(rank.job, rank.group, TIMEOUT_S)
    return refused, put_rounds(Rank(group, "emulated", 1, TIMEOUT_S), 4, seed=5, remote_is_mapped=True)


def test_a_job_ends_when_its_windows_are_gone(fresh_pool: Callable[..., Pool]) -> None:
    for refused, arrived in fresh_pool(2).run(leave_and_join_again):
        assert "still has windows" in refused and arrived > 0


def lost_in_the_network(group: Any) -> None:
    rank = Rank(group, "emulated", 1, 2.0)
    if rank.group.rank == 0:
        allocate(rank.job, rank.group, 1 << 16, 2.0)


def test_a_rank_that_does_not_come(fresh_pool: Callable[..., Pool]) -> None:
    with pytest.raises(RankError, match="CommTimeoutError"):
        fresh_pool(2).run(lost_in_the_network, deadline_s=30.0)
