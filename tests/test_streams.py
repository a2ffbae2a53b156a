"""Streams and events: what comes after what, and memory that is freed and taken again while kernels are under way."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import data
import exchange
import pytest
import torch
import torch.distributed as dist
from backends import device_of, new_stream, occupy, on_backends, place
from checks import check_case
from exchange import Turn
from generators import LAYOUTS, Case, case_on
from pool import Pool
from small import SMALL

import deep_a2a

COMMON_SIZES = {512, 1 << 12, 1 << 15, 1 << 18}
STREAMS = pytest.mark.parametrize("stream", ["own", "current"])


def chain(group: dist.ProcessGroup, backend: str, output: str) -> None:
    """Two buffers: what the first brings, the second sends on, in turns and without a word from the host."""
    device = device_of(backend)
    settings: dict[str, Any] = {**SMALL, **place(backend)}
    rank, size = dist.get_rank(group), dist.get_world_size(group)
    with deep_a2a.Buffer(group, **settings) as first, deep_a2a.Buffer(group, **settings) as second:
        local = first.num_local_experts
        home = torch.tensor([[(rank + 1) % size * local, -1]] * 3, device=device)
        for turn in range(5):
            x = torch.full((3, 16), 8.0 * turn + rank, dtype=torch.bfloat16, device=device)
            there = first.dispatch(x, home, async_op=True, output=output)  # type: ignore[arg-type]
            further = second.dispatch(there.x, home, async_op=True, previous_event=there.event)
            back = second.combine(further.x, further.handle, async_op=True, lane=1, previous_event=further.event)
            whole = first.combine(back.x, there.handle, async_op=True, previous_event=back.event)
            assert whole.event is not None
            whole.event.wait()
            assert (further.x == 8 * turn + (rank - 2) % size).all()
            assert (back.x == 8 * turn + (rank - 1) % size).all() and torch.equal(whole.x, x)
            whole.event.synchronize()
            assert whole.event.done()
            further.release()
            there.release()


@on_backends
@pytest.mark.parametrize("output", ["leased", "owned"])
def test_events_chain_operations(pools: Callable[[int], Pool], backend: str, output: str) -> None:
    pools(4).run(chain, backend, output)


# ---- on a GPU ----------------------------------------------------------------------------------------------------


class Litter:
    """Takes what memory was just freed, of all sizes in use, writes into it, and sees that nobody else does."""

    def __init__(self) -> None:
        self._pieces: list[torch.Tensor] = []

    def spread(self, sizes: set[int]) -> None:
        self._pieces += [torch.full((size,), 0x5A, dtype=torch.uint8, device="cuda") for size in sizes for _ in "123"]

    def check(self) -> None:
        pieces, self._pieces = self._pieces, []
        assert all(bool((piece == 0x5A).all()) for piece in pieces)


def litter_about(group: dist.ProcessGroup, cases: list[Case]) -> list[list[Turn]]:
    """Inputs and results are dropped as early as the documentation allows, on a stream that lags behind the host."""
    device = device_of("cuda")
    turns: list[list[Turn]] = []
    litter = Litter()
    side = new_stream()
    with deep_a2a.Buffer(group, **cases[0].buffer_arguments()) as buffer, torch.cuda.stream(side):
        for case in cases:
            mine = data.inputs(case, buffer.rank)
            x, idx, weights = mine.x.to(device), mine.topk_idx.to(device), mine.topk_weights.to(device)
            sizes = {each.numel() * each.element_size() for each in (x, idx, weights)} | COMMON_SIZES
            occupy(0.01)
            modes: dict[str, Any] = {"host_sync": case.host_sync, "output": case.output, "async_op": case.async_op}
            buffer.dispatch(x, idx, weights, **modes)  # dropped at once, with its slot
            result = buffer.dispatch(x.clone(), idx.clone(), weights.clone(), **modes)
            if result.event is not None:
                result.event.wait()
            del x, idx, weights
            litter.spread(sizes)
            received = exchange.copy_result(result)
            litter.check()
            rows = torch.full((*result.x.shape[:-1], case.hidden), torch.nan, dtype=torch.bfloat16, device=device)
            count = len(rows.view(-1, case.hidden)) if case.layout == "padded" else received.length
            rows.view(-1, case.hidden)[:count] = data.expert_output(case, buffer.rank, count).to(device)
            sizes = {rows.numel() * 2, len(mine.x) * case.hidden * 2} | COMMON_SIZES
            occupy(0.01)
            buffer.combine(rows, result.handle, async_op=case.async_op)  # dropped at once
            combined = buffer.combine(rows, result.handle, async_op=case.async_op)
            if combined.event is not None:
                combined.event.wait()
            del rows, result
            litter.spread(sizes)
            turns.append([exchange.turn_of(received, combined)])
            litter.check()
    return turns


@pytest.mark.gpu
@STREAMS
@pytest.mark.parametrize("layout", LAYOUTS)
def test_memory_is_not_reused_too_early(pools: Callable[[int], Pool], layout: str, stream: str) -> None:
    cases = [
        case_on(
            "cuda",
            layout=layout,
            stream=stream,
            hidden=1024,
            num_slots=3,
            seed=seed,
            host_sync=bool(seed % 2),
            async_op=seed % 4 < 2,
            output="owned" if seed % 3 else "leased",
        )
        for seed in range(12)
    ]
    for case, *by_rank in zip(cases, *pools(cases[0].num_ranks).run(litter_about, cases), strict=True):
        check_case(case, by_rank)


def use_other_streams(group: dist.ProcessGroup, stream: str) -> None:
    """Inputs that are late on their stream, results read on another, and input that is overwritten in stream order."""
    device = device_of("cuda")
    with deep_a2a.Buffer(group, stream=stream, **place("cuda"), **SMALL) as buffer:  # type: ignore[arg-type]
        home = torch.tensor([[buffer.rank * buffer.num_local_experts, -1]] * 4, device=device)
        x = torch.zeros(4, 16, dtype=torch.bfloat16, device=device)
        streams = [new_stream() for _ in range(3)]
        torch.cuda.synchronize()
        for turn in range(12):
            value = 1.0 + turn
            writer, reader = streams[turn % 3], streams[(turn + 1) % 3]
            writer.wait_stream(streams[(turn - 1) % 3])
            with torch.cuda.stream(writer):
                occupy(0.01)
                x.fill_(value)
                result = buffer.dispatch(x, home, async_op=True, host_sync=bool(turn % 2))
            assert result.event is not None
            with torch.cuda.stream(reader):
                result.event.wait()
                x.fill_(-1)
                received = result.x[:4].clone()
                rows = result.x.clone()
                occupy(0.01)
                combined = buffer.combine(rows, result.handle, lane=turn % 2)
                result.release()
                rows.fill_(torch.nan)
                assert (received == value).all() and (combined.x == value).all()
            writer.wait_stream(reader)


@pytest.mark.gpu
@STREAMS
def test_streams_of_the_caller(pools: Callable[[int], Pool], stream: str) -> None:
    pools(4).run(use_other_streams, stream)


def time_events(group: dist.ProcessGroup, stream: str) -> list[bool]:
    """Whether events were passed: at once, after a wait, after a synchronize. The first two behind half a second."""
    device = device_of("cuda")
    with deep_a2a.Buffer(group, stream=stream, **place("cuda"), **SMALL) as buffer:  # type: ignore[arg-type]
        x = torch.ones(2, 16, dtype=torch.bfloat16, device=device)
        idx = torch.zeros(2, 2, dtype=torch.int64, device=device)
        buffer.dispatch(x, idx, host_sync=False).release()
        torch.cuda.synchronize()
        occupy(0.5)
        result = buffer.dispatch(x, idx, host_sync=False, async_op=True)
        assert result.event is not None
        passed = [result.event.done()]
        result.event.wait()
        passed.append(result.event.done())
        result.event.synchronize()
        passed.append(result.event.done())
        assert (result.x[: int(result.num_rows_tensor[0])] == 1).all()
        result.release()
    return passed


@pytest.mark.gpu
@STREAMS
def test_events_do_not_block_the_host(pools: Callable[[int], Pool], stream: str) -> None:
    assert pools(2).run(time_events, stream) == [[False, False, True]] * 2


def launched_blocks(group: dist.ProcessGroup, num_sms: int | None, path: str) -> list[tuple[str, int]]:
    """Names of the kernels of dispatch and combine, and how many blocks each was launched with."""
    device_of("cuda")
    case = case_on("cuda", layout="expert", num_sms=num_sms, max_tokens=700, tokens=(700,) * 4, hidden=16)
    file = Path(path) / f"trace.{dist.get_rank(group)}.json"
    activities = [torch.profiler.ProfilerActivity.CUDA]
    with deep_a2a.Buffer(group, **case.buffer_arguments()) as buffer:
        exchange.run_case(buffer, case)
        with torch.profiler.profile(activities=activities) as profile:
            exchange.run_case(buffer, case)
            torch.cuda.synchronize()
    profile.export_chrome_trace(str(file))
    events = json.loads(file.read_text())["traceEvents"]
    kernels = [(event["name"], event["args"]["grid"]) for event in events if event.get("cat") == "kernel"]
    return [(name, x * y * z) for name, (x, y, z) in kernels if "deep_a2a" in name]


@pytest.mark.gpu
@pytest.mark.parametrize("num_sms", [1, 3, 8, None])
def test_kernels_take_no_more_sms(pools: Callable[[int], Pool], tmp_path: Path, num_sms: int | None) -> None:
    for kernels in pools(4).run(launched_blocks, num_sms, str(tmp_path)):
        if not kernels:
            pytest.skip("the profiler shows no kernels on this machine")
        most = max(blocks for _, blocks in kernels)
        assert (
            most == num_sms
            if num_sms is not None
            else most <= torch.cuda.get_device_properties(0).multi_processor_count
        )
