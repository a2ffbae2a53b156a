"""CUDA graphs: dispatch, combine and release captured once, and replayed with other routing, rows and weights."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import data
import exchange
import pytest
import torch
import torch.distributed as dist
from backends import USUAL_NODES, device_of
from checks import check_case, expected_dispatch
from exchange import Turn
from generators import LAYOUTS, Case, case_on
from pool import Pool
from small import SMALL, error_of, send_ones

import deep_a2a

pytestmark = pytest.mark.gpu

on_gpu_nodes = pytest.mark.parametrize("topology", USUAL_NODES["cuda"])

ROUTINGS = ("uniform", "sparse", "nowhere", "one_rank", "one_expert", "uniform", "uniform")


@dataclass(frozen=True)
class Static:
    """The memory that a graph reads."""

    x: torch.Tensor
    topk_idx: torch.Tensor
    topk_weights: torch.Tensor
    rows: torch.Tensor
    side: torch.Tensor

    @classmethod
    def of(cls, buffer: deep_a2a.Buffer, case: Case) -> Static:
        mine, device = data.inputs(case, buffer.rank), device_of("cuda")
        x = mine.x.to(device)
        shape: tuple[int, ...] = (buffer.max_recv_rows,)
        if case.layout == "padded":
            shape = (case.local_experts, case.capacity)
        rows = torch.zeros(*shape, case.hidden, dtype=torch.bfloat16, device=device)
        side = torch.zeros(*shape, *exchange.side_width(case), device=device)
        return cls(x, mine.topk_idx.to(device), mine.topk_weights.to(device), rows, side)

    def fill(self, case: Case, rank: int) -> None:
        """With the inputs of `case`; rows that no token occupies are poisoned."""
        mine, want = data.inputs(case, rank), expected_dispatch(case, 0)[0][rank]
        self.x.copy_(mine.x)
        self.topk_idx.copy_(mine.topk_idx)
        self.topk_weights.copy_(mine.topk_weights)
        self.rows.fill_(torch.nan)
        self.side.fill_(torch.nan)
        width, num_rows = exchange.side_width(case), len(want.x)
        self.rows.view(-1, case.hidden)[:num_rows] = data.expert_output(case, rank, num_rows).to(self.rows.device)
        values = data.side_values(case, rank, (num_rows, *width))
        self.side.view(-1, *width)[:num_rows] = values.to(self.side.device)


class Captured:
    """One dispatch and combine as a graph."""

    def __init__(self, buffer: deep_a2a.Buffer, case: Case, static: Static) -> None:
        modes: dict[str, Any] = {"host_sync": False, "output": case.output}
        if case.is_cast:
            modes |= {"quantize": case.fmt, "scale_format": case.scale_format, "scale_layout": case.scale_layout}
        weighted: dict[str, Any] = {} if case.layout == "rank" else {"weighted": case.weighted}
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph):
            result = buffer.dispatch(static.x, static.topk_idx, static.topk_weights, **modes)
            combined = buffer.combine(static.rows, result.handle, side=static.side, **weighted)
            # The slot is another dispatch's once it is released.
            scales = None if result.scales is None else result.scales.clone()
            self.result = replace(result, x=result.x.clone(), scales=scales, lease=None)
            self.combined = combined
            if case.output == "leased":
                result.release()

    def turn(self) -> Turn:
        self.graph.replay()
        return exchange.turn_of(exchange.copy_result(self.result), self.combined)


def replay(group: dist.ProcessGroup, cases: list[Case]) -> list[list[Turn]]:
    """A replay for each case, and after every second one an operation outside of the graph."""
    device_of("cuda")
    turns = []
    with deep_a2a.Buffer(group, **cases[0].buffer_arguments()) as buffer:
        exchange.run_case(buffer, cases[0])
        static = Static.of(buffer, cases[0])
        torch.cuda.synchronize()
        captured = Captured(buffer, cases[0], static)
        for number, case in enumerate(cases):
            static.fill(case, buffer.rank)
            turns.append([captured.turn()])
            if number % 2:
                torch.cuda.synchronize()
                exchange.run_case(buffer, replace(case, seed=100 + number))
                torch.cuda.synchronize()
        torch.cuda.synchronize()
    return turns


@on_gpu_nodes
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("stream", ["own", "current"])
@pytest.mark.parametrize("payload", ["bf16", "cast fp8_e4m3:float32"])
def test_replays(pools: Callable[[int], Pool], topology: str, layout: str, stream: str, payload: str) -> None:
    first = case_on(
        "cuda",
        topology=topology,
        layout=layout,
        stream=stream,
        payload=payload,
        host_sync=False,
        side=True,
        output="owned" if payload == "bf16" and stream == "own" else "leased",
        column_major=stream == "current",
    )
    cases = [replace(first, seed=seed, routing=routing) for seed, routing in enumerate(ROUTINGS)]
    for case, *by_rank in zip(cases, *pools(first.num_ranks).run(replay, cases), strict=True):
        check_case(case, by_rank)


def replay_back_to_back(group: dist.ProcessGroup, case: Case, num_replays: int) -> list[Turn]:
    """Without a word from the host in between; the first and the last one's results."""
    device_of("cuda")
    with deep_a2a.Buffer(group, **case.buffer_arguments()) as buffer:
        exchange.run_case(buffer, case)
        static = Static.of(buffer, case)
        static.fill(case, buffer.rank)
        torch.cuda.synchronize()
        captured = Captured(buffer, case, static)
        first = captured.turn()
        for _ in range(num_replays):
            captured.graph.replay()
        last = captured.turn()
        torch.cuda.synchronize()
        return [first, last]


@on_gpu_nodes
@pytest.mark.parametrize("layout", LAYOUTS)
def test_many_replays(pools: Callable[[int], Pool], topology: str, layout: str) -> None:
    case = case_on("cuda", topology=topology, layout=layout, host_sync=False, side=True)
    by_rank = pools(case.num_ranks).run(replay_back_to_back, case, 100)
    for turn in range(2):
        check_case(case, [[turns[turn]] for turns in by_rank])


def capture_badly(group: dist.ProcessGroup) -> list[tuple[str, str]]:
    """What a graph cannot hold; the buffer goes on."""
    device_of("cuda")
    errors = []
    with deep_a2a.Buffer(group, backend="cuda", **SMALL) as buffer:
        held = send_ones(buffer)
        torch.cuda.synchronize()

        def capture(call: Callable[[], Any]) -> None:
            error = ("", "")
            with torch.cuda.graph(torch.cuda.CUDAGraph()):
                error = error_of(call)
            errors.append(error)

        capture(held.release)
        torch.cuda.synchronize()
        held.release()
        send_ones(buffer).release()
    return errors


def test_what_cannot_be_captured(pools: Callable[[int], Pool]) -> None:
    for errors in pools(2).run(capture_badly):
        assert [name for name, _ in errors] == ["RuntimeError"], errors
        assert "outside of the capture" in errors[0][1], errors


def sync_in_capture(group: dist.ProcessGroup) -> tuple[str, str]:
    device = device_of("cuda")
    with deep_a2a.Buffer(group, backend="cuda", **SMALL) as buffer:
        x = torch.ones(2, 16, dtype=torch.bfloat16, device=device)
        idx = torch.zeros(2, 2, dtype=torch.int64, device=device)
        send_ones(buffer).release()
        torch.cuda.synchronize()
        with torch.cuda.graph(torch.cuda.CUDAGraph()):
            error = error_of(lambda: buffer.dispatch(x, idx))
        torch.cuda.synchronize()
        send_ones(buffer).release()
        return error


def test_host_sync_in_a_capture(pools: Callable[[int], Pool]) -> None:
    for name, text in pools(2).run(sync_in_capture):
        assert name == "ValueError" and "host_sync must be False" in text, (name, text)
