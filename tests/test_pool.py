"""The pool itself: what a failing, dying or hanging rank looks like, and that the pool is usable again after it."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable

import pytest
import torch
import torch.distributed as dist
from pool import Pool, RankError


def add_ranks(group: dist.ProcessGroup, tensor: torch.Tensor) -> torch.Tensor:
    tensor = tensor + dist.get_rank(group)
    dist.all_reduce(tensor, group=group)
    return tensor


def fail(group: dist.ProcessGroup) -> None:
    if dist.get_rank(group) == 1:
        raise ArithmeticError("rank 1 cannot count")
    dist.barrier(group)


def die(group: dist.ProcessGroup) -> None:
    if dist.get_rank(group) == 0:
        os.kill(os.getpid(), signal.SIGKILL)


def hang(group: dist.ProcessGroup) -> None:
    time.sleep(60.0 * dist.get_rank(group))


@pytest.fixture
def pool(fresh_pool: Callable[[int], Pool]) -> Pool:
    return fresh_pool(2)


def check_usable(pool: Pool) -> None:
    for dtype in [torch.float32, torch.int64]:
        tensor = torch.arange(6, dtype=dtype).reshape(2, 3)
        for result in pool.run(add_ranks, tensor):
            assert torch.equal(result, 2 * tensor + 1)


def test_failing_rank(pool: Pool) -> None:
    start = time.monotonic()
    with pytest.raises(RankError, match=r"---- rank 1 ----\n(.*\n)*.*in fail\n(.*\n)*ArithmeticError: rank 1 cannot"):
        pool.run(fail)
    assert time.monotonic() - start < 30
    check_usable(pool)


def test_dying_rank(pool: Pool) -> None:
    with pytest.raises(RankError, match="---- rank 0 ----\nthe process ended with exit code -9"):
        pool.run(die)
    assert pool.run(die, killed={0}) == [None, None]
    with pytest.raises(RankError, match="rank was to be killed, but its call returned"):
        pool.run(die, killed={0, 1})
    check_usable(pool)


def test_hanging_rank(pool: Pool) -> None:
    with pytest.raises(RankError, match=r"ranks \[1\] did not finish within 1.0 s(.*\n)*.*in hang\n"):
        pool.run(hang, deadline_s=1.0)
    check_usable(pool)


def test_empty_and_float8_tensors_travel(pool: Pool) -> None:
    tensors = [torch.empty(0, 3), torch.tensor(2.5), torch.tensor([1.0, -448.0]).to(torch.float8_e4m3fn)]
    for result in pool.run(echo, tensors):
        for sent, received in zip(tensors, result, strict=True):
            assert received.dtype == sent.dtype and received.shape == sent.shape
            assert torch.equal(received.float(), sent.float())


def echo(group: dist.ProcessGroup, value: list[torch.Tensor]) -> list[torch.Tensor]:
    return value
