"""The planner's bytes: beside the oracle's rows, the benchmark's count, and what the cpu backend moves."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import reference
import torch
import torch.distributed as dist
from pool import Pool

from deep_a2a import Buffer, memory_table
from deep_a2a.benchmark.cell import Cell
from deep_a2a.benchmark.traffic import combine_traffic as counted_combine
from deep_a2a.benchmark.traffic import dispatch_traffic as counted_dispatch
from deep_a2a.benchmark.workload import Workload as CellWorkload
from deep_a2a.planner import wire
from deep_a2a.planner.spread import Spread, find_spread
from deep_a2a.planner.traffic import combine_traffic, dispatch_traffic
from deep_a2a.planner.workload import Dtype, Workload
from deep_a2a.routing import synthetic
from deep_a2a.settings import LayoutName

SMALL = Workload(num_ranks=8, ranks_per_node=4, num_tokens=2000, hidden=256, num_experts=32, num_topk=4)


@pytest.mark.parametrize("topk_groups", [None, 1, 2])
@pytest.mark.parametrize("ranks_per_node", [1, 2, 4, 8])
@pytest.mark.parametrize("layout", ["rank", "expert"])
def test_rows_of_the_oracle(layout: LayoutName, ranks_per_node: int, topk_groups: int | None) -> None:
    """Drawn tokens, counted by tests/reference.py; the mean over ranks, since each has its own luck."""
    workload = replace(SMALL, ranks_per_node=ranks_per_node, layout=layout)
    if topk_groups is not None and topk_groups * 32 // workload.num_nodes < 4:
        pytest.skip("too few experts in so many groups")
    workload = replace(workload, topk_groups=topk_groups if (topk_groups or 0) <= workload.num_nodes else None)
    groups = None if workload.topk_groups is None else workload.num_nodes
    idx = [
        synthetic("uniform", 2000, 32, 4, 8, seed=rank, num_groups=groups, topk_groups=workload.topk_groups)[0]
        for rank in range(8)
    ]
    setting = reference.Setting(8, ranks_per_node, 32, 4, layout)
    spread = find_spread(workload)
    for combining, found in ((False, dispatch_traffic(workload, spread)), (True, combine_traffic(workload, spread))):
        near, far = reference.wire_rows(setting, idx, combining, pulled=True)
        assert found.nvlink_rows == pytest.approx(sum(near) / 8, rel=0.01)
        assert found.network_rows == pytest.approx(sum(far) / 8, rel=0.01)


@pytest.mark.parametrize(("num_ranks", "ranks_per_node", "layout"), [(4, 4, "expert"), (4, 4, "rank"), (8, 4, "rank")])
@pytest.mark.parametrize("dtype", ["bf16", "fp8"])
def test_busiest_gpu_of_zipf_as_the_benchmark_counts_it(
    num_ranks: int, ranks_per_node: int, dtype: Dtype, layout: LayoutName
) -> None:
    cell = Cell(
        num_ranks=num_ranks, ranks_per_node=ranks_per_node, num_tokens=4096, hidden=128, num_topk=8, num_experts=64,
        dtype=dtype, layout=layout, routing="zipf", backend="cuda" if num_ranks == ranks_per_node else "cpu",
    )  # fmt: skip
    workload = Workload(
        num_ranks=num_ranks, ranks_per_node=ranks_per_node, num_tokens=4096, hidden=128, num_topk=8, num_experts=64,
        dtype=dtype, layout=layout, routing="zipf",
    )  # fmt: skip
    topk_idx = CellWorkload(cell).routing(0).topk_idx
    spread = find_spread(workload)
    for found, counted in (
        (dispatch_traffic(workload, spread), counted_dispatch(cell, topk_idx)),
        (combine_traffic(workload, spread), counted_combine(cell, topk_idx)),
    ):
        assert found.nvlink_wire_bytes == pytest.approx(counted.wire.nvlink + counted.wire.shm, rel=0.01)
        assert found.network_wire_bytes == pytest.approx(counted.wire.network, rel=0.01)
        assert found.logical_bytes == pytest.approx(counted.logical_bytes, rel=0.01)


def moved_bytes(group: dist.ProcessGroup, workload: Workload) -> list[dict[str, int]]:
    """Every token to all ranks: what the buffer says it moved in a dispatch and in a combine."""
    with Buffer(
        group, hidden=workload.hidden, num_experts=workload.num_experts, num_topk=workload.num_topk,
        num_max_tokens_per_rank=workload.num_tokens, ranks_per_node=workload.ranks_per_node, layout=workload.layout,
        staging_bytes=workload.staging_bytes,
    ) as buffer:  # fmt: skip
        idx = torch.arange(workload.num_topk).repeat(workload.num_tokens, 1)
        x = torch.randn(workload.num_tokens, workload.hidden, dtype=torch.bfloat16)
        quantize = "fp8" if workload.dtype == "fp8" else None
        result = buffer.dispatch(x, idx, torch.ones(idx.shape), quantize=quantize)
        after_dispatch = buffer.wire_bytes
        buffer.combine(torch.zeros(*result.x.shape, dtype=torch.bfloat16), result.handle)
        after_combine = {name: count - after_dispatch[name] for name, count in buffer.wire_bytes.items()}
        result.release()
        dist.barrier(group=group)
    return [after_dispatch, after_combine]


@pytest.mark.parametrize("layout", ["rank", "expert"])
@pytest.mark.parametrize("dtype", ["bf16", "fp8"])
@pytest.mark.parametrize("staging_bytes", [None, 9000])
@pytest.mark.parametrize("ranks_per_node", [2, 3, 6])
def test_bytes_of_the_cpu_backend(
    pools: Callable[[int], Pool], ranks_per_node: int, dtype: Dtype, layout: LayoutName, staging_bytes: int | None
) -> None:
    """To the byte, with all headers: a token has one expert on each rank, so nothing is left to chance.

    Rounds add nothing. The backend does not count the count vectors that it stores on its own node.
    """
    workload = Workload(
        num_ranks=6, ranks_per_node=ranks_per_node, num_tokens=30, hidden=144, num_experts=6, num_topk=6, dtype=dtype,
        layout=layout, staging_bytes=staging_bytes,
    )  # fmt: skip
    spread = find_spread(workload)
    assert spread.ranks_per_token == pytest.approx(6)
    counts_near = workload.num_nodes * (ranks_per_node - 1) * wire.count_words_bytes(workload)
    dispatch, combine = dispatch_traffic(workload, spread), combine_traffic(workload, spread)
    for moved in pools(6).run(moved_bytes, workload):
        assert moved[0]["network"] == pytest.approx(dispatch.network_out, rel=1e-12)
        assert moved[0]["shm"] == pytest.approx(dispatch.nvlink_out - counts_near, rel=1e-12)
        assert moved[1]["network"] == pytest.approx(combine.network_out, rel=1e-12)
        assert moved[1]["shm"] == pytest.approx(combine.nvlink_in, rel=1e-12)


@pytest.mark.parametrize("layout", ["rank", "expert", "padded"])
@pytest.mark.parametrize(("hidden", "num_topk"), [(7168, 8), (136, 3), (2048, 32)])
def test_headers_fit_the_regions_of_the_native_module(hidden: int, num_topk: int, layout: LayoutName) -> None:
    """Regions are counts of what wire.py knows the sizes of; a change of the wire format shows here."""
    workload = Workload(
        num_ranks=24, ranks_per_node=4, num_tokens=100, hidden=hidden, num_experts=48, num_topk=num_topk, dtype="bf16",
        layout=layout,
    )  # fmt: skip
    table = memory_table(
        num_ranks=24, ranks_per_node=4, num_max_tokens_per_rank=100, hidden=hidden, num_experts=48, num_topk=num_topk,
        layout=layout,
    )  # fmt: skip
    sizes = {region.name: region.bytes_each for region in table.regions}
    stream_row = wire.stream_row_bytes(workload) + wire.align_up(-(-hidden // 128) * 4, 128)  # room for scales as well
    assert sizes["net_in"] == 5 * 100 * stream_row
    assert sizes["recv_routes"] == 24 * 100 * wire.record_bytes(workload)
    assert sizes["counts"] == 24 * wire.count_words_bytes(workload)
    rows_per_chunk = min(100, wire.CHUNK_BYTES // stream_row)
    assert sizes["chunk_flag"] == 5 * -(-100 // rows_per_chunk) * 8 and sizes["chunk_credit"] == 0
    staged = memory_table(
        num_ranks=24, ranks_per_node=4, num_max_tokens_per_rank=100, hidden=hidden, num_experts=48, num_topk=num_topk,
        layout=layout, staging_bytes=2 * 5 * 2 * 30 * stream_row,
    )  # fmt: skip
    sizes = {region.name: region.bytes_each for region in staged.regions}
    assert sizes["net_in"] == 5 * 2 * 30 * stream_row
    chunks_per_round = -(-30 // min(30, wire.CHUNK_BYTES // stream_row))
    assert sizes["chunk_flag"] == sizes["chunk_credit"] == 5 * 4 * chunks_per_round * 8


def test_rows_by_hand() -> None:
    """Two nodes of two ranks; tokens have one expert on ranks 0 and 3 each, none elsewhere."""
    workload = Workload(
        num_ranks=4, ranks_per_node=2, num_tokens=10, hidden=128, num_experts=4, num_topk=2, dtype="bf16"
    )
    spread = Spread((1.0, 0.0, 0.0, 1.0), (1.0, 1.0), (1.0, 0.0, 0.0, 1.0), "by hand")
    found = dispatch_traffic(workload, spread)
    record, stream, counts = 16, 256 + 2 * 16, 32 + (2 + 4 + 4) * 4 + 8
    assert (wire.record_bytes(workload), wire.stream_row_bytes(workload)) == (record, stream)
    words = 2 * counts
    assert (wire.count_vector_bytes(workload), wire.count_words_bytes(workload)) == (counts, words)
    # Ranks 1 and 2 store 20 rows each for their neighbours: own tokens and those of the other node.
    assert (found.nvlink_rows, found.network_rows, found.logical_rows, found.node_rows) == (20, 10, 40, 20)
    assert found.nvlink_out == found.nvlink_in == 20 * (256 + record) + 2 * words
    assert found.network_out == found.network_in == 10 * stream + counts
    assert found.sm_out == 20 * (256 + record) + 10 * stream + 4 * words
    assert found.sm_in == 10 * 256 + 10 * 256 + 10 * stream
    assert found.each_sm_in == 4 * words
    back = combine_traffic(workload, spread)
    assert (back.nvlink_rows, back.network_rows, back.logical_rows) == (20, 10, 40)
    assert back.nvlink_out == back.nvlink_in == 20 * 256 and back.network_out == back.network_in == 10 * 256
    assert back.sm_in == (20 + 10) * 256 and back.sm_out == (10 + 10) * 256
    doubled = replace(workload, layout="expert")
    # Rank 0 stores the 20 rows that it pulls, and as a relay 10 of those that come from the other node.
    assert dispatch_traffic(doubled, spread).sm_out == 30 * 256 + 20 * 32 + 10 * stream + 4 * words
    assert combine_traffic(doubled, spread).sm_in == (20 + 10 + 40) * 256


def test_directions_by_hand() -> None:
    """Three nodes of three ranks, all tokens to rank 0: more comes in than any GPU sends, and in combine goes out."""
    workload = Workload(num_ranks=9, ranks_per_node=3, num_tokens=10, hidden=128, num_experts=9, num_topk=1)
    spread = Spread((1.0, *(0.0,) * 8), (1.0, 0.0, 0.0), (1.0, *(0.0,) * 8), "by hand")
    row, stream, counts = 128 + 4 + 16, 128 + 16 + 16, wire.count_vector_bytes(workload)
    words = wire.count_words_bytes(workload)
    found, back = dispatch_traffic(workload, spread), combine_traffic(workload, spread)
    assert found.nvlink_out == 30 * row + 6 * words and found.nvlink_in == 60 * row + 6 * words
    assert found.network_out == 10 * stream + 2 * counts and found.network_in == 20 * stream + 2 * counts
    assert (back.nvlink_out, back.nvlink_in) == (60 * 256, 30 * 256)
    assert (back.network_out, back.network_in) == (20 * 256, 10 * 256)
    assert found.nvlink_rows == back.nvlink_rows == 60 and found.network_rows == back.network_rows == 20
