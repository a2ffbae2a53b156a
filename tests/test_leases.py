"""Leases on slots, views that outlive the buffer, and memory that is not written before its last reader is done."""

from __future__ import annotations

import gc
import time
import weakref
from collections.abc import Callable

import pytest
import torch
import torch.distributed as dist
from backends import device_of, on_backends, on_nodes, place
from pool import Pool
from small import SMALL, error_of, send_ones

import deep_a2a
from deep_a2a.errors import LeaseError
from deep_a2a.settings import LayoutName


def use_leases(group: dist.ProcessGroup, backend: str) -> list[tuple[str, str]]:
    errors = []
    with deep_a2a.Buffer(group, num_slots=2, **place(backend, 2), **SMALL) as buffer:
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
        one = torch.zeros(first.num_rank_rows or 0, buffer.hidden, dtype=torch.bfloat16, device=third.x.device)
        buffer.combine(one, first.handle)  # the handle outlives the lease
    return errors


@on_backends
def test_leases(pools: Callable[[int], Pool], backend: str) -> None:
    for errors in pools(8 if backend == "cpu" else 4).run(use_leases, backend):
        assert [name for name, _ in errors] == [LeaseError.__name__] * 3
        assert all("release" in text and "num_slots" in text for _, text in errors)


def keep_views(group: dist.ProcessGroup, backend: str) -> None:
    """Views of a destroyed buffer are memory that nobody writes to any more, but memory."""
    before = shared_memory(backend)
    buffer = deep_a2a.Buffer(group, **place(backend, 2), **SMALL)
    lent = buffer.lend_input(2)
    result = send_ones(buffer, 3.0)
    assert backend == "cuda" or shared_memory(backend) > before
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
    assert shared_memory(backend) == before


def shared_memory(backend: str) -> int:
    """Mappings of windows in this process; those on a GPU cannot be seen in it."""
    if backend == "cuda":
        return 0
    with open("/proc/self/maps") as maps:
        return sum("memfd:deep_a2a" in line for line in maps)


@on_backends
def test_views_outlive_the_buffer(pools: Callable[[int], Pool], backend: str) -> None:
    pools(8 if backend == "cpu" else 4).run(keep_views, backend)


def train_after_evaluating(group: dist.ProcessGroup, backend: str) -> None:
    """What torch makes in inference mode is of no use to autograd later; the window is for both."""
    with deep_a2a.Buffer(group, **place(backend, 2), **SMALL) as buffer:
        with torch.inference_mode():
            send_ones(buffer, 2.0).release()
            buffer.lend_input(2)
        result = send_ones(buffer, 3.0)
        weight = torch.ones(buffer.hidden, dtype=torch.bfloat16, device=result.x.device, requires_grad=True)
        loss = (result.x * weight).sum()  # keeps the rows for its backward pass
        buffer.lend_input(2).fill_(9)
        loss.backward()  # type: ignore[no-untyped-call]
        assert weight.grad is not None and weight.grad.tolist() == [3 * result.x.shape[0]] * buffer.hidden
        assert not buffer.lend_input(2).is_inference()


@on_backends
def test_inference_before_training(pools: Callable[[int], Pool], backend: str) -> None:
    pools(8 if backend == "cpu" else 4).run(train_after_evaluating, backend)


def write_with_gradients(group: dist.ProcessGroup, backend: str) -> None:
    """What is written into the window, gradients and all, is the history of that tensor alone."""
    with deep_a2a.Buffer(group, **place(backend, 2), **SMALL) as buffer:
        scale = torch.ones(buffer.hidden, dtype=torch.bfloat16, device=device_of(backend), requires_grad=True)
        with torch.inference_mode():
            early = buffer.lend_input(2)
        for _ in range(2):
            result = send_ones(buffer, 3.0)
            lent = buffer.lend_expert_output(result)
            assert not result.x.requires_grad and not lent.requires_grad
            lent.copy_(result.x * scale)
            result.x.mul_(scale)
            assert result.x.requires_grad and lent.requires_grad
            assert (buffer.combine(lent, result.handle).x == 3 * 2).all()
            result.release()
        early.fill_(1).mul_(scale)
        assert early.requires_grad and not buffer.lend_input(2).requires_grad


@on_backends
def test_writing_with_gradients(pools: Callable[[int], Pool], backend: str) -> None:
    pools(8 if backend == "cpu" else 4).run(write_with_gradients, backend)


def keep_counts(group: dist.ProcessGroup, backend: str) -> None:
    """Counts are the caller's to keep and to change: that keeps no routing, and does not change it for autograd."""
    with deep_a2a.Buffer(group, **place(backend, 2), **SMALL) as buffer:
        for host_sync in (True, False):
            result = send_ones(buffer, host_sync=host_sync)
            scale = torch.ones(2, device=result.topk_weights.device, requires_grad=True)
            weighed = (result.topk_weights * scale).sum()
            for counts in (result.expert_load, result.rows_per_rank, result.num_rows_tensor):
                assert counts.untyped_storage().data_ptr() != result.topk_weights.untyped_storage().data_ptr()
                counts.zero_()
            weighed.backward()  # type: ignore[no-untyped-call]
            result.release()


@on_backends
def test_counts_are_apart(pools: Callable[[int], Pool], backend: str) -> None:
    pools(8 if backend == "cpu" else 4).run(keep_counts, backend)


def forget_inputs(group: dist.ProcessGroup, backend: str) -> None:
    """What an operation refers to goes with the next one, when that finds it at its end."""
    with deep_a2a.Buffer(group, **place(backend, 2), **SMALL) as buffer:
        refs = []
        for value in (1.0, 2.0, 3.0):
            x = torch.full((2, buffer.hidden), value, dtype=torch.bfloat16, device=device_of(backend))
            idx = torch.zeros(2, 2, dtype=torch.int64, device=x.device)
            result = buffer.dispatch(x, idx)
            result.release()
            refs += [weakref.ref(x), weakref.ref(idx)]
            if backend == "cuda":
                torch.cuda.synchronize()
            del x, idx
        assert [ref() is None for ref in refs[:4]] == [True] * 4


@on_backends
def test_inputs_are_not_kept(pools: Callable[[int], Pool], backend: str) -> None:
    pools(8 if backend == "cpu" else 4).run(forget_inputs, backend)


# ---- slow readers ----------------------------------------------------------------------------------------------


def read_slowly(group: dist.ProcessGroup, slow: int, backend: str, ranks_per_node: int) -> None:
    """One rank keeps its lease for a while; the others are in the next dispatch, with nothing to exchange, long before.

    Only the slot's credit keeps their rows out of it: they go straight to their places.
    """
    with deep_a2a.Buffer(group, num_slots=1, **place(backend, ranks_per_node), **SMALL) as buffer:
        first = send_ones(buffer, 1.0)
        for value in (2.0, 3.0):
            if buffer.rank == slow:
                time.sleep(0.1)
            assert (first.x == value - 1).all()
            first.release()
            x = torch.full((2, buffer.hidden), value, dtype=torch.bfloat16, device=device_of(backend))
            first = buffer.dispatch(x, handle=first.handle)
        assert (first.x == 3).all()


@on_nodes(4, [1, 2, 4])
def test_slow_reader_of_a_slot(pools: Callable[[int], Pool], backend: str, ranks_per_node: int) -> None:
    for slow in (0, 3):
        pools(4).run(read_slowly, slow, backend, ranks_per_node)


def overwrite_at_once(group: dist.ProcessGroup, slow: int, backend: str, ranks_per_node: int) -> None:
    """One rank is slow to read what the others have lent for a combine; they overwrite it when theirs is done."""
    with deep_a2a.Buffer(group, **place(backend, ranks_per_node), **SMALL) as buffer:
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


@on_nodes(4, [1, 2, 4])
def test_slow_reader_of_lent_rows(pools: Callable[[int], Pool], backend: str, ranks_per_node: int) -> None:
    for slow in (0, 3):
        pools(4).run(overwrite_at_once, slow, backend, ranks_per_node)


def edit_result(group: dist.ProcessGroup, backend: str, layout: LayoutName) -> None:
    """What a result says is the caller's to change; the handle does not see it."""
    with deep_a2a.Buffer(group, layout=layout, **place(backend, 2), **SMALL) as buffer:
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


@on_backends
@pytest.mark.parametrize("layout", ["rank", "expert"])
def test_results_are_the_callers(pools: Callable[[int], Pool], backend: str, layout: LayoutName) -> None:
    pools(4).run(edit_result, backend, layout)


def destroy_between_halves(group: dist.ProcessGroup, backend: str) -> list[tuple[str, str]]:
    buffer = deep_a2a.Buffer(group, **place(backend, 2), **SMALL)
    device = device_of(backend)
    idx = torch.full((1, 2), -1, device=device)
    pending = buffer.dispatch_send(torch.ones(1, 16, dtype=torch.bfloat16, device=device), idx)
    buffer.destroy()
    return [error_of(pending.recv), error_of(lambda: send_ones(buffer))]


@on_backends
def test_destroy_between_halves(pools: Callable[[int], Pool], backend: str) -> None:
    for errors in pools(4).run(destroy_between_halves, backend):
        assert [text for _, text in errors] == ["the Buffer was destroyed"] * 2
