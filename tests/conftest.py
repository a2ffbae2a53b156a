"""Fixtures of all tests: pools of ranks, kept for the session, and the marker of tests that need a GPU."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator

import hypothesis
import pytest
import torch
from pool import Pool

# Repeatable by default; `--hypothesis-profile=explore` looks further, at other random cases each time.
hypothesis.settings.register_profile("repeatable", deadline=None, derandomize=True, database=None)
hypothesis.settings.register_profile("explore", deadline=None, max_examples=500, database=None)
hypothesis.settings.load_profile("repeatable")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():
        return
    reason = "needs a CUDA GPU, and torch.cuda.is_available() is False here"
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason=reason))


@pytest.fixture(scope="session")
def pools() -> Iterator[Callable[[int], Pool]]:
    """`pools(num_ranks)` is the session's pool of that many ranks."""
    by_size: dict[int, Pool] = {}

    def get(num_ranks: int) -> Pool:
        return by_size.setdefault(num_ranks, Pool(num_ranks))

    yield get
    for pool in by_size.values():
        pool.close()


@pytest.fixture
def fresh_pool() -> Iterator[Callable[..., Pool]]:
    """`fresh_pool(num_ranks, **environment)` is a pool for one test: for those that kill a rank or leave one behind."""
    started: list[Pool] = []

    def get(num_ranks: int, **environment: str) -> Pool:
        started.append(Pool(num_ranks, environment))
        return started[-1]

    yield get
    for pool in started:
        pool.kill()


@pytest.fixture(autouse=True, scope="session")
def one_thread() -> None:
    """The oracle shares two cores with eight ranks."""
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    torch.set_num_threads(1)
