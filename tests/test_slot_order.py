"""Slots whose uses and releases are on different lanes and streams, and handles of dispatches that were refused."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from backends import device_of, on_device_backends, on_nodes, place, settle
from pool import Pool
from small import error_of

import deep_a2a

SIZES: dict[str, Any] = {
    "hidden": 64,
    "num_experts": 4,
    "num_topk": 2,
    "num_max_tokens_per_rank": 64,
    "timeout_s": 20.0,
}
SEEDS = range(3)
on_pairs = on_nodes(2, [1], first=1)


def tokens(buffer: deep_a2a.Buffer, value: float, count: int = 64) -> tuple[torch.Tensor, torch.Tensor]:
    """Every token has an expert on both ranks."""
    device = device_of(buffer.backend)
    x = torch.full((count, buffer.hidden), value, dtype=torch.bfloat16, device=device)
    return x, torch.tensor([[0, 2]] * count, device=device)


def own_on_two_lanes(
    group: dist.ProcessGroup, backend: str, ranks_per_node: int, host_sync: bool
) -> list[tuple[float, float]]:
    """Both dispatches take slot 0, one behind the other."""
    got = []
    for seed in SEEDS:
        with deep_a2a.Buffer(group, network_seed=seed, **place(backend, ranks_per_node), **SIZES) as buffer:
            for turn in range(3):
                modes: dict[str, Any] = {"async_op": True, "host_sync": host_sync, "output": "owned"}
                results = [buffer.dispatch(*tokens(buffer, 10 * turn + lane), lane=lane, **modes) for lane in (0, 1)]
                for lane, result in enumerate(results):
                    assert result.event is not None
                    result.event.synchronize()
                    rows = result.x[: int(result.num_rows_tensor[0])]
                    got.append((10.0 * turn + lane, rows.float().mean().item()))
    return got


def refused_on_two_lanes(
    group: dist.ProcessGroup, backend: str, ranks_per_node: int, layout: str
) -> list[tuple[str, str]]:
    """Both before the host has looked at either; then one that fits."""
    settings: dict[str, Any] = {**SIZES, "layout": layout, "max_recv_rows": 16}
    errors = []
    with deep_a2a.Buffer(group, num_slots=3, **place(backend, ranks_per_node), **settings) as buffer:
        pending = [buffer.dispatch_send(*tokens(buffer, 1.0), lane=lane) for lane in (0, 1)]
        for one in pending:
            while not one.sent():
                time.sleep(0.001)
        errors += [error_of(one.recv) for one in pending]
        fits = buffer.dispatch(*tokens(buffer, 2.0, 4))
        assert fits.num_rank_rows == 8
        fits.release()
        buffer.check()
    return errors


@on_pairs
@pytest.mark.parametrize("layout", ["rank", "expert"])
def test_refused_on_two_lanes(pools: Callable[[int], Pool], backend: str, ranks_per_node: int, layout: str) -> None:
    for errors in pools(2).run(refused_on_two_lanes, backend, ranks_per_node, layout):
        assert [name for name, _ in errors] == ["CapacityError", "CapacityError"], errors


def refused_twice_on_a_lane(group: dist.ProcessGroup, backend: str, ranks_per_node: int) -> list[tuple[str, str]]:
    """The second before the host has looked at the first."""
    settings: dict[str, Any] = {**SIZES, "max_recv_rows": 16}
    with deep_a2a.Buffer(group, num_slots=3, **place(backend, ranks_per_node), **settings) as buffer:
        first = buffer.dispatch(*tokens(buffer, 1.0), host_sync=False, async_op=True)
        second = buffer.dispatch_send(*tokens(buffer, 1.0))
        while not second.sent():
            time.sleep(0.001)
        assert first.event is not None
        errors = [error_of(first.event.synchronize), error_of(second.recv)]
        first.release()
        fits = buffer.dispatch(*tokens(buffer, 2.0, 4))
        assert fits.num_rank_rows == 8 and bool((fits.x[:8] == 2).all())
        fits.release()
        buffer.check()
    return errors


@on_pairs
def test_refused_twice_on_a_lane(pools: Callable[[int], Pool], backend: str, ranks_per_node: int) -> None:
    """A dispatch that was refused never comes with rows, even where its reason is not kept."""
    for errors in pools(2).run(refused_twice_on_a_lane, backend, ranks_per_node):
        assert [name for name, _ in errors] == ["CapacityError", "CommError"], errors
        assert "this dispatch was refused" in errors[1][1]


@on_pairs
@pytest.mark.parametrize("host_sync", [True, False])
def test_slot_goes_from_lane_to_lane(
    pools: Callable[[int], Pool], backend: str, ranks_per_node: int, host_sync: bool
) -> None:
    for pairs in pools(2).run(own_on_two_lanes, backend, ranks_per_node, host_sync):
        assert all(want == got for want, got in pairs)


def release_behind_combine(group: dist.ProcessGroup, backend: str, ranks_per_node: int) -> list[bool]:
    right = []
    for seed in SEEDS:
        with deep_a2a.Buffer(
            group, layout="expert", network_seed=seed, **place(backend, ranks_per_node), **SIZES
        ) as buffer:
            for _ in range(3):
                first = buffer.dispatch(*tokens(buffer, 1.0))
                combined = buffer.combine(first.x, first.handle, async_op=True)
                first.release()
                second = buffer.dispatch(*tokens(buffer, 100.0), lane=1, async_op=True)
                settle(buffer)
                assert combined.event is not None and second.event is not None
                combined.event.synchronize()
                second.event.synchronize()
                right.append(bool((combined.x == 2).all()))
                second.release()
    return right


@on_pairs
def test_release_waits_for_combine(pools: Callable[[int], Pool], backend: str, ranks_per_node: int) -> None:
    """A combine of the lane still reads the leased rows that another lane's dispatch would overwrite."""
    for right in pools(2).run(release_behind_combine, backend, ranks_per_node):
        assert all(right)


def combine_refused(
    group: dist.ProcessGroup, backend: str, ranks_per_node: int, layout: Any, staging_bytes: int | None
) -> tuple[set[str], bool, bool]:
    """What was raised on the way, whether the sums were zero, and whether the buffer could be used afterwards."""
    raised = set()
    settings: dict[str, Any] = {"layout": layout, "max_recv_rows": 16, "staging_bytes": staging_bytes, **SIZES}
    with deep_a2a.Buffer(group, **place(backend, ranks_per_node), **settings) as buffer:
        x, idx = tokens(buffer, 3.0)
        result = buffer.dispatch(x, idx, host_sync=False, async_op=True)
        rows = torch.ones_like(result.x)
        combined = buffer.combine(rows, result.handle, async_op=True)
        assert combined.event is not None
        raised.add(error_of(combined.event.synchronize)[0])
        raised.add(error_of(lambda: settle(buffer))[0])
        zero = bool((combined.x == 0).all()) and result.num_rows_tensor.tolist() == [0, 0]
        result.release()
        cached = buffer.dispatch(x, handle=result.handle, async_op=True)
        assert cached.event is not None
        cached.event.synchronize()
        zero = zero and cached.num_rows_tensor.tolist() == [0, 0]
        cached.release()
        again = buffer.dispatch(*tokens(buffer, 5.0, count=4))
        right = bool((again.x[: again.num_rows] == 5).all())
        again.release()
    return raised, zero, right


@on_pairs
@pytest.mark.parametrize("layout", ["rank", "expert"])
@pytest.mark.parametrize("staging_bytes", [None, 20000])  # in one round, or in four, of up to 17 tokens
def test_use_of_a_refused_dispatch(
    pools: Callable[[int], Pool], backend: str, ranks_per_node: int, layout: str, staging_bytes: int | None
) -> None:
    """Nothing stops the combine of the same step where the host does not wait: it gives zeros. So does a cached one."""
    for raised, zero, right in pools(2).run(combine_refused, backend, ranks_per_node, layout, staging_bytes):
        assert raised == {"CapacityError", ""} and zero and right


def cast_here_give_there(group: dist.ProcessGroup, backend: str, ranks_per_node: int) -> tuple[str, str]:
    with deep_a2a.Buffer(
        group, layout="expert", **place(backend, ranks_per_node), **{**SIZES, "hidden": 128}
    ) as buffer:
        x, idx = tokens(buffer, 2.0, count=4)
        if buffer.rank == 0:
            return error_of(lambda: buffer.dispatch(x, idx, quantize="fp8"))
        scales = torch.ones(4, 1, device=x.device)
        return error_of(lambda: buffer.dispatch((x.to(torch.float8_e4m3fn), scales), idx))


@on_pairs
def test_rows_that_are_pulled_are_cast_alike(pools: Callable[[int], Pool], backend: str, ranks_per_node: int) -> None:
    for name, text in pools(2).run(cast_here_give_there, backend, ranks_per_node):
        assert name == "MismatchError" and "different dtypes" in text


def slices_of_lent(group: dist.ProcessGroup, backend: str) -> list[tuple[str, str]]:
    errors = []
    with deep_a2a.Buffer(group, layout="expert", **place(backend), **SIZES) as buffer:
        lent = buffer.lend_input(16)
        _, idx = tokens(buffer, 0.0, count=8)
        for x in (lent[::2], lent[1:9], lent[:1].expand(8, buffer.hidden)):
            errors.append(error_of(lambda x=x: buffer.dispatch(x, idx)))  # type: ignore[misc]
    return errors


@on_device_backends
def test_slices_of_lent_input(pools: Callable[[int], Pool], backend: str) -> None:
    for errors in pools(2).run(slices_of_lent, backend):
        assert [name for name, _ in errors] == ["ValueError"] * 3
        assert all("x is a part of the lent input" in text for _, text in errors[:2])
        assert "rows that do not overlap" in errors[2][1]


def receive_behind_abort(group: dist.ProcessGroup, backend: str) -> tuple[str, str]:
    """Rank 0 has both halves of a dispatch under way when rank 1 gives up on another lane."""
    timeout_s = 1.5
    with deep_a2a.Buffer(group, **place(backend), **{**SIZES, "timeout_s": timeout_s}) as buffer:
        x, idx = tokens(buffer, 1.0, count=4)
        result = buffer.dispatch(x, idx)  # keeps slot 0, so that the next tag is another
        settle(buffer)
        dist.barrier(group)

        def dispatch_alone() -> None:
            buffer.dispatch(x, idx, lane=1)
            settle(buffer)

        if buffer.rank == 1:
            error = error_of(dispatch_alone)
        else:
            time.sleep(timeout_s / 2)
            late = buffer.dispatch_send(x, idx, host_sync=False, async_op=True).recv()
            assert late.event is not None
            error = error_of(late.event.synchronize)
        assert result.num_rows
        return error


@on_device_backends
def test_receive_half_behind_an_abort(pools: Callable[[int], Pool], backend: str) -> None:
    """It must not take what the aborted send half has left behind for another call of a peer."""
    (first, text), (second, _) = pools(2).run(receive_behind_abort, backend)
    assert (first, second) == ("PeerAbortError", "CommTimeoutError")
    assert "rank 1 (node 0) gave up in step D3 bases" in text
