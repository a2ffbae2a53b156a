"""Late and lost ranks: noticed by a deadline, named on every rank, never a hang, and nothing is left behind."""

from __future__ import annotations

import os
import re
import signal
import threading
import time
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from backends import GPU_NODES, device_of, occupy, on_backends, on_nodes, on_topologies, place, settle
from pool import Pool
from small import SMALL, error_of, send_ones

import deep_a2a

TIMEOUT_S = 1.5  # ranks of tests have to share few cores, and not to miss it for that
GAVE_UP = (
    r"rank (\d) \(node \d\) gave up in step ([CD]\d [a-z ()]+) after [\d.]+ s waiting for rank (\d) \(node \d\): "
    r"expected (\d+), seen (\d+) \(lane 0, epoch \d+\)"
)
Errors = list[tuple[str, str]]


def check_gave_up(errors: list[tuple[str, str]], steps: str) -> None:
    """At least one rank timed out, the others were told by one that did, and all that was said fits together."""
    assert {name for name, _ in errors} <= {"CommTimeoutError", "PeerAbortError"}
    assert "CommTimeoutError" in [name for name, _ in errors]
    for name, text in errors:
        found = re.search(GAVE_UP, text)
        assert found, text
        assert re.fullmatch(steps, found[2]), text
        assert found[1] != found[3] and int(found[5]) < int(found[4]), text
        assert text.startswith("rank") and ("another rank gave up" in text) == (name == "PeerAbortError"), text


def make_buffer(
    group: dist.ProcessGroup, backend: str, ranks_per_node: int | None = None, **options: Any
) -> deep_a2a.Buffer:
    """Its deadline is that of making it, too: with another made before, all have begun and loaded what it takes."""
    where = place(backend, ranks_per_node)
    deep_a2a.Buffer(group, **where, **SMALL).destroy()
    return deep_a2a.Buffer(group, **where, **{**SMALL, "timeout_s": TIMEOUT_S, **options})


def be_late(group: dist.ProcessGroup, operation: str, backend: str, ranks_per_node: int) -> tuple[Errors, float]:
    """Rank 2 does not come to one operation until others have given up. Then nobody can use the buffer, but a new one.

    A rank that has nothing to do with rank 2 may get through the operation itself, but not through the next dispatch.
    """
    start = time.monotonic()
    buffer = make_buffer(group, backend, ranks_per_node)
    buffer.check()
    result = send_ones(buffer)

    def operate() -> None:
        if operation == "cached":
            x = torch.ones(2, 16, dtype=torch.bfloat16, device=device_of(backend))
            buffer.dispatch(x, handle=result.handle)
        elif operation == "combine":
            buffer.combine(result.x, result.handle)
        elif operation == "event":
            event = buffer.combine(result.x, result.handle, async_op=True).event
            assert event is not None
            event.wait()
        settle(buffer)
        send_ones(buffer)

    if dist.get_rank(group) == 2:
        time.sleep(1.5 * TIMEOUT_S)
    errors = [error_of(operate)]
    errors += [error_of(buffer.check), error_of(lambda: send_ones(buffer)), error_of(operate)]
    result.release()
    buffer.destroy()
    seconds = time.monotonic() - start
    use_anew(group, backend)
    return errors, seconds


def use_anew(group: dist.ProcessGroup, backend: str) -> None:
    """What a fault leaves: a process that works, and a device that computes."""
    with deep_a2a.Buffer(group, **place(backend), **SMALL) as buffer:
        result = send_ones(buffer, 3.0)
        sums = buffer.combine(result.x.clone(), result.handle).x
        assert (result.x == 3).all() and (sums == 6).all()
        result.release()


@on_nodes(4, [1, 2, 4])
@pytest.mark.parametrize("operation", ["dispatch", "combine", "cached", "event"])
def test_late_rank(pools: Callable[[int], Pool], operation: str, backend: str, ranks_per_node: int) -> None:
    by_rank = pools(4).run(be_late, operation, backend, ranks_per_node)
    check_gave_up([errors[0] for errors, _ in by_rank], "D.*" if operation in ("dispatch", "cached") else "[CD].*")
    for errors, seconds in by_rank:
        assert errors[1:] == errors[:1] * 3  # the buffer stays poisoned, and says the same
        assert seconds < 20 * TIMEOUT_S


def stop_halfway(group: dist.ProcessGroup, backend: str, ranks_per_node: int) -> Errors:
    """With room for rounds of one token, rank 2 sends its first two rounds, and then relays nothing for too long."""
    buffer = make_buffer(group, backend, ranks_per_node, staging_bytes=2400 // ranks_per_node)
    device = device_of(backend)
    x = torch.ones(4, 16, dtype=torch.bfloat16, device=device)
    idx = torch.tensor([[0, 15]] * 4, device=device)  # to the first and the last rank
    pending = buffer.dispatch_send(x, idx, host_sync=False)

    def receive() -> None:
        if dist.get_rank(group) == 2:
            time.sleep(2.5 * TIMEOUT_S)
        pending.recv()
        settle(buffer)

    errors = [error_of(receive), error_of(buffer.check)]
    buffer.destroy()
    use_anew(group, backend)
    return errors


SPLIT = ("2x2", "4x1")


@on_topologies({"cpu": SPLIT, "emulated": SPLIT, "cuda": [nodes for nodes in GPU_NODES if nodes in SPLIT]})
def test_relay_that_stops(pools: Callable[[int], Pool], backend: str, topology: str) -> None:
    by_rank = pools(4).run(stop_halfway, backend, int(topology[-1]))
    # For room, for a chunk, or for a relay that waits for one of these: whoever was there first.
    check_gave_up([errors[0] for errors in by_rank], "D[456] .*")
    assert all(errors[0] == errors[1] for errors in by_rank)


def keep_slot(group: dist.ProcessGroup, backend: str, ranks_per_node: int) -> tuple[bool, Errors]:
    """Rank 1 reads the only slot for too long, while the others launch both halves of a dispatch into it."""
    buffer = make_buffer(group, backend, ranks_per_node, num_slots=1)
    device = device_of(backend)
    x = torch.ones(4, 16, dtype=torch.bfloat16, device=device)
    first = buffer.dispatch(x, torch.tensor([[0, 4]] * 4, device=device))  # to ranks 0 and 1
    settle(buffer)
    if buffer.rank == 1:
        time.sleep(2.5 * TIMEOUT_S)
        errors = []
    else:
        first.release()
        pending = buffer.dispatch_send(2 * x, handle=first.handle)

        def receive() -> None:
            pending.recv()
            settle(buffer)

        errors = [error_of(receive), error_of(buffer.check)]
    right = buffer.rank != 1 or bool((first.x == 1).all())
    first.release()
    buffer.destroy()
    use_anew(group, backend)
    return right, errors


@on_nodes(4, [2, 4])
def test_slot_that_is_not_released(pools: Callable[[int], Pool], backend: str, ranks_per_node: int) -> None:
    """Nothing is stored into it: not by a receive half either, whose send half gave up."""
    by_rank = pools(4).run(keep_slot, backend, ranks_per_node)
    assert all(right for right, _ in by_rank)
    late = [errors for _, errors in by_rank if errors and errors[0][0]]  # ranks of the other node may get through
    assert late[0] == by_rank[0][1]
    check_gave_up([errors[0] for errors in late], "D.*")
    assert all(errors[0] == errors[1] for errors in late)


def die(group: dist.ProcessGroup, moment: str, backend: str, ranks_per_node: int) -> Errors:
    """Rank 3 is killed; the others go on until they notice, and can still read what they have."""
    buffer = make_buffer(group, backend, ranks_per_node)
    result = send_ones(buffer)
    if dist.get_rank(group) == 3:
        if moment == "after sending":
            buffer.combine_send(result.x, result.handle)
        if moment != "any":
            kill_me()
        threading.Timer(0.05, kill_me).start()

    def go_on() -> None:
        while True:
            buffer.combine(result.x, result.handle)
            send_ones(buffer).release()

    errors = [error_of(go_on), error_of(buffer.check)]
    assert (result.x == 1).all()
    buffer.destroy()
    return errors


def kill_me() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


@pytest.mark.parametrize("moment", ["between operations", "after sending", "any"])
@pytest.mark.parametrize(("backend", "ranks_per_node"), [("cpu", 2), ("cpu", 4), ("emulated", 2), ("emulated", 4)])
def test_killed_rank(fresh_pool: Callable[..., Pool], moment: str, backend: str, ranks_per_node: int) -> None:
    """Not on GPUs: what a process has exported goes with it, and the context of who touches it goes as well."""
    before = set(os.listdir("/dev/shm"))
    by_rank = fresh_pool(4).run(die, moment, backend, ranks_per_node, killed={3})
    check_gave_up([errors[0] for errors in by_rank[:3]], "[CD].*")
    assert all(errors[0] == errors[1] for errors in by_rank[:3])
    assert not {name for name in set(os.listdir("/dev/shm")) - before if "deep_a2a" in name}


def stall(group: dist.ProcessGroup, backend: str) -> Errors:
    """Rank 2 comes in time, and what it sends is held up behind other work on its stream until others have given up."""
    buffer = make_buffer(group, backend, stream="current")
    result = send_ones(buffer)
    torch.cuda.synchronize()
    if buffer.rank == 2:
        occupy(4 * TIMEOUT_S)

    def operate() -> None:
        combined = buffer.combine(result.x, result.handle, async_op=True)
        assert combined.event is not None
        combined.event.synchronize()

    errors = [error_of(operate), error_of(buffer.check)]
    result.release()
    buffer.destroy()
    use_anew(group, backend)
    return errors


@pytest.mark.gpu
def test_stalled_rank(pools: Callable[[int], Pool]) -> None:
    by_rank = pools(4).run(stall, "cuda")
    check_gave_up([errors[0] for errors in by_rank], "[CD].*")
    assert all(errors[0] == errors[1] for errors in by_rank)


def shared_mappings(group: dist.ProcessGroup, backend: str) -> list[str]:
    with deep_a2a.Buffer(group, **place(backend, 2), **SMALL), open("/proc/self/maps") as maps:
        return [line for line in maps if " rw-s " in line]


@pytest.mark.parametrize("backend", ["cpu", "emulated"])
def test_windows_have_no_name(pools: Callable[[int], Pool], backend: str) -> None:
    """What is shared has no name in any file system: a killed rank leaves nothing behind."""
    for mappings in pools(4).run(shared_mappings, backend):
        assert len(mappings) >= 4 and all("/memfd:" in line for line in mappings)


def construct_late(group: dist.ProcessGroup, backend: str) -> tuple[str, str]:
    if dist.get_rank(group) == 1:
        return "", ""
    return error_of(lambda: deep_a2a.Buffer(group, **place(backend), **{**SMALL, "timeout_s": TIMEOUT_S}))


@on_backends
def test_rank_that_never_constructs(fresh_pool: Callable[..., Pool], backend: str) -> None:
    """The exchange through the process group has a deadline too."""
    errors = fresh_pool(4).run(construct_late, backend)
    for rank in (0, 2, 3):
        assert errors[rank][0] == "CommTimeoutError", errors[rank]
        assert re.match(
            rf"rank {rank} gave up after {TIMEOUT_S} s: not all 4 ranks of the group came to Buffer", errors[rank][1]
        )
