"""Any case against the oracle, and many rounds on the same buffers."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import hypothesis
import pytest
from checks import check
from exchange import run_cases
from generators import LAYOUTS, TOPOLOGIES, Case, cases, rounds
from pool import Pool, dumps

NUM_BUFFERS = 20
ROUNDS_PER_BUFFER = 50


@hypothesis.given(case=cases())
@hypothesis.settings(max_examples=150)
def test_any_case(pools: Callable[[int], Pool], case: Case) -> None:
    check(pools(case.num_ranks), [case])


def random_buffer(seed: int) -> Case:
    numbers = random.Random(seed)
    topology = list(TOPOLOGIES)[seed % len(TOPOLOGIES)]
    local_experts = numbers.randint(1, 5)
    case = Case(
        topology=topology,
        layout=LAYOUTS[seed % len(LAYOUTS)],
        hidden=numbers.choice([8, 16, 48, 128, 144]),
        local_experts=local_experts,
        max_tokens=numbers.randint(1, 7),
        expert_alignment=numbers.choice([1, 1, 3, 8]),
        num_slots=numbers.randint(1, 3),
        network_seed=numbers.choice([None, seed]),
    )
    return replace(case, num_topk=numbers.randint(1, min(8, case.num_experts)))


@pytest.mark.parametrize("seed", range(NUM_BUFFERS))
def test_thousand_rounds(pools: Callable[[int], Pool], seed: int) -> None:
    """20 buffers of random shapes, 50 rounds each: other tokens, routing, payload and modes every time."""
    case = random_buffer(seed)
    check(pools(case.num_ranks), rounds(case, ROUNDS_PER_BUFFER, seed))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_delivery_order_does_not_show(pools: Callable[[int], Pool], layout: str) -> None:
    """Network puts late, in pieces and overtaking each other: the same bits, by every seed, as without disturbance."""
    modes: dict[str, Any] = {"zero_padding": True, "cached": True, "side": True, "local_experts": 1, "num_topk": 3}
    if layout == "rank":  # long rows, so that a stream has several chunks
        modes |= {"hidden": 7168, "max_tokens": 20, "tokens": (20, 3, 0, 17, 8, 20, 1, 9)}
    for topology in ["2x4", "8x1"]:
        calm = [Case(topology, layout, seed=seed, **modes) for seed in range(2)]
        check(pools(8), calm)
        expected = dumps(pools(8).run(run_cases, calm))
        for network_seed in range(8):
            disturbed = [replace(case, network_seed=network_seed) for case in calm]
            assert dumps(pools(8).run(run_cases, disturbed)) == expected


def test_two_runs_agree(pools: Callable[[int], Pool]) -> None:
    turns = [replace(case, zero_padding=True) for layout in LAYOUTS for case in rounds(Case(layout=layout), 10, 7)]
    assert dumps(pools(8).run(run_cases, turns)) == dumps(pools(8).run(run_cases, turns))
