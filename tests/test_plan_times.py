"""The planner's times and windows: by hand, beside measured kernels, and as `Buffer.memory` has them."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest

import deep_a2a
from deep_a2a.planner import Hardware, Workload, make_plan
from deep_a2a.planner.measured import measured_kernels
from deep_a2a.planner.rates import RATES
from deep_a2a.planner.roofline import estimate
from deep_a2a.planner.spread import find_spread
from deep_a2a.planner.traffic import dispatch_traffic
from deep_a2a.planner.windows import part_bytes, plan_window
from deep_a2a.settings import LayoutName

FIGURES = Path(__file__).parents[1] / "bench" / "results" / "published.json"
FOUR = Workload(num_ranks=4, ranks_per_node=4)


def test_rates_are_those_of_the_file() -> None:
    links = {link["name"]: link for link in json.loads(FIGURES.read_text())["links"]}
    assert set(links) == set(RATES)
    for name, rate in RATES.items():
        assert (links[name]["value"], links[name]["unit"]) == (rate.value, rate.unit), name
        assert links[name]["source"] and links[name]["machine"] and rate.source, name


def test_one_node_by_hand() -> None:
    """FP8, top-8 of 256 on 4 ranks: 4 (1 - C(192, 8) / C(256, 8)) = 3.6142 ranks a token; 64-byte route records."""
    few, many = make_plan(FOUR, num_sms=4).dispatch.estimate, make_plan(FOUR, num_sms=16).dispatch.estimate
    rows, counts = 4096 * 3.614214305566513, 2 * (32 + (1 + 4 + 256) * 4 + 12)
    assert few.limit == "SMs out" and many.limit == "NVLink out"
    assert few.total_us == pytest.approx((rows * (7392 + 64) + 4 * counts) / (4 * 50e3) + 2 * 1.2)
    assert many.total_us == pytest.approx((rows * 3 / 4 * (7392 + 64) + 3 * counts) / 335e3 + 2 * 1.2)
    combine = make_plan(FOUR, num_sms=4).combine.estimate
    assert combine.limit == "SMs in"
    assert combine.total_us == pytest.approx(rows * 14336 / (4 * 79e3) + 2 * 1.2)
    pulled = make_plan(replace(FOUR, layout="expert"), num_sms=4).dispatch.estimate
    assert pulled.total_us == pytest.approx((4096 * 8 * 7392 + rows * 112 + 4 * counts) / (4 * 50e3) + 3 * 1.2)


def test_pulled_rows_have_the_rate_of_loads() -> None:
    rows, counts = 4096 * 3.614214305566513, 2 * (32 + (1 + 4 + 256) * 4 + 12)
    for layout, gbs, record in (("rank", 335e3, 64), ("expert", 322e3, 112), ("padded", 322e3, 112)):
        terms = make_plan(replace(FOUR, layout=layout)).dispatch.estimate.terms  # type: ignore[arg-type]
        assert terms["NVLink out"] == pytest.approx((rows * 3 / 4 * (7392 + record) + 3 * counts) / gbs)


def test_two_hops_by_hand() -> None:
    """8 nodes, unlimited: 5.2947 nodes a token, of which 7/8 are others; 128 bytes of entries a row, 1344 of counts."""
    plan = make_plan(Workload(), num_sms=8)
    rows = 4096 * 5.294652000382479 * 7 / 8
    fixed = 2 * 1.2 + 8.35 + 262144 / 47e3
    assert plan.dispatch.estimate.limit == plan.combine.estimate.limit == "network out"
    assert plan.dispatch.estimate.total_us == pytest.approx((rows * (7392 + 128) + 7 * 1344) / 47e3 + fixed)
    assert plan.combine.estimate.total_us == pytest.approx(rows * 14336 / 47e3 + fixed)
    assert plan.dispatch.node_gbs == pytest.approx(rows * 8 / 7 * 7392 / plan.dispatch.estimate.total_us / 1e3)
    fast = make_plan(Workload(), replace(Hardware(), network_gbs=1000.0), num_sms=8).dispatch.estimate
    assert fast.limit == "SMs out", "then the relay's hop is the slower one"
    assert fast.terms["NVLink out"] == plan.dispatch.estimate.terms["NVLink out"]


def test_rounds_by_hand() -> None:
    """16 nodes stage 15 streams, in and out, of 14720 bytes a row; two of seven rounds have room at a time."""
    usual = Workload(num_ranks=128)
    tokens = 600
    workload = replace(usual, staging_bytes=2 * 15 * 14720 * 2 * tokens)
    plan, at_once = make_plan(workload), make_plan(replace(usual, staging_bytes=2 * 15 * 14720 * 4096))
    assert (plan.staging.num_rounds, plan.staging.tokens_per_round) == (7, tokens)
    assert (at_once.staging.num_rounds, at_once.staging.tokens_per_round) == (1, 4096)
    lane_bytes = 2 * 15 * 14720 * 2 * tokens
    assert lane_bytes * 2 <= plan.staging.num_bytes < lane_bytes * 2 + 4 * 256
    assert plan.staging.unlimited_bytes == at_once.staging.num_bytes == at_once.staging.unlimited_bytes
    assert plan.window.worst == deep_a2a.memory_table(
        num_ranks=128, ranks_per_node=8, hidden=7168, num_experts=256, num_topk=8, num_max_tokens_per_rank=4096,
        staging_bytes=workload.staging_bytes,
    )  # fmt: skip
    for op in ("dispatch", "combine"):
        found, without = getattr(plan, op).estimate, getattr(at_once, op).estimate
        assert found.terms == {**without.terms, "rounds": pytest.approx(3 * 2 * 8.35)}  # 0, 2, 4, 6
        assert found.limit == "network out" and getattr(plan, op).traffic == getattr(at_once, op).traffic
    # The first chunk of a round is all that it has for a node.
    few = make_plan(replace(workload, num_tokens=64, staging_bytes=2 * 15 * 14720 * 2 * 4)).dispatch
    stream_bytes = few.traffic.network_out / 15
    assert few.estimate.fixed_us == pytest.approx(2 * 1.2 + 8.35 + stream_bytes / 16 / 47e3)


def test_waits_of_rounds_can_be_the_limit() -> None:
    one_at_a_time = Workload(num_ranks=16, num_tokens=200, staging_bytes=4 * 14720)
    found = make_plan(one_at_a_time).dispatch.estimate
    assert found.limit == "rounds" and found.terms["rounds"] == pytest.approx(99 * 2 * 8.35)
    assert found.total_us == pytest.approx(99 * 2 * 8.35 + found.fixed_us)


def test_every_sm_reads_the_counts() -> None:
    large = make_plan(Workload(num_ranks=2048, num_experts=2048, num_tokens=128), num_sms=8).dispatch.estimate
    assert large.limit == "counts"
    assert large.terms["counts"] == pytest.approx(2048 * 2 * (32 + (256 + 2048 + 2048) * 4) / 79e3)


@pytest.mark.parametrize("layout", ["rank", "expert"])
@pytest.mark.parametrize("num_ranks", [4, 8, 16, 64])
def test_sms_needed_are_the_fewest(num_ranks: int, layout: LayoutName) -> None:
    workload = replace(Workload(num_ranks=num_ranks, ranks_per_node=min(8, num_ranks)), layout=layout)
    plan = make_plan(workload)
    for op in ("dispatch", "combine"):
        needed = getattr(plan, op).estimate.sms_needed
        enough = getattr(make_plan(workload, num_sms=needed), op).estimate
        assert not enough.limit.startswith("SMs") and enough.total_us == getattr(plan, op).estimate.total_us
        if needed > 1:
            assert getattr(make_plan(workload, num_sms=needed - 1), op).estimate.limit.startswith("SMs")


def test_kernels_that_were_measured() -> None:
    """Bytes and six rates give the time of every kernel of 4096 tokens within a tenth."""
    kernels = measured_kernels(FIGURES)
    large = [each for each in kernels if "128 tokens" not in each.name]
    assert len(large) == 17
    for each in large:
        assert 0.9 <= each.ratio <= 1.1, each


def test_bad_arguments() -> None:
    traffic = dispatch_traffic(FOUR, find_spread(FOUR))
    with pytest.raises(ValueError, match="num_sms is 0, expected 1 or more"):
        estimate(FOUR, traffic, Hardware(), 0)
    with pytest.raises(TypeError, match=r"num_sms is 2.5 of type float, expected an int or None"):
        estimate(FOUR, traffic, Hardware(), 2.5)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="network_gbs is 0, expected a positive number"):
        Hardware(network_gbs=0)
    with pytest.raises(TypeError, match="flag_us is '1' of type str, expected a number"):
        Hardware(flag_us="1")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="dtype is 'fp4', expected one of 'bf16', 'fp8'"):
        Workload(dtype="fp4")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="layout must be 'rank', 'expert' or 'padded', got 'row'"):
        Workload(layout="row")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="num_topk is 8, expected at most 4: 1 groups of 4 experts"):
        Workload(num_experts=64, num_groups=16, topk_groups=1)
    with pytest.raises(TypeError, match=r"topk_groups is 1.5 of type float, expected an int"):
        Workload(topk_groups=1.5)  # type: ignore[arg-type]


# ---- windows ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("nodes", [2, 16, 256])
@pytest.mark.parametrize("layout", ["rank", "expert", "padded"])
def test_windows_are_the_memory_table(nodes: int, layout: LayoutName) -> None:
    workload = replace(
        Workload(num_ranks=8 * nodes, num_experts=max(256, 8 * nodes), num_tokens=64, topk_groups=2), layout=layout
    )
    window = plan_window(workload, find_spread(workload), slack=1.5)
    sizes = {
        "num_ranks": 8 * nodes, "ranks_per_node": 8, "hidden": 7168, "num_experts": max(256, 8 * nodes), "num_topk": 8,
        "num_max_tokens_per_rank": 64, "layout": layout,
    }  # fmt: skip
    assert window.worst == deep_a2a.memory_table(**sizes)  # type: ignore[arg-type]
    assert sum(part_bytes(window.worst).values()) == window.worst.total_bytes
    if layout == "padded":
        assert window.bounded is None and window.max_recv_rows is None
        return
    assert window.bounded == deep_a2a.memory_table(**sizes, max_recv_rows=window.max_recv_rows)  # type: ignore[arg-type]
    slots = 64 * 8 if layout == "expert" else 64 * find_spread(workload).ranks_per_token
    assert window.max_recv_rows is not None and 1.5 * slots <= window.max_recv_rows + 1e-6 < 1.5 * slots + 1.001
    parts = part_bytes(window.bounded)
    assert parts["between nodes"] == part_bytes(window.worst)["between nodes"] > 0
    assert parts["received"] == sum(
        region.bytes for region in window.bounded.regions if region.name in ("recv_rows", "recv_scales", "recv_routes")
    )


def test_room_for_the_busiest_rank() -> None:
    workload = replace(FOUR, routing="zipf")
    spread = find_spread(workload)
    rows = plan_window(workload, spread, slack=1.0).max_recv_rows
    assert rows == math.ceil(4096 * 4 * max(spread.rank_hits)) > 4096 * spread.ranks_per_token * 1.05


def test_slack() -> None:
    for slack in (0.99, float("nan"), float("inf")):
        with pytest.raises(ValueError, match="expected a number of at least 1"):
            plan_window(FOUR, find_spread(FOUR), slack)
