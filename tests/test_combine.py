"""Combine: numerics by hand and against the oracle, the side payload, and handles that are kept and used again."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import exchange
import pytest
import torch
import torch.distributed as dist
from backends import device_of, on_nodes, on_topologies, on_usual_nodes, place
from checks import check, check_case
from exchange import Turn
from generators import LAYOUTS, Case, case_on
from pool import Pool

import deep_a2a

CASES: dict[str, dict[str, Any]] = {
    "not weighted": {"weighted": False},
    "side": {"side": True},
    "side, topk 32": {"side": True, "num_topk": 32, "local_experts": 8, "routing": "sparse"},
    "side, fixed shapes": {"side": True, "host_sync": False},
    "side, cached": {"side": True, "cached": True},
    "side, no tokens": {"side": True, "tokens": (0,) * 8},
    "side, nowhere": {"side": True, "routing": "nowhere"},
    "side, rounds": {"side": True, "staging_tokens": 1, "cached": True},
    "side, rounds of several chunks": {
        "side": True,
        "hidden": 4096,
        "max_tokens": 50,
        "staging_tokens": 20,
        "tokens": (50, 49, 0, 20, 41, 50, 7, 1),
        "network_seed": 2,
    },
    "many experts per rank": {"local_experts": 16, "num_topk": 16},
    "one rank sums all": {"local_experts": 16, "num_topk": 16, "routing": "one_rank"},
    "one expert twice": {"routing": "repeated", "num_topk": 8, "local_experts": 2, "side": True},
    "odd vector length": {"hidden": 8 * 17, "num_topk": 8},
    "wide rows": {"hidden": 4096, "num_topk": 8},
    # Sums lie at places of their own for every rank and token that there can be, however few rows are received.
    "few rows of many": {"max_tokens": 64, "expert_capacity": 14},
    # More terms than half of a ring's stages, and fewer than all, in rows of several chunks.
    **{
        f"{terms} terms of several chunks": {
            "hidden": 4096,
            "local_experts": terms,
            "num_topk": terms,
            "routing": "one_rank",
            "weighted": False,
            "max_tokens": 12,
            "tokens": (12, 11, 0, 7, 12, 12, 3, 1),
        }
        for terms in (5, 6, 7)
    },
}


@on_usual_nodes
@pytest.mark.parametrize("name", CASES)
def test_case(pools: Callable[[int], Pool], backend: str, topology: str, name: str) -> None:
    cases = [case_on(backend, topology=topology, **{"layout": layout, **CASES[name]}) for layout in LAYOUTS]
    check(pools(cases[0].num_ranks), cases)


@on_topologies()
def test_topology(pools: Callable[[int], Pool], backend: str, topology: str) -> None:
    """Many terms: the order of ranks and nodes is in every sum."""
    num_topk = min(32, 4 * Case(topology).num_ranks)
    case = case_on(backend, topology=topology, local_experts=4, num_topk=num_topk, side=True)
    check(pools(case.num_ranks), [replace(case, layout=layout) for layout in LAYOUTS])


# One token on rank 0 of four ranks, two experts on each rank: experts, values of their rows, and the sum with two nodes
# and with one. 257 is a tie of BF16 and becomes 256.
BY_HAND: dict[str, tuple[list[int], list[float], float, float]] = {
    "no expert": ([-1, -1, -1], [], 0.0, 0.0),
    "negative zero survives": ([0, -1, -1], [-0.0], -0.0, -0.0),
    "negative zero of the other node survives": ([-1, 7, -1], [0.0, -0.0], -0.0, -0.0),
    "negative zeros of three ranks": ([0, 2, 4], [-0.0, -0.0, -0.0], -0.0, -0.0),
    "zeros of both signs": ([0, 2, -1], [-0.0, 0.0], 0.0, 0.0),
    "own node stays FP32": ([0, 2, 4], [256.0, 1.0, 1.0], 258.0, 258.0),
    "other node is rounded": ([4, 6, 0], [256.0, 1.0, 1.0], 256.0, 258.0),
    "a rank rounds its own sum": ([0, 1, 2], [256.0, 1.0, 1.0], 256.0, 256.0),
    "a node is summed first": ([0, 4, 6], [2.0**30, -(2.0**30), 1.0], 0.0, 1.0),
    "ranks ascend, not slots": ([6, 4, 2], [1.0, 2.0**30, -(2.0**30)], 0.0, 1.0),
    "NaN": ([0, -1, -1], [float("nan")], float("nan"), float("nan")),
    "infinities": ([0, 2, -1], [float("inf"), float("-inf")], float("nan"), float("nan")),
}


def combine_by_hand(group: dist.ProcessGroup, backend: str, ranks_per_node: int) -> list[torch.Tensor]:
    """Weight 1 everywhere; the value of an expert's row is that of the table."""
    rank, device, sums = dist.get_rank(group), device_of(backend), []
    sizes: dict[str, Any] = {"hidden": 8, "num_experts": 8, "num_topk": 3, "num_max_tokens_per_rank": 1}
    with deep_a2a.Buffer(group, layout="expert", **sizes, **place(backend, ranks_per_node)) as buffer:
        for experts, values, _, _ in BY_HAND.values():
            value_of = dict(zip(experts, values, strict=False))
            num_tokens = 1 if rank == 0 else 0
            x = torch.ones(num_tokens, 8, dtype=torch.bfloat16, device=device)
            result = buffer.dispatch(x, torch.tensor([experts], device=device)[:num_tokens])
            rows = torch.empty(result.x.shape, dtype=torch.bfloat16, device=device)
            for expert in range(2):
                assert result.expert_offsets is not None
                begin, count = int(result.expert_offsets[expert]), int(result.rows_per_expert[expert])
                rows[begin : begin + count] = value_of.get(2 * rank + expert, torch.nan)
            sums.append(buffer.combine(rows, result.handle).x.cpu())
            result.release()
    return sums


@on_nodes(4, [2, 4])
def test_by_hand(pools: Callable[[int], Pool], backend: str, ranks_per_node: int) -> None:
    sums = pools(4).run(combine_by_hand, backend, ranks_per_node)[0]
    got = {name: bf16_bits(row[0, 0]) for name, row in zip(BY_HAND, sums, strict=True)}
    wanted = {name: sums[ranks_per_node // 4] for name, (_, _, *sums) in BY_HAND.items()}
    assert got == {name: bf16_bits(torch.tensor(value)) for name, value in wanted.items()}


def bf16_bits(value: torch.Tensor) -> str:
    """A NaN that has not been made by combine is given the bits that combine gives."""
    if value.dtype == torch.float32:
        value = torch.tensor(0x7FFF).to(torch.uint16).view(torch.bfloat16) if value.isnan() else value.bfloat16()
    return f"{int(value.view(torch.int16)) & 0xFFFF:#06x}"


def keep_handles(group: dist.ProcessGroup, cases: list[Case]) -> list[list[Turn]]:
    """All forward dispatches, then for each, last first, a combine, a cached dispatch and another combine."""
    arguments = cases[0].buffer_arguments()
    with deep_a2a.Buffer(group, **arguments) as buffer:
        forward = [exchange.dispatch(buffer, case) for case in cases]
        received = [exchange.copy_result(result) for result in forward]
        for result in forward:
            result.release()
        turns: list[list[Turn]] = []
        for case, result, first in reversed(list(zip(cases, forward, received, strict=True))):
            sums = exchange.combine(buffer, case, 0, result)
            backward, _ = exchange.run_turn(buffer, case, 1, result.handle)
            turns.append([exchange.turn_of(first, sums), backward])
        return turns[::-1]


@on_usual_nodes
@pytest.mark.parametrize("staging_tokens", [None, 2])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_many_handles_alive(
    pools: Callable[[int], Pool], backend: str, topology: str, layout: str, staging_tokens: int | None
) -> None:
    """Handles own what they know: from forward to backward, over more dispatches than there are slots in between."""
    usual = case_on(backend, topology=topology, layout=layout, cached=True, output="owned", side=True)
    usual = replace(usual, staging_tokens=staging_tokens)
    cases = [
        replace(usual, seed=seed, routing=routing)
        for seed, routing in enumerate(["uniform", "sparse", "one_rank", "nowhere", "uniform"])
    ]
    for case, *by_rank in zip(cases, *pools(cases[0].num_ranks).run(keep_handles, cases), strict=True):
        check_case(case, by_rank)
