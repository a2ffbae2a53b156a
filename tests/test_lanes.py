"""Lanes beside each other, and the halves of operations apart."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import data
import exchange
import pytest
import torch
import torch.distributed as dist
from checks import check_case
from exchange import Turn
from generators import LAYOUTS, Case
from pool import Pool

import deep_a2a


def use_two_lanes(group: dist.ProcessGroup, cases: list[Case]) -> list[list[Turn]]:
    """The combine of one micro-batch on lane 1 beside the dispatch of the next on lane 0, both asynchronous."""
    rank = dist.get_rank(group)
    turns: list[list[Turn]] = []
    with deep_a2a.Buffer(group, **cases[0].buffer_arguments()) as buffer:
        pending = None
        for case in cases:
            mine = data.inputs(case, rank)
            result = buffer.dispatch(mine.x, mine.topk_idx, mine.topk_weights, lane=0, async_op=True)
            if pending is not None:
                turns.append(finish(*pending))
            assert result.event is not None
            result.event.wait()
            received = exchange.copy_result(result)
            rows = data.expert_output(case, rank, received.length)
            combined = buffer.combine(rows.view(result.x.shape), result.handle, lane=1, async_op=True)
            pending = (received, combined, result, rows)
        assert pending is not None
        turns.append(finish(*pending))
    return turns


def finish(
    received: exchange.Received, combined: deep_a2a.CombineResult, result: deep_a2a.DispatchResult, rows: torch.Tensor
) -> list[Turn]:
    assert combined.event is not None
    combined.event.wait()
    result.release()
    return [Turn(received, combined.x, None)]


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("network_seed", [None, 3])
def test_two_lanes_at_once(pools: Callable[[int], Pool], layout: str, network_seed: int | None) -> None:
    cases = [Case(layout=layout, seed=seed, num_lanes=2, network_seed=network_seed) for seed in range(8)]
    for case, *by_rank in zip(cases, *pools(8).run(use_two_lanes, cases), strict=True):
        check_case(case, by_rank)


def use_halves(group: dist.ProcessGroup, cases: list[Case], async_op: bool) -> list[list[Turn]]:
    """Sends on both lanes before the first receive, which is of the other lane; on odd ranks not, if asynchronous.

    A receive half relays rows for others: ranks that block in receives of different lanes would wait for each other.
    """
    rank = dist.get_rank(group)
    mine = [data.inputs(case, rank) for case in cases]
    order = [0, 1] if async_op and rank % 2 else [1, 0]
    with deep_a2a.Buffer(group, **cases[0].buffer_arguments()) as buffer:
        sent = [
            buffer.dispatch_send(each.x, each.topk_idx, each.topk_weights, lane=lane, async_op=async_op)
            for lane, each in enumerate(mine)
        ]
        results = {lane: sent[lane].recv() for lane in order}
        wait_for(results)
        received = [exchange.copy_result(results[lane]) for lane in range(2)]
        rows = [
            data.expert_output(case, rank, each.length).view(results[lane].x.shape)
            for lane, (case, each) in enumerate(zip(cases, received, strict=True))
        ]
        pending = [
            buffer.combine_send(rows[lane], results[lane].handle, lane=lane, async_op=async_op) for lane in range(2)
        ]
        combined = {lane: pending[lane].recv() for lane in order}
        wait_for(combined)
        return [[Turn(received[lane], combined[lane].x, None)] for lane in range(2)]


def wait_for(results: Mapping[int, deep_a2a.DispatchResult | deep_a2a.CombineResult]) -> None:
    for result in results.values():
        if result.event is not None:
            result.event.wait()


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("async_op", [False, True])
def test_halves_of_two_lanes(pools: Callable[[int], Pool], layout: str, async_op: bool) -> None:
    cases = [Case(layout=layout, seed=seed, num_lanes=2, network_seed=4) for seed in range(2)]
    for case, *by_rank in zip(cases, *pools(8).run(use_halves, cases, async_op), strict=True):
        check_case(case, by_rank)
