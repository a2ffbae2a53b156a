"""Too many rows, bad experts, different settings: raised on every rank, named, and the buffer goes on where it can."""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
import torch.distributed as dist
from backends import GPU_NODES, device_of, on_backends, place, settle
from pool import Pool
from small import SMALL, error_of, send_ones

import deep_a2a

Errors = list[tuple[str, str]]

# Of two nodes and SMALL's rows of 192 bytes: room for two rounds of one token, in and out.
ROUNDS_OF_ONE = 768


def overflow(group: dist.ProcessGroup, backend: str, settings: dict[str, Any]) -> Errors:
    rank, device, errors = dist.get_rank(group), device_of(backend), []
    x = torch.ones(4, 16, dtype=torch.bfloat16, device=device)
    with deep_a2a.Buffer(group, network_seed=1, **place(backend, 2), **settings, **SMALL) as buffer:
        for _ in range(3):
            errors.append(error_of(lambda: buffer.dispatch(x, torch.tensor([[5, -1]] * 4, device=device))))
            fits = buffer.dispatch(x[:1], torch.tensor([[4 * rank, -1]], device=device))
            assert fits.num_rank_rows == 1
            fits.release()
        buffer.check()
    return errors


OVERFLOWS: dict[str, tuple[dict[str, int], str]] = {
    "rank": ({"max_recv_rows": 15}, "rank 1 would receive 16 rows.* max_recv_rows is 15"),
    "expert": ({"max_recv_rows": 19, "expert_alignment": 5}, "rank 1 would receive 20 rows.* max_recv_rows is 19"),
    "padded": ({"expert_capacity": 15}, "expert 5 of rank 1 would receive 16 tokens.* expert_capacity is 15"),
}


@on_backends
@pytest.mark.parametrize("staging_bytes", [None, ROUNDS_OF_ONE])
@pytest.mark.parametrize("layout", OVERFLOWS)
def test_overflow(pools: Callable[[int], Pool], backend: str, layout: str, staging_bytes: int | None) -> None:
    """On every rank, before a row moves; and again, and the buffer works in between."""
    limits, message = OVERFLOWS[layout]
    settings = {"layout": layout, "staging_bytes": staging_bytes, **limits}
    for errors in pools(4).run(overflow, backend, settings):
        for name, text in errors:
            assert name == "CapacityError" and re.fullmatch(message, text), (name, text)


def send_bad_experts(
    group: dist.ProcessGroup, backend: str, settings: dict[str, Any], bad: int, dtype: torch.dtype, host_sync: bool
) -> Errors:
    rank, errors, device = dist.get_rank(group), [], device_of(backend)
    x = torch.ones(3, 16, dtype=torch.bfloat16, device=device)
    with deep_a2a.Buffer(group, network_seed=1, **place(backend, 2), **settings, **SMALL) as buffer:

        def dispatch(idx: torch.Tensor) -> None:
            result = buffer.dispatch(x, idx, host_sync=host_sync)
            assert not host_sync and result.num_rows_tensor.tolist() == [0, 0]
            result.release()
            settle(buffer)
            raise AssertionError("not refused")

        for bad_rank in range(4):
            idx = torch.tensor([[0, 5], [9, -1], [12, 15]], dtype=dtype, device=device)
            if rank == bad_rank:
                idx[1, 1] = bad
            errors.append(error_of(partial(dispatch, idx)))
            send_ones(buffer).release()
        settle(buffer)
    return errors


@on_backends
@pytest.mark.parametrize("host_sync", [True, False])
@pytest.mark.parametrize(
    "settings", [{"layout": "rank"}, {"layout": "expert"}, {"layout": "rank", "staging_bytes": ROUNDS_OF_ONE}]
)
@pytest.mark.parametrize("bad", [16, -2, 2**31 - 1, 2**40])
def test_expert_out_of_range(
    pools: Callable[[int], Pool], backend: str, settings: dict[str, Any], bad: int, host_sync: bool
) -> None:
    dtype = torch.int64 if bad >= 2**31 else torch.int32
    for errors in pools(4).run(send_bad_experts, backend, settings, bad, dtype, host_sync):
        for bad_rank, (name, text) in enumerate(errors):
            assert name == "ValueError"
            assert re.match(rf"topk_idx\[1, 1\] of rank {bad_rank} is {bad}, expected -1 .* \[0, 16\)", text), text


def disagree(group: dist.ProcessGroup, backend: str, name: str, value: Any) -> tuple[str, str]:
    usual = {**SMALL, **place(backend, 2)}
    settings: dict[str, Any] = {**usual, "layout": "rank"}
    if dist.get_rank(group) == 2:
        settings[name] = value
    error = error_of(lambda: deep_a2a.Buffer(group, **settings))
    with deep_a2a.Buffer(group, **usual) as buffer:  # the group is as good as before
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
    "staging_bytes": (None, ROUNDS_OF_ONE),
}


@on_backends
@pytest.mark.parametrize("name", DIFFERENT)
def test_different_settings(pools: Callable[[int], Pool], backend: str, name: str) -> None:
    usual, other = DIFFERENT[name]
    if name == "ranks_per_node" and backend == "cuda" and not GPU_NODES:
        usual = None
    for error, text in pools(4).run(disagree, backend, name, other):
        assert error == "MismatchError"
        assert f"{name} is {usual!r} on rank 0 and {other!r} on rank 2" in text


@pytest.mark.parametrize(("name", "usual", "other"), [("num_sms", 2, 3), ("backend", "emulated", "cpu")])
def test_different_devices(pools: Callable[[int], Pool], name: str, usual: Any, other: Any) -> None:
    for error, text in pools(4).run(disagree, "emulated", name, other):
        assert error == "MismatchError"
        assert f"{name} is {usual!r} on rank 0 and {other!r} on rank 2" in text


def disagree_in_dispatch(
    group: dist.ProcessGroup, backend: str, usual: str | None, other: str | None, staging_bytes: int | None
) -> Errors:
    """Rank 1 quantizes differently: an error on all, and the buffer goes on."""
    device = device_of(backend)
    idx = torch.tensor([[0, 9]], device=device)
    x = torch.ones(1, 16, dtype=torch.bfloat16, device=device)
    quantize = other if dist.get_rank(group) == 1 else usual
    settings = {**SMALL, "staging_bytes": staging_bytes}
    with deep_a2a.Buffer(group, network_seed=1, **place(backend, 2), **settings) as buffer:
        errors = [error_of(lambda: buffer.dispatch(x, idx, quantize=quantize)) for _ in range(2)]
        send_ones(buffer).release()
        send_ones(buffer).release()
    return errors


@on_backends
@pytest.mark.parametrize("staging_bytes", [None, ROUNDS_OF_ONE])
@pytest.mark.parametrize(
    ("usual", "other", "message"),
    [
        (None, "fp8", "rank 1 dispatches rows of 16 bytes with 4 bytes of scales.* rank 0 rows of 32 with 0.*"),
        ("fp8_e4m3", "fp8_e5m2", "rank 1 dispatches rows of 16 bytes.* rank 0 rows of 16 .*different dtypes"),
    ],
)
def test_different_payloads(
    pools: Callable[[int], Pool], backend: str, usual: str | None, other: str, message: str, staging_bytes: int | None
) -> None:
    for errors in pools(4).run(disagree_in_dispatch, backend, usual, other, staging_bytes):
        for name, text in errors:
            assert name == "MismatchError" and re.fullmatch(message, text), (name, text)


def disagree_in_combine(group: dist.ProcessGroup, backend: str, staging_bytes: int | None) -> Errors:
    """Rank 1 alone brings a side payload: the rows cross in another format than the others expect."""
    with deep_a2a.Buffer(group, staging_bytes=staging_bytes, **place(backend, 2), **SMALL) as buffer:
        result = send_ones(buffer)
        side = torch.zeros(result.topk_idx.shape, device=result.x.device) if buffer.rank == 1 else None

        def combine() -> None:
            buffer.combine(result.x, result.handle, side=side)
            settle(buffer)

        return [error_of(combine), error_of(buffer.check)]


@on_backends
@pytest.mark.parametrize("staging_bytes", [None, ROUNDS_OF_ONE])
def test_different_side(pools: Callable[[int], Pool], backend: str, staging_bytes: int | None) -> None:
    by_rank = pools(4).run(disagree_in_combine, backend, staging_bytes)
    assert "MismatchError" in [errors[0][0] for errors in by_rank]
    for (name, text), after in by_rank:
        assert name in ("MismatchError", "PeerAbortError") and re.search("rank . .* was called differently", text), text
        assert after == (name, text)


def disagree_in_cached_slot(group: dist.ProcessGroup, backend: str) -> Errors:
    """Rank 1 releases the first result later than the others, and so dispatches into another slot: only tags tell."""
    with deep_a2a.Buffer(group, **place(backend, 4), **SMALL) as buffer:
        held = send_ones(buffer)
        handle = held.handle
        if buffer.rank != 1:
            held.release()
        x = torch.ones(2, 16, dtype=torch.bfloat16, device=device_of(backend))
        pending = buffer.dispatch_send(x, handle=handle)
        held.release()

        def receive() -> None:
            pending.recv()
            settle(buffer)

        return [error_of(receive), error_of(buffer.check)]


@on_backends
def test_different_slots_of_cached_dispatches(pools: Callable[[int], Pool], backend: str) -> None:
    for errors in pools(4).run(disagree_in_cached_slot, backend):
        assert errors[0][0] in ("MismatchError", "PeerAbortError"), errors
        assert "was called differently" in errors[0][1] and errors[1] == errors[0]


def one_bad_setting(group: dist.ProcessGroup, backend: str) -> tuple[str, str]:
    hidden = 12 if dist.get_rank(group) == 1 else 16
    return error_of(lambda: deep_a2a.Buffer(group, **place(backend), **{**SMALL, "hidden": hidden}))


@on_backends
def test_bad_setting_on_one_rank(pools: Callable[[int], Pool], backend: str) -> None:
    """The rank itself says what is wrong, and the others do not wait for it."""
    errors = pools(4).run(one_bad_setting, backend)
    for rank, (name, text) in enumerate(errors):
        assert name == ("ValueError" if rank == 1 else "CommError"), text
        assert "hidden" in text and "12" in text and (rank == 1 or text.startswith("rank 1")), text
