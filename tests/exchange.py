"""What a rank does with a case, and the comparison of what all ranks got with the oracle, bit by bit."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import generators
import reference
import torch
import torch.distributed as dist
from generators import Case
from pool import Pool

import deep_a2a

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


# ---- on the ranks ----------------------------------------------------------------------------------------------


def run_cases(group: dist.ProcessGroup, cases: Sequence[Case]) -> list[list[Turn]]:
    """The turns of each case. Cases in a row that ask for the same buffer share one."""
    turns: list[list[Turn]] = []
    for arguments, same in itertools.groupby(cases, key=Case.buffer_arguments):
        with deep_a2a.Buffer(group, **arguments) as buffer:
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
    side = None if combined.side is None else combined.side.clone()
    if case.output == "leased":
        result.release()
    return Turn(received, combined.x.clone(), side), result.handle


def dispatch(
    buffer: deep_a2a.Buffer, case: Case, number: int = 0, handle: deep_a2a.DispatchHandle | None = None, lane: int = 0
) -> deep_a2a.DispatchResult:
    """With `handle` the cached form of it."""
    data = generators.inputs(case, buffer.rank, number)
    x: Any = data.x
    scales = data.scales
    if case.lent:
        x = buffer.lend_input(len(data.x), data.x.dtype, lane=lane)
        x.copy_(data.x)
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
        "lane": lane,
        "async_op": case.async_op,
    }
    if case.is_cast:
        modes |= {"quantize": case.fmt, "scale_format": case.scale_format}
    if handle is not None:
        modes |= {"handle": handle}
    else:
        modes |= {"topk_idx": data.topk_idx}
        if not case.default_weights:
            modes |= {"topk_weights": data.topk_weights}
    result = buffer.dispatch_send(x, **modes).recv() if case.halves else buffer.dispatch(x, **modes)
    if case.async_op:
        assert result.event is not None
        result.event.wait()
        assert result.event.done()
    return result


def spread(rows: torch.Tensor) -> torch.Tensor:
    """The same rows in a wider tensor."""
    wide = torch.zeros(len(rows), rows.shape[1] + 24, dtype=rows.dtype)
    wide[:, : rows.shape[1]] = rows
    return wide[:, : rows.shape[1]]


def combine(
    buffer: deep_a2a.Buffer, case: Case, number: int, result: deep_a2a.DispatchResult, lane: int = 0
) -> deep_a2a.CombineResult:
    num_rows, num_rank_rows = result.num_rows_tensor.tolist()
    if case.layout == "padded":
        num_rows = result.x.shape[0] * result.x.shape[1]
    shape = (*result.x.shape[:-1], case.hidden)
    rows = torch.full(shape, torch.nan, dtype=torch.bfloat16)  # what no row occupies has to be ignored
    if case.lent and case.layout == "rank":
        rows = buffer.lend_expert_output(result, lane=lane)
    rows.view(-1, case.hidden)[:num_rows] = generators.expert_output(case, buffer.rank, num_rows, number)
    modes: dict[str, Any] = {"lane": lane, "async_op": case.async_op}
    if case.layout != "rank":
        modes |= {"weighted": case.weighted}
    if case.side:
        side = torch.full(result.topk_idx.shape if case.layout == "rank" else shape[:-1], torch.nan)
        count = num_rank_rows if case.layout == "rank" else num_rows
        values = generators.side_values(case, buffer.rank, (count, *side_width(case)))
        side.view(-1, *side_width(case))[:count] = values
        modes |= {"side": side}
    if case.halves:
        combined = buffer.combine_send(rows, result.handle, **modes).recv()
    else:
        combined = buffer.combine(rows, result.handle, **modes)
    if case.async_op:
        assert combined.event is not None
        combined.event.wait()
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
            tensor = tensor.clone()
        tensors[name] = tensor
    return Received(tensors, shapes, result.num_rows, result.num_rank_rows)


def poison(result: deep_a2a.DispatchResult) -> None:
    """Combine and later dispatches must not live on what the caller does to his views, nor on what a slot held."""
    for name in ("x", "scales"):
        tensor = getattr(result, name)
        if tensor is not None:
            tensor.view(torch.uint8).fill_(0x5A)


# ---- in the test -----------------------------------------------------------------------------------------------


def check(pool: Pool, cases: Sequence[Case]) -> None:
    """Runs the cases on all ranks and compares all that they got with the oracle."""
    __tracebackhide__ = True
    for case, *by_rank in zip(cases, *pool.run(run_cases, cases), strict=True):
        check_case(case, by_rank)


def check_case(case: Case, by_rank: Sequence[Sequence[Turn]]) -> None:
    """`by_rank[rank][turn]` is what came out."""
    setting = case.setting()
    for number in range(2 if case.cached else 1):
        data = [generators.inputs(case, rank, number) for rank in range(case.num_ranks)]
        topk_idx = [each.topk_idx for each in data]
        scales = None if case.fmt == "bf16" else [each.scales for each in data if each.scales is not None]
        weights = [each.topk_weights for each in data]
        wanted = reference.dispatch(setting, [each.payload for each in data], scales, topk_idx, weights)
        for rank, want in enumerate(wanted):
            check_received(case, f"turn {number}, rank {rank}", by_rank[rank][number].received, want)

        sources = reference.token_sources(topk_idx)
        rows = [generators.expert_output(case, rank, len(want.x), number) for rank, want in enumerate(wanted)]
        sums = reference.combine(setting, wanted, sources, rows, case.is_weighted)
        counts = [len(want.topk_idx if case.layout == "rank" else want.x) for want in wanted]
        values = [generators.side_values(case, rank, (n, *side_width(case))) for rank, n in enumerate(counts)]
        sides = reference.side(setting, wanted, sources, values)
        for rank in range(case.num_ranks):
            where = f"turn {number}, rank {rank}"
            assert_same_bits(case, f"{where}, combined x", by_rank[rank][number].sums, sums[rank])
            assert_same_bits(case, f"{where}, side", by_rank[rank][number].side, sides[rank] if case.side else None)


def check_received(case: Case, where: str, got: Received, want: reference.Dispatched) -> None:
    num_rows, num_rank_rows = len(want.row_tokens), len(want.rank_tokens)
    for name, value, count in [
        ("num_rows", got.num_rows, num_rows),
        ("num_rank_rows", got.num_rank_rows, num_rank_rows),
    ]:
        assert value == (count if case.host_sync else None), f"{where}, {name}: {value}, expected {count} in {case}"
    for name in COUNT_FIELDS:
        counts = torch.tensor([num_rows, num_rank_rows]).int() if name == "num_rows_tensor" else getattr(want, name)
        assert_same_bits(case, f"{where}, {name}", got.tensors[name], counts)
    for name in RANK_ROW_FIELDS:
        assert_same_bits(case, f"{where}, {name}", got.tensors[name], getattr(want, name))
    filled = torch.ones_like(want.row_tokens, dtype=torch.bool) if case.zero_padding else want.row_tokens >= 0
    for name in ROW_FIELDS:
        rows = got.tensors[name]
        expected = getattr(want, name)
        if name == "row_weights" or rows is None or expected is None:
            assert_same_bits(case, f"{where}, {name}", rows, expected)
        else:
            assert len(rows) == num_rows, f"{where}, {name}: {len(rows)} rows, expected {num_rows} in {case}"
            assert_same_bits(case, f"{where}, {name}", as_bytes(rows)[filled], as_bytes(expected)[filled])
            assert rows.dtype == expected.dtype, f"{where}, {name}: {rows.dtype}, expected {expected.dtype} in {case}"
    if case.host_sync and case.layout != "padded":
        for name, shape in got.shapes.items():
            lengths = {**dict.fromkeys(ROW_FIELDS, num_rows), **dict.fromkeys(RANK_ROW_FIELDS, num_rank_rows)}
            assert shape[0] == lengths.get(name, shape[0]), f"{where}, {name}: {shape}, expected {lengths[name]} rows"


def as_bytes(rows: torch.Tensor) -> torch.Tensor:
    if rows.numel() == 0:
        return torch.empty(len(rows), 0, dtype=torch.uint8)
    return rows.contiguous().view(torch.uint8)


def assert_same_bits(case: Case, what: str, got: torch.Tensor | None, want: torch.Tensor | None) -> None:
    if got is None or want is None:
        assert got is want, f"{what}: {got}, expected {want} in {case}"
        return
    assert (got.dtype, got.shape) == (want.dtype, want.shape), (
        f"{what}: {got.dtype} {tuple(got.shape)}, expected {want.dtype} {tuple(want.shape)} in {case}"
    )
    if want.numel() == 0:
        return
    differs = (as_bytes(got) != as_bytes(want)).reshape(-1, got.element_size()).any(1).reshape(got.shape)
    if differs.any():
        first = tuple(differs.nonzero()[0].tolist())
        raise AssertionError(
            f"{what}: {int(differs.sum())} of {got.numel()} differ, first at {first}: "
            f"{got[first].item()}, expected {want[first].item()} in {case}"
        )
