"""Scales by column: the same bits as by row, where TMA descriptors look for them, and no word written anywhere else."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any
from unittest import mock

import data
import exchange
import numpy
import pytest
import torch
import torch.distributed as dist
from backends import device_of, on_backends, on_device_backends, on_nodes, place
from generators import LAYOUTS, Case, case_on
from pool import Pool
from small import SMALL, error_of, send_ones

import deep_a2a
from deep_a2a import quant
from deep_a2a.column_scales import ColumnScales

UNTOUCHED = 0x5A5A5A5A
GUARD_WORDS = 64

# From one group of channels to more than a line has; whole words of four exponents and others.
HIDDEN = (16, 272, 640, 1024, 4240, 7168)
PAYLOADS = ("cast fp8_e4m3:float32", "cast fp8_e4m3:ue8m0", "fp8_e5m2:float32", "fp8_e4m3:ue8m0")
MODES: dict[str, dict[str, Any]] = {
    "plain": {},
    "cached": {"cached": True},
    "fixed shapes": {"host_sync": False},
    "fixed shapes, cached, owned": {"host_sync": False, "cached": True, "output": "owned"},
    "halves": {"halves": True},
    "halves, fixed shapes": {"halves": True, "host_sync": False},
    "halves, cached": {"halves": True, "cached": True},
    "async": {"async_op": True},
    "owned": {"output": "owned"},
    "zero padding": {"zero_padding": True},
    "zero padding, owned": {"zero_padding": True, "output": "owned", "async_op": True},
}


# ---- in a rank -------------------------------------------------------------------------------------------------


def packed(scales: numpy.ndarray[Any, Any]) -> numpy.ndarray[Any, Any]:
    """[rows, columns] of words, from the rows of scales as a dispatch by row has them."""
    if scales.dtype == numpy.float32:
        return scales.view(numpy.uint32)
    words = numpy.zeros((len(scales), (scales.shape[1] + 3) // 4), numpy.uint32)
    for row, column in numpy.ndindex(scales.shape):
        words[row, column // 4] |= numpy.uint32(int(scales[row, column]) << 8 * (column % 4))
    return words


def words_of(scales: torch.Tensor) -> numpy.ndarray[Any, Any]:
    return scales.cpu().contiguous().numpy().view(numpy.uint32)


def check_place(result: deep_a2a.DispatchResult, scale_format: str) -> None:
    """Shape, dtype, strides and alignment, as the documentation of the result says."""
    scales, num_groups = result.scales, quant.num_scale_groups(result.x.shape[-1])
    assert scales is not None
    columns = num_groups if scale_format == "float32" else -(-num_groups // 4)
    assert scales.dtype == (torch.float32 if scale_format == "float32" else torch.int32)
    assert tuple(scales.shape) == (*result.x.shape[:-1], columns)
    if scales.numel() > 0:
        pitch = (scales.shape[-2] + 3) // 4 * 4
        assert scales.stride() == ((columns * pitch,) if scales.dim() == 3 else ()) + (1, pitch)
        assert scales.data_ptr() % 16 == 0


def held_rows(result: deep_a2a.DispatchResult, zero_padding: bool) -> torch.Tensor:
    """bool, for each row of x flattened: whether its scales mean something."""
    num_rows = int(result.num_rows_tensor[0])
    held = torch.zeros(result.x.shape[:-1], dtype=torch.bool).flatten()
    if zero_padding or result.expert_offsets is None:
        held[:num_rows] = True
        return held
    offsets = result.expert_offsets.tolist()
    for first, count in zip(offsets, result.rows_per_expert.tolist(), strict=False):
        held[first : first + count] = True
    return held


class Guarded:
    """Columns that were handed out, each in a block of memory that is marked all over."""

    def __init__(self) -> None:
        self.blocks: list[tuple[torch.Tensor, torch.Tensor]] = []

    def guard(self, columns: ColumnScales | None) -> ColumnScales | None:
        if columns is None:
            return None
        value = columns.value
        size = columns.pitch * value.shape[-1] * (value.shape[0] if value.dim() == 3 else 1)
        block = torch.full((size + 2 * GUARD_WORDS,), UNTOUCHED, dtype=torch.int32, device=value.device)
        inside = block.view(value.dtype).as_strided(value.shape, value.stride(), GUARD_WORDS)
        self.blocks.append((block, inside))
        return replace(columns, value=inside, pointer=block.data_ptr() + 4 * GUARD_WORDS)

    def check(self, written: torch.Tensor) -> None:
        """`written` says of which rows, all experts together, the last block may hold the columns."""
        block, inside = self.blocks.pop()
        expected = torch.full_like(block, 0, dtype=torch.bool)
        rows = expected.as_strided(inside.shape, inside.stride(), GUARD_WORDS)
        rows.copy_(written.reshape(*inside.shape[:-1], 1).expand(inside.shape))
        assert (block[~expected] == UNTOUCHED).all(), "a word beside the columns was written"


@contextmanager
def guarded() -> Iterator[Guarded]:
    guards, real = Guarded(), ColumnScales.for_request
    with mock.patch.object(ColumnScales, "for_request", lambda *args: guards.guard(real(*args))):
        yield guards


def compare(buffer: deep_a2a.Buffer, case: Case, guards: Guarded) -> None:
    """Dispatches of the same rows, by row and by column; then another that takes the slot of the second."""
    handles: list[deep_a2a.DispatchHandle | None] = [None, None]
    for number in range(2 if case.cached else 1):
        by_row = exchange.dispatch(buffer, replace(case, column_major=False), number, handles[0])
        by_column = exchange.dispatch(buffer, replace(case, column_major=True), number, handles[1])
        handles = [by_row.handle, by_column.handle]
        check_place(by_column, case.scale_format)
        assert by_row.scales is not None and by_column.scales is not None
        held = held_rows(by_row, case.zero_padding)
        want = packed(by_row.scales.flatten(0, -2).cpu()[held].numpy())
        assert torch.equal(by_row.num_rows_tensor, by_column.num_rows_tensor)
        flat = [each.x.view(torch.uint8).flatten(0, -2).cpu()[held] for each in (by_row, by_column)]
        assert torch.equal(*flat)
        for result in (by_row, by_column):
            result.release()
        if case.output == "leased":  # the columns are no part of the lease
            exchange.dispatch(buffer, replace(case, seed=case.seed + 1)).release()
        got = words_of(by_column.scales.flatten(0, -2))[held.numpy()]
        assert numpy.array_equal(got, want), case
        in_between = int(by_row.num_rows_tensor[0]) if case.layout == "expert" else 0  # rows of no expert hold anything
        held[:in_between] = True
        guards.check(held)


def compare_cases(group: dist.ProcessGroup, cases: list[Case]) -> None:
    with deep_a2a.Buffer(group, **cases[0].buffer_arguments()) as buffer, guarded() as guards:
        for case in cases:
            compare(buffer, case, guards)


# ---- tests -----------------------------------------------------------------------------------------------------


@on_backends
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("mode", MODES)
def test_modes(pools: Callable[[int], Pool], backend: str, layout: str, mode: str) -> None:
    usual = case_on(backend, layout=layout, hidden=1040, expert_alignment=8, **MODES[mode])
    cases = [replace(usual, payload=payload, seed=seed) for seed, payload in enumerate(PAYLOADS)]
    pools(usual.num_ranks).run(compare_cases, cases)


@on_backends
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("hidden", HIDDEN)
def test_any_number_of_groups(pools: Callable[[int], Pool], backend: str, layout: str, hidden: int) -> None:
    usual = case_on(backend, layout=layout, hidden=hidden, local_experts=3, max_tokens=5, tokens=(5, 4, 0, 1) * 2)
    cases = [replace(usual, payload=payload, zero_padding=True) for payload in PAYLOADS[:2]]
    pools(usual.num_ranks).run(compare_cases, cases)


@on_backends
@pytest.mark.parametrize("layout", LAYOUTS)
def test_any_number_of_rows(pools: Callable[[int], Pool], backend: str, layout: str) -> None:
    """None at all, all on one rank, and around the number that a warp takes at a time."""
    usual = case_on(backend, topology="1x2", layout=layout, hidden=272, max_tokens=70, local_experts=2, num_topk=1)
    cases: list[Case] = []
    for routing, tokens in [
        *[("one_expert", (count, 0)) for count in (0, 1, 3, 4, 31, 32, 33, 64, 65)],
        *[("uniform", tokens) for tokens in [(0, 0), (70, 0), (70, 69), (1, 62)]],
        ("nowhere", (70, 70)),
    ]:
        for payload in PAYLOADS[:2]:
            cases.append(replace(usual, routing=routing, tokens=tokens, payload=payload, host_sync=len(cases) % 3 > 0))
    pools(2).run(compare_cases, cases)


@on_backends
@pytest.mark.parametrize("layout", LAYOUTS)
def test_more_pieces_than_warps(pools: Callable[[int], Pool], backend: str, layout: str) -> None:
    usual = case_on(backend, topology="1x2", layout=layout, hidden=4240, max_tokens=300, tokens=(300, 299), num_topk=2)
    usual = replace(usual, num_sms=None if backend == "cpu" else 1, local_experts=2)
    pools(2).run(compare_cases, [replace(usual, payload=payload) for payload in PAYLOADS[2:]])


def dispatch_in_different_layouts(group: dist.ProcessGroup, backend: str, ranks_per_node: int) -> None:
    """The ranks need not agree."""
    with deep_a2a.Buffer(group, **place(backend, ranks_per_node), **SMALL) as buffer:
        layout: Any = "column_major" if buffer.rank % 2 else "row_major"
        for number in range(3):
            result = send_ones(buffer, 448.0 * 2**number, quantize="fp8", scale_layout=layout)
            assert result.scales is not None and (result.scales == 2.0**number).all()
            by_handle = buffer.dispatch(
                torch.full((2, 16), 448.0, dtype=torch.bfloat16, device=result.x.device),
                handle=result.handle,
                quantize="fp8",
                scale_layout="column_major" if number == 1 else layout,
            )
            assert by_handle.scales is not None and (by_handle.scales == 1).all()
            result.release()
            by_handle.release()


@on_nodes(4, (2, 4))
def test_ranks_choose_for_themselves(pools: Callable[[int], Pool], backend: str, ranks_per_node: int) -> None:
    pools(4).run(dispatch_in_different_layouts, backend, ranks_per_node)


def refuse(group: dist.ProcessGroup, backend: str, layout: Any, halves: bool) -> None:
    """A dispatch of which nobody but the GPU knows that it came to nothing."""
    settings: dict[str, Any] = {**place(backend), **SMALL, "expert_capacity": 16 if layout == "padded" else None}
    with deep_a2a.Buffer(group, layout=layout, **settings) as buffer, guarded() as guards:
        send_ones(buffer, quantize="fp8", scale_layout="column_major").release()
        idx = torch.full((2, 2), 99 if buffer.rank == 1 else 0, device=device_of(backend))
        x = torch.ones(2, 16, dtype=torch.bfloat16, device=idx.device)
        modes: dict[str, Any] = {"quantize": "fp8", "scale_layout": "column_major", "async_op": True}
        dispatch = (lambda *args, **modes: buffer.dispatch_send(*args, **modes).recv()) if halves else buffer.dispatch
        result = dispatch(x, idx, host_sync=False, **modes)
        assert result.event is not None
        name, text = error_of(result.event.synchronize)
        assert name == "ValueError" and "is 99" in text, (name, text)
        assert result.num_rows_tensor.tolist() == [0, 0]
        guards.check(torch.zeros(result.x.shape[:-1], dtype=torch.bool))
        result.release()
        send_ones(buffer, quantize="fp8", scale_layout="column_major").release()


@on_device_backends
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("halves", [False, True])
def test_a_refused_dispatch_writes_nothing(
    pools: Callable[[int], Pool], backend: str, layout: str, halves: bool
) -> None:
    pools(2).run(refuse, backend, layout, halves)


def dequantize_both(group: dist.ProcessGroup, backend: str, scale_format: str) -> None:
    """What `quant.dequantize` makes of a result does not depend on the layout of its scales."""
    case = case_on(backend, topology="1x2", hidden=1040, payload=f"cast fp8_e4m3:{scale_format}")
    with deep_a2a.Buffer(group, **case.buffer_arguments()) as buffer:
        results = [exchange.dispatch(buffer, replace(case, column_major=each)) for each in (False, True)]
        rows = [quant.dequantize(each.x, each.scales) for each in results if each.scales is not None]
        assert torch.equal(rows[0].view(torch.int16), rows[1].view(torch.int16))
        assert len(rows[0]) == len(data.inputs(case, 0).x) + len(data.inputs(case, 1).x)


@on_backends
@pytest.mark.parametrize("scale_format", ["float32", "ue8m0"])
def test_dequantize(pools: Callable[[int], Pool], backend: str, scale_format: str) -> None:
    pools(2).run(dequantize_both, backend, scale_format)
