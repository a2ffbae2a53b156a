"""The comparison of what all ranks got with the oracle, bit by bit."""

from __future__ import annotations

from collections.abc import Sequence

import data
import reference
import torch
from exchange import COUNT_FIELDS, RANK_ROW_FIELDS, ROW_FIELDS, Received, Turn, run_cases, side_width
from generators import Case
from pool import RUN_DEADLINE_S, Pool


def check(pool: Pool, cases: Sequence[Case], deadline_s: float = RUN_DEADLINE_S) -> None:
    """Runs the cases on all ranks and compares all that they got with the oracle."""
    __tracebackhide__ = True
    for case, *by_rank in zip(cases, *pool.run(run_cases, cases, deadline_s=deadline_s), strict=True):
        check_case(case, by_rank)


def check_case(case: Case, by_rank: Sequence[Sequence[Turn]]) -> None:
    """`by_rank[rank][turn]` is what came out."""
    setting = case.setting()
    for number in range(2 if case.cached else 1):
        wanted, sources = expected_dispatch(case, number)
        for rank, want in enumerate(wanted):
            check_received(case, f"turn {number}, rank {rank}", by_rank[rank][number].received, want)

        rows = [data.expert_output(case, rank, len(want.x), number) for rank, want in enumerate(wanted)]
        sums = reference.combine(setting, wanted, sources, rows, case.is_weighted)
        counts = [len(want.topk_idx if case.layout == "rank" else want.x) for want in wanted]
        values = [data.side_values(case, rank, (n, *side_width(case))) for rank, n in enumerate(counts)]
        sides = reference.side(setting, wanted, sources, values)
        for rank in range(case.num_ranks):
            where = f"turn {number}, rank {rank}"
            assert_same_bits(case, f"{where}, combined x", by_rank[rank][number].sums, sums[rank])
            assert_same_bits(case, f"{where}, side", by_rank[rank][number].side, sides[rank] if case.side else None)


def expected_dispatch(case: Case, number: int) -> tuple[list[reference.Dispatched], torch.Tensor]:
    """What each rank receives, and the rank that each token comes from."""
    sent = [data.inputs(case, rank, number) for rank in range(case.num_ranks)]
    topk_idx = [each.topk_idx for each in sent]
    scales = None if case.fmt == "bf16" else [each.scales for each in sent if each.scales is not None]
    weights = [each.topk_weights for each in sent]
    wanted = reference.dispatch(case.setting(), [each.payload for each in sent], scales, topk_idx, weights)
    return wanted, reference.token_sources(topk_idx)


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
        if name == "scales" and case.scale_layout == "column_major":
            expected = reference.scale_words(expected)
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
