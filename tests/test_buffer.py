"""A buffer's life: attributes, memory, leases, lanes, halves, several buffers, the end."""

from __future__ import annotations

import gc
from collections.abc import Callable, Mapping
from typing import Any

import exchange
import generators
import pytest
import torch
import torch.distributed as dist
from exchange import Turn, check_case
from generators import LAYOUTS, Case
from pool import Pool

import deep_a2a
from deep_a2a.errors import LeaseError

SMALL: dict[str, Any] = {
    "hidden": 16,
    "num_experts": 16,
    "num_topk": 2,
    "num_max_tokens_per_rank": 4,
    "timeout_s": 30.0,
}


def send_ones(buffer: deep_a2a.Buffer, value: float = 1.0, **modes: Any) -> deep_a2a.DispatchResult:
    """Two tokens of `value`, to the first expert of this rank and of the next."""
    local = buffer.num_experts // buffer.num_ranks
    idx = torch.tensor([[buffer.rank * local, (buffer.rank + 1) % buffer.num_ranks * local]] * 2)
    return buffer.dispatch(torch.full((2, buffer.hidden), value, dtype=torch.bfloat16), idx, **modes)


def error_of(call: Callable[[], Any]) -> tuple[str, str]:
    """Type and message of what the call raises; ("", "") if it returns."""
    try:
        call()
    except Exception as error:
        return type(error).__name__, str(error)
    return "", ""


# ---- attributes and memory -------------------------------------------------------------------------------------


def read_attributes(group: dist.ProcessGroup, ranks_per_node: int) -> dict[str, Any]:
    names = ["rank", "num_ranks", "num_nodes", "ranks_per_node", "local_rank", "node", "hidden", "num_experts"]
    names += ["num_local_experts", "num_topk", "num_max_tokens_per_rank", "layout", "max_recv_rows"]
    with deep_a2a.Buffer(group, ranks_per_node=ranks_per_node, num_lanes=3, **SMALL) as buffer:
        table = deep_a2a.memory_table(
            num_ranks=8,
            ranks_per_node=ranks_per_node,
            num_lanes=3,
            **{k: v for k, v in SMALL.items() if k != "timeout_s"},
        )
        assert table == buffer.memory and str(table) == str(buffer.memory)
        return {name: getattr(buffer, name) for name in names}


def test_attributes(pools: Callable[[int], Pool]) -> None:
    for rank, got in enumerate(pools(8).run(read_attributes, 4)):
        expected = {"rank": rank, "num_ranks": 8, "num_nodes": 2, "ranks_per_node": 4, "local_rank": rank % 4}
        expected |= {"node": rank // 4, "hidden": 16, "num_experts": 16, "num_local_experts": 2, "num_topk": 2}
        assert got == {**expected, "num_max_tokens_per_rank": 4, "layout": "rank", "max_recv_rows": 32}


def default_ranks_per_node(group: dist.ProcessGroup) -> int:
    with deep_a2a.Buffer(group, **SMALL) as buffer:
        return buffer.ranks_per_node


def test_one_node_by_default(pools: Callable[[int], Pool]) -> None:
    assert pools(8).run(default_ranks_per_node) == [8] * 8


@pytest.mark.parametrize("layout", LAYOUTS)
def test_memory_table(layout: str) -> None:
    """The regions lie one behind the other, their sizes add up, and each line of the table shows one."""
    shape = {"hidden": 7168, "num_experts": 256, "num_topk": 8, "num_max_tokens_per_rank": 128, "layout": layout}
    one = deep_a2a.memory_table(num_ranks=8, ranks_per_node=4, **shape)
    ends = [region.offset + region.bytes for region in one.regions]
    assert [region.offset for region in one.regions] == [0, *ends[:-1]] and ends[-1] == one.total_bytes
    rows = {"rank": 8 * 128, "expert": 8 * 128 * 8, "padded": 8 * 128 * 32}[layout]
    sizes = {region.name: region for region in one.regions}
    assert sizes["recv_rows"].bytes_each == rows * 7168 * 2 and sizes["recv_rows"].count == 2
    lines = str(one).splitlines()
    assert all(any(line.split()[:1] == [name] for line in lines) for name in sizes)
    more = deep_a2a.memory_table(num_ranks=8, ranks_per_node=4, num_slots=5, **shape)
    assert more.total_bytes > one.total_bytes
    if layout != "padded":
        less = deep_a2a.memory_table(num_ranks=8, ranks_per_node=4, max_recv_rows=100, **shape)
        assert {region.name: region for region in less.regions}["recv_rows"].bytes_each == 100 * 7168 * 2


# ---- leases ----------------------------------------------------------------------------------------------------


def use_leases(group: dist.ProcessGroup) -> list[tuple[str, str]]:
    errors = []
    with deep_a2a.Buffer(group, ranks_per_node=2, num_slots=2, **SMALL) as buffer:
        first, second = send_ones(buffer, 1.0), send_ones(buffer, 2.0)
        errors.append(error_of(lambda: send_ones(buffer, 3.0)))
        errors.append(error_of(lambda: send_ones(buffer, 3.0, output="owned")))
        assert (first.x == 1).all() and (second.x == 2).all()
        first.release()
        third = send_ones(buffer, 3.0)
        assert (second.x == 2).all() and (third.x == 3).all()
        errors.append(error_of(lambda: send_ones(buffer, 4.0)))
        del second  # dropping the result object gives the slot back as well
        gc.collect()
        owned = send_ones(buffer, 4.0, output="owned")
        kept = [send_ones(buffer, value, output="owned") for value in (5.0, 6.0, 7.0)]
        assert (third.x == 3).all() and (owned.x == 4).all() and [each.x[0, 0].item() for each in kept] == [5, 6, 7]
        third.release()
        third.release()  # once is enough, twice is harmless
        for _ in range(5):
            send_ones(buffer).release()
        one = torch.zeros(first.num_rank_rows or 0, buffer.hidden, dtype=torch.bfloat16)
        buffer.combine(one, first.handle)  # the handle outlives the lease
    return errors


def test_leases(pools: Callable[[int], Pool]) -> None:
    for errors in pools(8).run(use_leases):
        assert [name for name, _ in errors] == [LeaseError.__name__] * 3
        assert all("release" in text and "num_slots" in text for _, text in errors)


def keep_views(group: dist.ProcessGroup) -> None:
    """Views of a destroyed buffer are memory that nobody writes to any more, but memory."""
    buffer = deep_a2a.Buffer(group, ranks_per_node=2, **SMALL)
    lent = buffer.lend_input(2)
    result = send_ones(buffer, 3.0)
    assert count_mappings("deep_a2a") > 0
    view = result.x
    buffer.destroy()
    del buffer
    gc.collect()
    assert (view == 3).all()
    view += 1
    lent.fill_(9)
    assert (result.x == 4).all() and (lent == 9).all()
    result.release()
    del result, view, lent
    gc.collect()
    assert count_mappings("deep_a2a") == 0


def count_mappings(name: str) -> int:
    with open("/proc/self/maps") as maps:
        return sum(f"memfd:{name}" in line for line in maps)


def test_views_outlive_the_buffer(pools: Callable[[int], Pool]) -> None:
    pools(8).run(keep_views)


# ---- lanes and halves ------------------------------------------------------------------------------------------


def use_two_lanes(group: dist.ProcessGroup, cases: list[Case]) -> list[list[Turn]]:
    """The combine of one micro-batch on lane 1 beside the dispatch of the next on lane 0, both asynchronous."""
    rank = dist.get_rank(group)
    turns: list[list[Turn]] = []
    with deep_a2a.Buffer(group, **cases[0].buffer_arguments()) as buffer:
        pending = None
        for case in cases:
            data = generators.inputs(case, rank)
            result = buffer.dispatch(data.x, data.topk_idx, data.topk_weights, lane=0, async_op=True)
            if pending is not None:
                turns.append(finish(*pending))
            assert result.event is not None
            result.event.wait()
            received = exchange.copy_result(result)
            rows = generators.expert_output(case, rank, received.length)
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
    data = [generators.inputs(case, rank) for case in cases]
    order = [0, 1] if async_op and rank % 2 else [1, 0]
    with deep_a2a.Buffer(group, **cases[0].buffer_arguments()) as buffer:
        sent = [
            buffer.dispatch_send(each.x, each.topk_idx, each.topk_weights, lane=lane, async_op=async_op)
            for lane, each in enumerate(data)
        ]
        results = {lane: sent[lane].recv() for lane in order}
        wait_for(results)
        received = [exchange.copy_result(results[lane]) for lane in range(2)]
        rows = [
            generators.expert_output(case, rank, each.length).view(results[lane].x.shape)
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


# ---- several buffers, the end ----------------------------------------------------------------------------------


def use_buffers(group: dist.ProcessGroup, cases: list[Case]) -> list[list[Turn]]:
    """Three buffers in turns; the first goes while the others are used; the last two go in any order."""
    buffers = [deep_a2a.Buffer(group, **case.buffer_arguments()) for case in cases]
    results = [exchange.dispatch(buffer, case) for buffer, case in zip(buffers, cases, strict=True)]
    received = [exchange.copy_result(result) for result in results]
    turns = [
        [Turn(received[idx], (sums := exchange.combine(buffer, cases[idx], 0, results[idx])).x, sums.side)]
        for idx, buffer in enumerate(buffers)
    ]
    buffers[0].destroy()
    turns.append(exchange.run_case(buffers[1], cases[1]))
    for buffer in buffers[1:] if dist.get_rank(group) % 3 else buffers[:0:-1]:
        buffer.destroy()
        buffer.destroy()
    return turns


def test_buffers_side_by_side(pools: Callable[[int], Pool]) -> None:
    cases = [Case("2x4", "rank", seed=1), Case("4x2", "expert", hidden=128, seed=2), Case("1x8", "padded", seed=3)]
    for case, *by_rank in zip([*cases, cases[1]], *pools(8).run(use_buffers, cases), strict=True):
        check_case(case, by_rank)


def use_subgroups(group: dist.ProcessGroup, case: Case) -> list[list[Turn]]:
    """Two groups of four ranks, a buffer each; rank numbers are those of the group."""
    halves = [dist.new_group([0, 1, 2, 3]), dist.new_group([4, 5, 6, 7])]
    return exchange.run_cases(halves[dist.get_rank(group) // 4], [case])


def test_buffers_of_other_groups(pools: Callable[[int], Pool]) -> None:
    case = Case("2x2")
    by_rank = pools(8).run(use_subgroups, case)
    check_case(case, [turns[0] for turns in by_rank[:4]])
    check_case(case, [turns[0] for turns in by_rank[4:]])
