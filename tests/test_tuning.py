"""Launch plans: whatever the shape, what a block is asked to hold fits it, and every byte of a row is covered once."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from deep_a2a import _cpu
from deep_a2a._cpu import Cast

native = pytest.importorskip("deep_a2a._emulated")

SHARED_BYTES = 232448  # of a Hopper block
BLOCK_WARPS, MAX_BARRIERS = 16, 128


def make_shape(layout: str, num_ranks: int, hidden: int, num_experts: int, num_topk: int) -> _cpu.Shape:
    return _cpu.Shape(
        num_ranks=num_ranks,
        ranks_per_node=num_ranks,
        layout=getattr(_cpu.Layout, layout),
        hidden=hidden,
        num_experts=num_experts,
        num_topk=num_topk,
        max_tokens=4096,
        expert_alignment=1,
        expert_capacity=64 if layout == "padded" else 0,
        max_recv_rows=0,
        num_slots=1,
        num_lanes=1,
    )


def row_format(name: str, hidden: int) -> dict[str, Any]:
    scales = -(-hidden // 128)
    return {
        "bf16": {"payload_bytes": 2 * hidden, "scale_bytes": 0, "cast": Cast.none},
        "fp8": {"payload_bytes": hidden, "scale_bytes": 4 * scales, "cast": Cast.none},
        "cast": {"payload_bytes": hidden, "scale_bytes": 4 * scales, "cast": Cast.fp8_e4m3},
        "cast ue8m0": {"payload_bytes": hidden, "scale_bytes": scales, "cast": Cast.fp8_e5m2},
    }[name]


LAYOUTS = st.sampled_from(["rank", "expert", "padded"])
RANKS = st.sampled_from([1, 2, 4, 8, 32])
HIDDEN = st.one_of(st.integers(1, 64), st.integers(1, 2048), st.sampled_from([448, 8192])).map(lambda n: 16 * n)
LOCAL_EXPERTS = st.sampled_from([1, 8, 64, 300])
FORMATS = st.sampled_from(["bf16", "fp8", "cast", "cast ue8m0"])


@given(LAYOUTS, RANKS, HIDDEN, LOCAL_EXPERTS, st.integers(1, 32), FORMATS)
def test_dispatch_plan(layout: str, num_ranks: int, hidden: int, local_experts: int, num_topk: int, name: str) -> None:
    num_experts = num_ranks * local_experts
    shape = make_shape(layout, num_ranks, hidden, num_experts, min(num_topk, num_experts))
    fmt = row_format(name, hidden)
    plan = native.plan_dispatch(shape, shared_bytes=SHARED_BYTES, **fmt)
    casts = fmt["cast"] != Cast.none and layout == "rank"  # elsewhere the rows are FP8 before they move
    row_bytes = 2 * hidden if casts else fmt["payload_bytes"]

    assert plan["shared_bytes"] <= SHARED_BYTES
    assert 1 <= plan["count_warps"] <= BLOCK_WARPS and 1 <= plan["move_warps"] <= BLOCK_WARPS
    assert plan["num_stages"] >= 2 and BLOCK_WARPS * plan["num_stages"] <= MAX_BARRIERS
    assert plan["num_chunks"] * plan["chunk_bytes"] >= row_bytes > (plan["num_chunks"] - 1) * plan["chunk_bytes"]
    assert plan["chunk_bytes"] % 16 == 0
    in_stage = [plan[key] for key in ("chunk_bytes", "side_offset", "routes_offset", "rows_offset", "stage_bytes")]
    assert in_stage == sorted(in_stage) and all(offset % 16 == 0 for offset in in_stage)
    assert plan["routes_offset"] - plan["side_offset"] >= fmt["scale_bytes"]
    assert layout != "rank" or plan["move_warps"] < BLOCK_WARPS  # somebody has the routing
    assert plan["stage_bytes"] - plan["rows_offset"] >= 4 * plan["num_targets"]
    rings = plan["move_warps"] * plan["num_stages"] * plan["stage_bytes"]
    assert plan["ring_offset"] + rings <= plan["shared_bytes"]
    if casts and plan["num_chunks"] > 1:  # every chunk makes whole 16 bytes of scales
        bytes_per_group = 1 if "ue8m0" in name else 4
        assert plan["chunk_bytes"] // 2 // 128 * bytes_per_group % 16 == 0


@given(LAYOUTS, RANKS, HIDDEN, st.integers(1, 32))
def test_combine_plan(layout: str, num_ranks: int, hidden: int, num_topk: int) -> None:
    shape = make_shape(layout, num_ranks, hidden, num_ranks * 32, num_topk)
    plan = native.plan_combine(shape, num_sms=12, shared_bytes=SHARED_BYTES)
    rings = plan["num_rings"] * plan["num_stages"]
    assert rings * 3584 < plan["shared_bytes"] <= SHARED_BYTES  # whole stages are read, however short a row is
    if layout != "rank":
        assert rings == 0 and -(-4096 >> plan["part_shift"]) <= 64  # parts that there are words for
        return
    assert plan["part_shift"] == 0  # so that ranks may have different numbers of SMs
    assert 1 <= plan["num_rings"] <= BLOCK_WARPS // 2 and 2 * rings <= MAX_BARRIERS
    assert plan["num_stages"] >= num_ranks  # a sum's terms, all at once
    assert 0 < plan["chunk_bytes"] <= min(3584, 2 * hidden)  # 7 pieces for each lane
    assert plan["chunk_bytes"] % 16 == 0


def test_what_was_measured() -> None:
    """DeepSeek-V3's shape gets the rings of docs/tuning.md."""
    shape = make_shape("rank", 4, 7168, 256, 8)
    fp8 = native.plan_dispatch(shape, shared_bytes=SHARED_BYTES, **row_format("fp8", 7168))
    assert (fp8["move_warps"], fp8["num_stages"], fp8["num_chunks"], fp8["chunk_bytes"]) == (10, 3, 1, 7168)
    bf16 = native.plan_dispatch(shape, shared_bytes=SHARED_BYTES, **row_format("bf16", 7168))
    assert (bf16["move_warps"], bf16["num_stages"], bf16["num_chunks"], bf16["chunk_bytes"]) == (10, 3, 2, 7168)
    combine = native.plan_combine(shape, num_sms=12, shared_bytes=SHARED_BYTES)
    assert (combine["num_rings"], combine["num_stages"], combine["chunk_bytes"]) == (8, 8, 3584)


def test_too_many_experts() -> None:
    shape = make_shape("rank", 4, 64, 4 * 20000, 8)
    with pytest.raises(ValueError, match="num_experts = 80000 is too many for the counters in a block's shared memory"):
        native.plan_dispatch(shape, shared_bytes=SHARED_BYTES, **row_format("bf16", 64))


def test_rows_that_do_not_fit() -> None:
    shape = make_shape("rank", 4, 1 << 20, 256, 8)
    fmt = row_format("fp8", 1 << 20)
    assert native.plan_dispatch(shape, shared_bytes=SHARED_BYTES, **fmt)["num_stages"] >= 2
    with pytest.raises(ValueError, match="rows of hidden = 1048576 with 32768 bytes of scales do not fit"):
        native.plan_dispatch(shape, shared_bytes=65536, **fmt)
