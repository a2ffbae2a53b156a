"""Numbers of tokens on both sides of where the blocks of a kernel begin to share the counting, on few and more SMs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
from backends import BACKENDS, GPU_NODES, USUAL_NODES, on_device_backends, on_topologies
from checks import check
from generators import LAYOUTS, PAYLOADS, ROUTINGS, Case, case_on, rounds
from pool import Pool

SHARED_ABOVE = 512  # tokens; up to there each block of a dispatch kernel counts them all
TOKENS = [
    (SHARED_ABOVE + 1, SHARED_ABOVE, 0, 1),
    (0, SHARED_ABOVE - 1, SHARED_ABOVE + 31, SHARED_ABOVE),
    (700, 1, 640, 513),
]
on_pairs = on_topologies({"emulated": ("1x2", "2x1"), "cuda": ("1x2", *(["2x1"] if GPU_NODES else []))}, 1)


def many_tokens(backend: str, layout: str, topology: str) -> Case:
    case = case_on(backend, topology=topology, layout=layout, hidden=16, local_experts=2, num_topk=2)
    return replace(case, max_tokens=700, tokens=TOKENS[0], expert_alignment=8 if layout == "expert" else 1)


@on_topologies({"cpu": ["1x4"], **{name: USUAL_NODES[name] for name in BACKENDS[1:]}})
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("tokens", TOKENS, ids=str)
def test_many_tokens(
    pools: Callable[[int], Pool], backend: str, topology: str, layout: str, tokens: tuple[int, ...]
) -> None:
    case = replace(many_tokens(backend, layout, topology), tokens=tokens)
    check(pools(4), [case, replace(case, routing="sparse", host_sync=False, seed=1)])


@on_pairs
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("num_sms", [1, 2, 3, 5])
def test_numbers_of_sms(pools: Callable[[int], Pool], backend: str, topology: str, layout: str, num_sms: int) -> None:
    """Few tokens and many, so that blocks count alone and together; some blocks find nothing to do."""
    many = replace(many_tokens(backend, layout, topology), num_sms=num_sms)
    few = case_on(backend, topology=topology, layout=layout, num_sms=num_sms)
    check(pools(2), [many, replace(few, tokens=(8, 1)), replace(few, tokens=(0, 0)), replace(few, routing="one_rank")])


@on_pairs
@pytest.mark.parametrize("layout", LAYOUTS)
def test_both_ways_in_one_buffer(pools: Callable[[int], Pool], backend: str, topology: str, layout: str) -> None:
    """Dispatches of few and of many tokens in turns, with the same counters, and ranks that count in different ways."""
    first = replace(many_tokens(backend, layout, topology), num_sms=3)
    turns = rounds(first, 6, 5)
    check(pools(2), [replace(case, tokens=(700, 3) if turn % 2 else (5, 600)) for turn, case in enumerate(turns)])


@on_device_backends
@pytest.mark.parametrize("routing", [routing for routing in ROUTINGS if routing != "repeated"])
def test_routings(pools: Callable[[int], Pool], backend: str, routing: str) -> None:
    cases = [replace(many_tokens(backend, layout, "1x3"), routing=routing, cached=True) for layout in LAYOUTS]
    check(pools(3), cases)


@on_device_backends
@pytest.mark.parametrize("payload", PAYLOADS)
def test_payloads(pools: Callable[[int], Pool], backend: str, payload: str) -> None:
    check(pools(2), [replace(many_tokens(backend, layout, "1x2"), payload=payload) for layout in LAYOUTS])
