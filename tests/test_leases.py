"""Leases on slots, views that outlive the buffer, and memory that is not written before its last reader is done."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable

import pytest
import torch
import torch.distributed as dist
from pool import Pool
from small import SMALL, error_of, send_ones

import deep_a2a
from deep_a2a.errors import LeaseError
from deep_a2a.settings import LayoutName


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


# ---- slow readers ----------------------------------------------------------------------------------------------


def read_slowly(group: dist.ProcessGroup, slow: int, ranks_per_node: int) -> None:
    """One rank keeps its lease for a while; the others are in the next dispatch, with nothing to exchange, long before.

    Only the slot's credit keeps their rows out of it: they go straight to their places.
    """
    with deep_a2a.Buffer(group, ranks_per_node=ranks_per_node, num_slots=1, **SMALL) as buffer:
        first = send_ones(buffer, 1.0)
        for value in (2.0, 3.0):
            if buffer.rank == slow:
                time.sleep(0.1)
            assert (first.x == value - 1).all()
            first.release()
            x = torch.full((2, buffer.hidden), value, dtype=torch.bfloat16)
            first = buffer.dispatch(x, handle=first.handle)
        assert (first.x == 3).all()


@pytest.mark.parametrize("ranks_per_node", [1, 2, 4])
def test_slow_reader_of_a_slot(pools: Callable[[int], Pool], ranks_per_node: int) -> None:
    for slow in (0, 3):
        pools(4).run(read_slowly, slow, ranks_per_node)


def overwrite_at_once(group: dist.ProcessGroup, slow: int, ranks_per_node: int) -> None:
    """One rank is slow to read what the others have lent for a combine; they overwrite it when theirs is done."""
    with deep_a2a.Buffer(group, ranks_per_node=ranks_per_node, **SMALL) as buffer:
        for value in (1.0, 2.0, 3.0):
            result = send_ones(buffer)
            rows = buffer.lend_expert_output(result).fill_(value)
            pending = buffer.combine_send(rows, result.handle)
            if buffer.rank == slow:
                time.sleep(0.1)
            sums = pending.recv().x
            rows.fill_(torch.nan)
            assert (sums == 2 * value).all()  # of two experts, on two ranks
            result.release()


@pytest.mark.parametrize("ranks_per_node", [1, 2, 4])
def test_slow_reader_of_lent_rows(pools: Callable[[int], Pool], ranks_per_node: int) -> None:
    for slow in (0, 3):
        pools(4).run(overwrite_at_once, slow, ranks_per_node)


def edit_result(group: dist.ProcessGroup, layout: LayoutName) -> None:
    """What a result says is the caller's to change; the handle does not see it."""
    with deep_a2a.Buffer(group, layout=layout, ranks_per_node=2, **SMALL) as buffer:
        result = send_ones(buffer)
        rows = result.x.clone()
        sums = buffer.combine(rows, result.handle).x
        for field in (result.topk_idx, result.topk_weights, result.expert_rows, result.expert_offsets):
            if field is not None:
                field.fill_(1 << 20)
        result.rows_per_expert.fill_(1 << 20)
        again = buffer.combine(rows, result.handle).x
        assert torch.equal(sums, again)
        result.release()
        repeated = send_ones(buffer, zero_padding=True)
        assert torch.equal(repeated.x, rows)


@pytest.mark.parametrize("layout", ["rank", "expert"])
def test_results_are_the_callers(pools: Callable[[int], Pool], layout: LayoutName) -> None:
    pools(4).run(edit_result, layout)


def destroy_between_halves(group: dist.ProcessGroup) -> list[tuple[str, str]]:
    buffer = deep_a2a.Buffer(group, ranks_per_node=2, **SMALL)
    idx = torch.full((1, 2), -1)
    pending = buffer.dispatch_send(torch.ones(1, 16, dtype=torch.bfloat16), idx)
    buffer.destroy()
    return [error_of(pending.recv), error_of(lambda: send_ones(buffer))]


def test_destroy_between_halves(pools: Callable[[int], Pool]) -> None:
    for errors in pools(4).run(destroy_between_halves):
        assert [text for _, text in errors] == ["the Buffer was destroyed"] * 2
