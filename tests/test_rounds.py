"""Many rounds on the same buffers: other tokens, routing, payload and modes every time."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import replace

import pytest
from backends import NODES, on_backends
from checks import check
from generators import LAYOUTS, Case, case_on, rounds
from pool import Pool

NUM_BUFFERS = 20
ROUNDS_PER_BUFFER = {"cpu": 50, "emulated": 15, "cuda": 100}
DEADLINE_S = 300.0


def random_buffer(backend: str, seed: int) -> Case:
    numbers = random.Random(seed)
    turn, place = divmod(seed, len(NODES[backend]))
    topology = NODES[backend][place]
    local_experts = numbers.randint(1, 5)
    case = case_on(
        backend,
        topology=topology,
        layout=LAYOUTS[(place + turn) % len(LAYOUTS)],  # another one each time that a topology comes
        hidden=numbers.choice([8, 16, 48, 128, 144]),
        local_experts=local_experts,
        max_tokens=numbers.randint(1, 7),
        expert_alignment=numbers.choice([1, 1, 3, 8]),
        num_slots=numbers.randint(1, 3),
        network_seed=numbers.choice([None, seed]),
    )
    case = replace(case, num_topk=numbers.randint(1, min(8, case.num_experts)))
    case = replace(case, staging_tokens=numbers.choice([None, 1, 1, 2, 3]))
    if backend == "cpu":
        return case
    return replace(case, num_sms=numbers.choice([1, 2, 3, 5]), stream=numbers.choice(["own", "current"]))


@on_backends
@pytest.mark.parametrize("seed", range(NUM_BUFFERS))
def test_many_rounds(pools: Callable[[int], Pool], backend: str, seed: int) -> None:
    """1000 on the CPU, 2000 on GPUs."""
    case = random_buffer(backend, seed)
    check(pools(case.num_ranks), rounds(case, ROUNDS_PER_BUFFER[backend], seed), DEADLINE_S)
