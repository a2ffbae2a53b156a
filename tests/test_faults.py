"""What goes wrong between ranks: found on every rank, named, never a hang, and survived where it can be."""

from __future__ import annotations

import os
import re
import signal
import threading
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
import torch.distributed as dist
from pool import Pool
from small import SMALL, error_of, send_ones

import deep_a2a

TIMEOUT_S = 1.0
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


# ---- late and lost ranks ---------------------------------------------------------------------------------------


def be_late(group: dist.ProcessGroup, operation: str, ranks_per_node: int) -> tuple[Errors, float]:
    """Rank 2 does not come to one operation until others have given up. Then nobody can use the buffer.

    A rank that has nothing to do with rank 2 may get through the operation itself, but not through the next dispatch.
    """
    start = time.monotonic()
    buffer = deep_a2a.Buffer(group, ranks_per_node=ranks_per_node, **{**SMALL, "timeout_s": TIMEOUT_S})
    buffer.check()
    result = send_ones(buffer)

    def operate() -> None:
        if operation == "cached":
            buffer.dispatch(torch.ones(2, 16, dtype=torch.bfloat16), handle=result.handle)
        elif operation == "combine":
            buffer.combine(result.x, result.handle)
        elif operation == "event":
            event = buffer.combine(result.x, result.handle, async_op=True).event
            assert event is not None
            event.wait()
        send_ones(buffer)

    if dist.get_rank(group) == 2:
        time.sleep(1.5 * TIMEOUT_S)
    errors = [error_of(operate)]
    errors += [error_of(buffer.check), error_of(lambda: send_ones(buffer)), error_of(operate)]
    result.release()
    buffer.destroy()
    return errors, time.monotonic() - start


@pytest.mark.parametrize(
    ("operation", "ranks_per_node"),
    [(operation, size) for operation in ("dispatch", "combine") for size in (1, 2, 4)] + [("cached", 2), ("event", 2)],
)
def test_late_rank(pools: Callable[[int], Pool], operation: str, ranks_per_node: int) -> None:
    by_rank = pools(4).run(be_late, operation, ranks_per_node)
    check_gave_up([errors[0] for errors, _ in by_rank], "D.*" if operation in ("dispatch", "cached") else "[CD].*")
    for errors, seconds in by_rank:
        assert errors[1:] == errors[:1] * 3  # the buffer stays poisoned, and says the same
        assert seconds < 20 * TIMEOUT_S


def die(group: dist.ProcessGroup, moment: str, ranks_per_node: int) -> Errors:
    """Rank 3 is killed; the others go on until they notice, and can still read what they have."""
    buffer = deep_a2a.Buffer(group, ranks_per_node=ranks_per_node, **{**SMALL, "timeout_s": TIMEOUT_S})
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
@pytest.mark.parametrize("ranks_per_node", [2, 4])
def test_killed_rank(fresh_pool: Callable[[int], Pool], moment: str, ranks_per_node: int) -> None:
    before = set(os.listdir("/dev/shm"))
    by_rank = fresh_pool(4).run(die, moment, ranks_per_node, killed={3})
    check_gave_up([errors[0] for errors in by_rank[:3]], "[CD].*")
    assert all(errors[0] == errors[1] for errors in by_rank[:3])
    assert not {name for name in set(os.listdir("/dev/shm")) - before if "deep_a2a" in name}


def shared_mappings(group: dist.ProcessGroup) -> list[str]:
    with deep_a2a.Buffer(group, ranks_per_node=2, **SMALL), open("/proc/self/maps") as maps:
        return [line for line in maps if " rw-s " in line]


def test_windows_have_no_name(pools: Callable[[int], Pool]) -> None:
    """What is shared has no name in any file system: a killed rank leaves nothing behind."""
    for mappings in pools(4).run(shared_mappings):
        assert len(mappings) >= 4 and all("/memfd:" in line for line in mappings)


def construct_late(group: dist.ProcessGroup) -> tuple[str, str]:
    if dist.get_rank(group) == 1:
        return "", ""
    return error_of(lambda: deep_a2a.Buffer(group, **{**SMALL, "timeout_s": TIMEOUT_S}))


def test_rank_that_never_constructs(fresh_pool: Callable[[int], Pool]) -> None:
    """The exchange through the process group has a deadline too."""
    errors = fresh_pool(4).run(construct_late)
    for rank in (0, 2, 3):
        assert errors[rank][0] == "CommTimeoutError", errors[rank]
        assert re.match(
            rf"rank {rank} gave up after 1.0 s: not all 4 ranks of the group came to Buffer", errors[rank][1]
        )


# ---- errors that every rank finds by itself --------------------------------------------------------------------


def overflow(group: dist.ProcessGroup, settings: dict[str, Any]) -> Errors:
    rank, errors = dist.get_rank(group), []
    x = torch.ones(4, 16, dtype=torch.bfloat16)
    with deep_a2a.Buffer(group, ranks_per_node=2, network_seed=1, **settings, **SMALL) as buffer:
        for _ in range(3):
            errors.append(error_of(lambda: buffer.dispatch(x, torch.tensor([[5, -1]] * 4))))
            fits = buffer.dispatch(x[:1], torch.tensor([[4 * rank, -1]]))
            assert fits.num_rank_rows == 1
            fits.release()
        buffer.check()
    return errors


OVERFLOWS: dict[str, tuple[dict[str, int], str]] = {
    "rank": ({"max_recv_rows": 15}, "rank 1 would receive 16 rows, but max_recv_rows is 15"),
    "expert": ({"max_recv_rows": 19, "expert_alignment": 5}, "rank 1 would receive 20 rows, but max_recv_rows is 19"),
    "padded": ({"expert_capacity": 15}, "rank 1 would receive 16 tokens for expert 5, but expert_capacity is 15"),
}


@pytest.mark.parametrize("layout", OVERFLOWS)
def test_overflow(pools: Callable[[int], Pool], layout: str) -> None:
    """On every rank, before a row moves; and again, and the buffer works in between."""
    limits, message = OVERFLOWS[layout]
    assert pools(4).run(overflow, {"layout": layout, **limits}) == [[("CapacityError", message)] * 3] * 4


def send_bad_experts(group: dist.ProcessGroup, bad: int, dtype: torch.dtype) -> Errors:
    rank, errors, x = dist.get_rank(group), [], torch.ones(3, 16, dtype=torch.bfloat16)
    with deep_a2a.Buffer(group, ranks_per_node=2, network_seed=1, **SMALL) as buffer:
        for bad_rank in range(4):
            idx = torch.tensor([[0, 5], [9, -1], [12, 15]], dtype=dtype)
            if rank == bad_rank:
                idx[1, 1] = bad
            errors.append(error_of(partial(buffer.dispatch, x, idx)))
            send_ones(buffer).release()
        buffer.check()
    return errors


@pytest.mark.parametrize("bad", [16, -2, 2**31 - 1, 2**40])
def test_expert_out_of_range(pools: Callable[[int], Pool], bad: int) -> None:
    dtype = torch.int64 if bad >= 2**31 else torch.int32
    for errors in pools(4).run(send_bad_experts, bad, dtype):
        for bad_rank, (name, text) in enumerate(errors):
            assert name == "ValueError"
            assert re.match(rf"topk_idx\[1, 1\] of rank {bad_rank} is {bad}, expected -1 .* \[0, 16\)", text), text


def disagree(group: dist.ProcessGroup, name: str, value: Any) -> tuple[str, str]:
    settings: dict[str, Any] = {**SMALL, "ranks_per_node": 2, "layout": "rank"}
    if dist.get_rank(group) == 2:
        settings[name] = value
    error = error_of(lambda: deep_a2a.Buffer(group, **settings))
    with deep_a2a.Buffer(group, **SMALL) as buffer:  # the group is as good as before
        send_ones(buffer).release()
    return error


DIFFERENT: dict[str, Any] = {
    "hidden": (16, 32),
    "num_experts": (16, 32),
    "num_topk": (2, 3),
    "num_max_tokens_per_rank": (4, 5),
    "ranks_per_node": (2, 4),
    "layout": ("rank", "expert"),
    "max_recv_rows": (None, 7),
    "num_slots": (2, 3),
    "num_lanes": (2, 1),
}


@pytest.mark.parametrize("name", DIFFERENT)
def test_different_settings(pools: Callable[[int], Pool], name: str) -> None:
    usual, other = DIFFERENT[name]
    for error, text in pools(4).run(disagree, name, other):
        assert error == "MismatchError"
        assert f"{name} is {usual!r} on rank 0 and {other!r} on rank 2" in text


def disagree_in_call(group: dist.ProcessGroup) -> Errors:
    """Rank 1 sends FP8, the others BF16: an error on all, and the buffer goes on."""
    idx = torch.tensor([[0, 9]])
    x = torch.ones(1, 16, dtype=torch.bfloat16)
    quantize = "fp8" if dist.get_rank(group) == 1 else None
    with deep_a2a.Buffer(group, ranks_per_node=2, network_seed=1, **SMALL) as buffer:
        errors = [error_of(lambda: buffer.dispatch(x, idx, quantize=quantize)) for _ in range(2)]
        send_ones(buffer).release()
        send_ones(buffer).release()
    return errors


def test_different_payloads(pools: Callable[[int], Pool]) -> None:
    for errors in pools(4).run(disagree_in_call):
        for name, text in errors:
            assert name == "MismatchError"
            assert re.match("rank 1 dispatches rows of 16 bytes with 4 bytes of scales, rank 0 .* 32 with 0", text), (
                text
            )


def one_bad_setting(group: dist.ProcessGroup) -> tuple[str, str]:
    hidden = 12 if dist.get_rank(group) == 1 else 16
    return error_of(lambda: deep_a2a.Buffer(group, **{**SMALL, "hidden": hidden}))


def test_bad_setting_on_one_rank(pools: Callable[[int], Pool]) -> None:
    """The rank itself says what is wrong, and the others do not wait for it."""
    errors = pools(4).run(one_bad_setting)
    for rank, (name, text) in enumerate(errors):
        assert name == ("ValueError" if rank == 1 else "CommError"), text
        assert "hidden" in text and "12" in text and (rank == 1 or text.startswith("rank 1")), text
