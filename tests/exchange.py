"""What a rank does with a case: called on all ranks of a pool at once."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import data
import torch
import torch.distributed as dist
from backends import device_of, let_arrive, wait_for
from generators import Case

import deep_a2a
from deep_a2a.results import Event

ROW_FIELDS = ("x", "scales", "row_weights")
RANK_ROW_FIELDS = ("topk_idx", "topk_weights", "expert_rows")
COUNT_FIELDS = ("rows_per_expert", "expert_offsets", "rows_per_rank", "expert_load", "num_rows_tensor")


@dataclass(frozen=True)
class Received:
    """A DispatchResult as a rank saw it: rows flattened over experts, cut to those that count."""

    tensors: dict[str, torch.Tensor | None]
    shapes: dict[str, tuple[int, ...]]
    num_rows: int | None
    num_rank_rows: int | None

    @property
    def length(self) -> int:
        """Rows of x."""
        rows = self.tensors["x"]
        assert rows is not None
        return len(rows)


@dataclass(frozen=True)
class Turn:
    """One dispatch and the combine after it."""

    received: Received
    sums: torch.Tensor
    side: torch.Tensor | None


def make_buffer(group: dist.ProcessGroup, case: Case) -> deep_a2a.Buffer:
    """On this rank's device, which becomes the current one."""
    device_of(case.backend)
    return deep_a2a.Buffer(group, **case.buffer_arguments())


def run_cases(group: dist.ProcessGroup, cases: Sequence[Case]) -> list[list[Turn]]:
    """The turns of each case. Cases in a row that ask for the same buffer share one."""
    turns: list[list[Turn]] = []
    for arguments, same in itertools.groupby(cases, key=lambda case: case.buffer_arguments()):
        device_of(arguments["backend"])
        with deep_a2a.Buffer(group, **arguments) as buffer:
            assert buffer.backend == arguments["backend"]
            turns += [run_case(buffer, case) for case in same]
    return turns


def run_case(buffer: deep_a2a.Buffer, case: Case) -> list[Turn]:
    turn, handle = run_turn(buffer, case, 0, None)
    if not case.cached:
        return [turn]
    return [turn, run_turn(buffer, case, 1, handle)[0]]


def run_turn(
    buffer: deep_a2a.Buffer, case: Case, number: int, handle: deep_a2a.DispatchHandle | None
) -> tuple[Turn, deep_a2a.DispatchHandle]:
    result = dispatch(buffer, case, number, handle)
    received = copy_result(result)
    poison(result)
    combined = combine(buffer, case, number, result)
    if case.output == "leased":
        result.release()
    return turn_of(received, combined), result.handle


def turn_of(received: Received, combined: deep_a2a.CombineResult) -> Turn:
    return Turn(received, on_host(combined.x), None if combined.side is None else on_host(combined.side))


def on_host(tensor: torch.Tensor) -> torch.Tensor:
    """A copy, its rows side by side."""
    return tensor.to("cpu", copy=True, memory_format=torch.contiguous_format)


def dispatch(
    buffer: deep_a2a.Buffer, case: Case, number: int = 0, handle: deep_a2a.DispatchHandle | None = None, lane: int = 0
) -> deep_a2a.DispatchResult:
    """With `handle` the cached form of it."""
    mine = data.inputs(case, buffer.rank, number)
    device = device_of(case.backend)
    x: Any = mine.x.to(device)
    scales = None if mine.scales is None else mine.scales.to(device)
    if case.lent:
        x = buffer.lend_input(len(mine.x), mine.x.dtype, lane=lane)
        x.copy_(mine.x)
    elif case.strided:
        x = spread(x)
    if scales is not None and not case.is_cast:
        if case.strided:
            scales = spread(scales)
        x = (x, scales.view(torch.float8_e8m0fnu) if case.payload.endswith("e8m0fnu") else scales)
    modes: dict[str, Any] = {
        "host_sync": case.host_sync,
        "output": case.output,
        "zero_padding": case.zero_padding,
        "scale_layout": case.scale_layout,
        "lane": lane,
        "async_op": case.async_op,
    }
    if case.is_cast:
        modes |= {"quantize": case.fmt, "scale_format": case.scale_format}
    if handle is not None:
        modes |= {"handle": handle}
    else:
        modes |= {"topk_idx": mine.topk_idx.to(device)}
        if not case.default_weights:
            modes |= {"topk_weights": mine.topk_weights.to(device)}
    result = buffer.dispatch_send(x, **modes).recv() if case.halves else buffer.dispatch(x, **modes)
    if case.async_op:
        finish(case, result.event)
    let_arrive(case.backend)
    return result


def finish(case: Case, event: Event | None) -> None:
    wait_for(event)
    if case.backend != "cuda":  # where waiting is the stream's
        assert event is not None and event.done()


def spread(rows: torch.Tensor) -> torch.Tensor:
    """The same rows in a wider tensor."""
    wide = torch.zeros(len(rows), rows.shape[1] + 24, dtype=rows.dtype, device=rows.device)
    wide[:, : rows.shape[1]] = rows
    return wide[:, : rows.shape[1]]


def combine(
    buffer: deep_a2a.Buffer, case: Case, number: int, result: deep_a2a.DispatchResult, lane: int = 0
) -> deep_a2a.CombineResult:
    num_rows, num_rank_rows = result.num_rows_tensor.tolist()
    if case.layout == "padded":
        num_rows = result.x.shape[0] * result.x.shape[1]
    shape = (*result.x.shape[:-1], case.hidden)
    device = result.x.device
    rows = torch.full(shape, torch.nan, dtype=torch.bfloat16, device=device)  # what no row occupies has to be ignored
    if case.lent and case.layout == "rank":
        rows = buffer.lend_expert_output(result, lane=lane)
    rows.view(-1, case.hidden)[:num_rows] = data.expert_output(case, buffer.rank, num_rows, number)
    modes: dict[str, Any] = {"lane": lane, "async_op": case.async_op}
    if case.layout != "rank":
        modes |= {"weighted": case.weighted}
    if case.side:
        side = torch.full(result.topk_idx.shape if case.layout == "rank" else shape[:-1], torch.nan, device=device)
        count = num_rank_rows if case.layout == "rank" else num_rows
        values = data.side_values(case, buffer.rank, (count, *side_width(case)))
        side.view(-1, *side_width(case))[:count] = values
        modes |= {"side": side}
    if case.halves:
        combined = buffer.combine_send(rows, result.handle, **modes).recv()
    else:
        combined = buffer.combine(rows, result.handle, **modes)
    if case.async_op:
        finish(case, combined.event)
    let_arrive(case.backend)
    return combined


def side_width(case: Case) -> tuple[int, ...]:
    return (case.num_topk,) if case.layout == "rank" else ()


def copy_result(result: deep_a2a.DispatchResult) -> Received:
    num_rows, num_rank_rows = result.num_rows_tensor.tolist()
    tensors: dict[str, torch.Tensor | None] = {}
    shapes = {}
    for name in ROW_FIELDS + RANK_ROW_FIELDS + COUNT_FIELDS:
        tensor = getattr(result, name)
        if tensor is not None:
            shapes[name] = tuple(tensor.shape)
            if name in ROW_FIELDS and result.x.dim() == 3:
                tensor = tensor.flatten(0, 1)
            elif name in ROW_FIELDS:
                tensor = tensor[:num_rows]
            elif name in RANK_ROW_FIELDS:
                tensor = tensor[:num_rank_rows]
            tensor = on_host(tensor)
        tensors[name] = tensor
    return Received(tensors, shapes, result.num_rows, result.num_rank_rows)


def poison(result: deep_a2a.DispatchResult) -> None:
    """Combine and later dispatches must not live on what the caller does to his views, nor on what a slot held."""
    for name in ("x", "scales"):
        tensor = getattr(result, name)
        if tensor is not None:  # columns of scales are no bytes side by side
            (tensor.view(torch.uint8) if tensor.stride(-1) == 1 else tensor).fill_(0x5A)
