"""Lanes beside each other, and the halves of operations apart."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace

import data
import exchange
import pytest
import torch
import torch.distributed as dist
from backends import device_of, on_usual_nodes, wait_for
from checks import check_case
from exchange import Turn
from generators import LAYOUTS, Case, case_on
from pool import Pool

import deep_a2a


def use_two_lanes(group: dist.ProcessGroup, cases: list[Case]) -> list[list[Turn]]:
    """The combine of one micro-batch on lane 1 beside the dispatch of the next on lane 0, both asynchronous."""
    rank = dist.get_rank(group)
    turns: list[list[Turn]] = []
    with deep_a2a.Buffer(group, **cases[0].buffer_arguments()) as buffer:
        pending = None
        for case in cases:
            result = buffer.dispatch(*inputs(case, rank), lane=0, async_op=True)
            if pending is not None:
                turns.append(finish(*pending))
            wait_for(result.event)
            received = exchange.copy_result(result)
            rows = data.expert_output(case, rank, received.length).to(result.x.device)
            combined = buffer.combine(rows.view(result.x.shape), result.handle, lane=1, async_op=True)
            pending = (received, combined, result, rows)
        assert pending is not None
        turns.append(finish(*pending))
    return turns


def inputs(case: Case, rank: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    mine, device = data.inputs(case, rank), device_of(case.backend)
    return mine.x.to(device), mine.topk_idx.to(device), mine.topk_weights.to(device)


def finish(
    received: exchange.Received, combined: deep_a2a.CombineResult, result: deep_a2a.DispatchResult, rows: torch.Tensor
) -> list[Turn]:
    wait_for(combined.event)
    result.release()
    return [exchange.turn_of(received, combined)]


@on_usual_nodes
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("network_seed", [None, 3])
def test_two_lanes_at_once(
    pools: Callable[[int], Pool], backend: str, topology: str, layout: str, network_seed: int | None
) -> None:
    first = case_on(backend, topology=topology, layout=layout, num_lanes=2, network_seed=network_seed)
    cases = [replace(first, seed=seed) for seed in range(8)]
    for case, *by_rank in zip(cases, *pools(first.num_ranks).run(use_two_lanes, cases), strict=True):
        check_case(case, by_rank)


def use_halves(group: dist.ProcessGroup, cases: list[Case], async_op: bool) -> list[list[Turn]]:
    """Sends on both lanes before the first receive, which is of the other lane; on odd ranks not, if asynchronous.

    A receive half relays rows for others: ranks that block in receives of different lanes would wait for each other.
    """
    rank = dist.get_rank(group)
    mine = [inputs(case, rank) for case in cases]
    order = [0, 1] if async_op and rank % 2 else [1, 0]
    with deep_a2a.Buffer(group, **cases[0].buffer_arguments()) as buffer:
        sent = [buffer.dispatch_send(*each, lane=lane, async_op=async_op) for lane, each in enumerate(mine)]
        results = {lane: sent[lane].recv() for lane in order}
        wait_for_all(results)
        received = [exchange.copy_result(results[lane]) for lane in range(2)]
        rows = [
            data.expert_output(case, rank, each.length).to(device_of(case.backend)).view(results[lane].x.shape)
            for lane, (case, each) in enumerate(zip(cases, received, strict=True))
        ]
        pending = [
            buffer.combine_send(rows[lane], results[lane].handle, lane=lane, async_op=async_op) for lane in range(2)
        ]
        combined = {lane: pending[lane].recv() for lane in order}
        wait_for_all(combined)
        return [[exchange.turn_of(received[lane], combined[lane])] for lane in range(2)]


def wait_for_all(results: Mapping[int, deep_a2a.DispatchResult | deep_a2a.CombineResult]) -> None:
    for result in results.values():
        if result.event is not None:
            wait_for(result.event)


@on_usual_nodes
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("async_op", [False, True])
def test_halves_of_two_lanes(
    pools: Callable[[int], Pool], backend: str, topology: str, layout: str, async_op: bool
) -> None:
    first = case_on(backend, topology=topology, layout=layout, num_lanes=2, network_seed=4)
    cases = [replace(first, seed=seed) for seed in range(2)]
    for case, *by_rank in zip(cases, *pools(first.num_ranks).run(use_halves, cases, async_op), strict=True):
        check_case(case, by_rank)
