"""The benchmark's data, and the plain computation that results are compared with."""

from __future__ import annotations

from dataclasses import replace

import pytest
import reference
import torch
from bench_cells import LAYOUTS, SMALL, setting_of

from deep_a2a.benchmark import plain
from deep_a2a.benchmark.record import Layout
from deep_a2a.benchmark.workload import Workload, expert_output


def test_workload_is_repeatable_and_fresh() -> None:
    work, again = Workload(SMALL), Workload(SMALL)
    assert torch.equal(work.input(3, 1)[0], again.input(3, 1)[0])
    assert torch.equal(work.routing(3).topk_idx[1], again.routing(3).topk_idx[1])
    for other in (work.input(4, 1), work.input(3, 2), (work.expert_base(3, 1), None), Workload(
        replace(SMALL, seed=1)).input(3, 1)):  # fmt: skip
        assert not torch.equal(work.input(3, 1)[0], other[0])
    assert not torch.equal(work.routing(3).topk_idx[1], work.routing(4).topk_idx[1])
    cached = Workload(replace(SMALL, cached=True))
    assert torch.equal(cached.routing(3).topk_idx[1], cached.routing(4).topk_idx[1])
    assert not torch.equal(cached.input(3, 1)[0], cached.input(4, 1)[0])


def test_workload_values() -> None:
    cell = replace(SMALL, num_tokens=200)
    magnitude = Workload(cell).input(0, 0)[0].float().abs()
    assert 2**-7 <= magnitude.min() < 2**-6 and 1 < magnitude.max() < 2
    rows, scales = Workload(replace(cell, dtype="fp8", scale_format="ue8m0")).input(0, 0)
    assert rows.dtype == torch.float8_e4m3fn and not rows.float().isnan().any() and rows.float().abs().max() > 200
    assert scales is not None and scales.dtype == torch.uint8 and scales.shape == (200, 2)


def test_expert_output_tells_experts_apart() -> None:
    base = Workload(SMALL).expert_base(0, 0)[:1]
    rows = [expert_output(base, expert) for expert in range(256)]
    assert len({bytes(row.view(torch.uint8).flatten().tolist()) for row in rows}) > 200
    magnitude = torch.cat(rows).float().abs()
    assert magnitude.min() >= 2**-7 and magnitude.max() < 2
    together = expert_output(base.expand(256, -1), torch.arange(256))
    assert torch.equal(torch.cat(rows).view(torch.int16), together.view(torch.int16))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("routing", ["uniform", "none_to_rank"])
def test_plain_computation_agrees_with_oracle(layout: Layout, routing: str) -> None:
    cell = replace(SMALL, layout=layout, routing=routing)
    work, capacity = Workload(cell), 96
    routed = work.routing(0)
    bases = [work.expert_base(0, source) for source in range(cell.num_ranks)]
    setting = setting_of(cell, capacity)
    payload = [work.input(0, source)[0] for source in range(cell.num_ranks)]
    expected = reference.dispatch(setting, payload, None, routed.topk_idx, routed.topk_weights)
    outputs = []
    for rank, want in enumerate(expected):
        got = plain.received_rows(cell, routed, rank)
        assert torch.equal(got.tokens, want.rank_tokens)
        assert torch.equal(got.topk_idx.int(), want.topk_idx) and torch.equal(got.topk_weights, want.topk_weights)
        assert torch.equal(got.rows_per_expert.int(), want.rows_per_expert)
        if layout != "rank":
            assert torch.equal(got.expert_tokens, want.row_tokens[want.row_tokens >= 0])
        room = torch.zeros(capacity * cell.num_local_experts, cell.hidden, dtype=torch.bfloat16)
        written = plain.write_expert_output(cell, got, bases, rank, room, capacity).flatten(0, -2)
        assert torch.equal((written != 0).any(dim=1), want.row_tokens >= 0)
        who = rank if layout == "rank" else got.experts
        rows = expert_output(torch.cat(bases)[want.row_tokens[want.row_tokens >= 0]], who)
        assert torch.equal(written[want.row_tokens >= 0].view(torch.int16), rows.view(torch.int16))
        outputs.append(written)
    sources = reference.token_sources(routed.topk_idx)
    sums = reference.combine(setting, expected, sources, outputs, weighted=layout != "rank")
    for rank, want_sum in enumerate(sums):
        got_sum = plain.combined(cell, routed.topk_idx[rank], routed.topk_weights[rank], bases[rank], rank)
        assert torch.equal(got_sum.view(torch.int16), want_sum.view(torch.int16))


def test_wrong_rows_are_named() -> None:
    source = torch.arange(40.0).view(10, 4)
    parts, tokens, places = [source[:5], source[5:]], torch.tensor([7, 2, 2, 9]), torch.tensor([3, 0, 1, 2])
    rows = torch.empty(4, 4)
    rows[places] = source[tokens]
    plain.require_rows("rows", rows, places, parts, tokens)
    rows[1, 3] += 1
    with pytest.raises(ValueError, match="rows: row 1 is not that of token 2"):
        plain.require_rows("rows", rows, places, parts, tokens)
    minus_zero = torch.zeros(1, 4).neg()
    with pytest.raises(ValueError, match="combined rows: row 0"):
        plain.require_combined(minus_zero, torch.zeros(1, 4), exact=True)
    plain.require_combined(minus_zero, torch.zeros(1, 4), exact=False)
    with pytest.raises(ValueError, match=r"one of rows 0 to 0 is off by 1\.0"):
        plain.require_combined(minus_zero + 1, torch.zeros(1, 4), exact=False)
