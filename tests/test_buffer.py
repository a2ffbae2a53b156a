"""A buffer's attributes, its memory, what it moves, and several buffers side by side to their ends."""

from __future__ import annotations

import gc
import random
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from types import SimpleNamespace
from typing import Any

import data
import exchange
import pytest
import reference
import torch.distributed as dist
from backends import on_backends, on_device_backends, on_nodes, place, settle
from checks import check_case
from exchange import Turn
from generators import LAYOUTS, Case, case_on
from pool import Pool
from small import SMALL

import deep_a2a
from deep_a2a.arrays import Device
from deep_a2a.bootstrap import Member
from deep_a2a.cuda_site import CudaSite
from deep_a2a.errors import CommError
from deep_a2a.streams import StreamChoice


def read_attributes(group: dist.ProcessGroup, backend: str, ranks_per_node: int) -> dict[str, Any]:
    names = ["rank", "num_ranks", "num_nodes", "ranks_per_node", "local_rank", "node", "hidden", "num_experts"]
    names += ["num_local_experts", "num_topk", "num_max_tokens_per_rank", "layout", "max_recv_rows", "backend"]
    with deep_a2a.Buffer(group, num_lanes=3, **place(backend, ranks_per_node), **SMALL) as buffer:
        table = deep_a2a.memory_table(
            num_ranks=8,
            ranks_per_node=ranks_per_node,
            num_lanes=3,
            **{k: v for k, v in SMALL.items() if k != "timeout_s"},
        )
        assert table == buffer.memory and str(table) == str(buffer.memory)
        return {name: getattr(buffer, name) for name in names}


@on_nodes(8, [4])
def test_attributes(pools: Callable[[int], Pool], backend: str, ranks_per_node: int) -> None:
    for rank, got in enumerate(pools(8).run(read_attributes, backend, ranks_per_node)):
        node, local_rank = divmod(rank, ranks_per_node)
        expected = {"rank": rank, "num_ranks": 8, "num_nodes": 8 // ranks_per_node, "ranks_per_node": ranks_per_node}
        expected |= {"local_rank": local_rank, "node": node}
        expected |= {"hidden": 16, "num_experts": 16, "num_local_experts": 2, "num_topk": 2}
        expected |= {"num_max_tokens_per_rank": 4, "max_recv_rows": 32}
        assert got == {**expected, "layout": "rank", "backend": backend}


def default_ranks_per_node(group: dist.ProcessGroup, backend: str) -> int:
    with deep_a2a.Buffer(group, **place(backend), **SMALL) as buffer:
        return buffer.ranks_per_node


@on_backends
def test_one_node_by_default(pools: Callable[[int], Pool], backend: str) -> None:
    assert pools(8).run(default_ranks_per_node, backend) == [8] * 8


@pytest.mark.parametrize("layout", LAYOUTS)
def test_memory_table(layout: str) -> None:
    """The regions lie one behind the other, their sizes add up, and each line of the table shows one."""
    shape = {"hidden": 7168, "num_experts": 256, "num_topk": 8, "num_max_tokens_per_rank": 128, "layout": layout}
    one = deep_a2a.memory_table(num_ranks=8, ranks_per_node=4, **shape)
    ends = [region.offset + region.bytes for region in one.regions]
    assert [region.offset for region in one.regions] == [0, *ends[:-1]] and ends[-1] == one.total_bytes
    rows = {"rank": 8 * 128, "expert": 8 * 128 * 8, "padded": 8 * 128 * 32}[layout]
    sizes = {region.name: region for region in one.regions}
    assert sizes["recv_rows"].bytes_each == rows * 7168 * 2 and sizes["recv_rows"].count == 2
    lines = str(one).splitlines()
    assert all(any(line.split()[:1] == [name] for line in lines) for name in sizes)
    more = deep_a2a.memory_table(num_ranks=8, ranks_per_node=4, num_slots=5, **shape)
    assert more.total_bytes > one.total_bytes
    if layout != "padded":
        less = deep_a2a.memory_table(num_ranks=8, ranks_per_node=4, max_recv_rows=100, **shape)
        assert {region.name: region for region in less.regions}["recv_rows"].bytes_each == 100 * 7168 * 2


# ---- bytes -----------------------------------------------------------------------------------------------------


def count_bytes(group: dist.ProcessGroup, case: Case) -> list[dict[str, int]]:
    """What a dispatch, a cached dispatch and a combine add to `wire_bytes`."""

    def count() -> None:
        settle(buffer)
        counts.append(buffer.wire_bytes)

    counts: list[dict[str, int]] = []
    with exchange.make_buffer(group, case) as buffer:
        count()
        result = exchange.dispatch(buffer, case)
        count()
        exchange.dispatch(buffer, case, 1, result.handle).release()
        count()
        exchange.combine(buffer, case, 0, result)
        count()
    return [{link: after[link] - before[link] for link in after} for before, after in pairwise(counts)]


def record_bytes(case: Case) -> int:
    """Of the routing that goes along with a row even where the dispatch is cached: experts and weights."""
    return -(-8 * case.num_topk // 16) * 16 if case.layout == "rank" and case.backend != "cpu" else 0


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(
    ("backend", "topology"), [("cpu", "1x8"), ("cpu", "2x4"), ("cpu", "8x1"), ("emulated", "2x2"), ("emulated", "4x1")]
)
@pytest.mark.parametrize(("payload", "staging_tokens"), [("bf16", None), ("bf16", 1), ("cast fp8_e4m3:float32", None)])
def test_wire_bytes(
    pools: Callable[[int], Pool],
    backend: str,
    topology: str,
    layout: str,
    payload: str,
    staging_tokens: int | None,
) -> None:
    """Rows cross as often as they have to, the network once per token and node. The first time routing comes along.

    Within a node of GPUs it does so every time in layout "rank".
    """
    case = case_on(backend, topology=topology, layout=layout, hidden=2048, payload=payload, routing="sparse")
    case = replace(case, staging_tokens=staging_tokens)
    topk_idx = [data.inputs(case, rank).topk_idx for rank in range(case.num_ranks)]
    row_bytes = 2 * 2048 if payload == "bf16" else 2048 + 4 * 16
    links = ("shm" if backend == "cpu" else "nvlink", "network")
    sent = dict(zip(links, reference.wire_rows(case.setting(), topk_idx, pulled=backend != "cpu"), strict=True))
    back = dict(zip(links, reference.wire_rows(case.setting(), topk_idx, combining=True), strict=True))
    for rank, (first, cached, combined) in enumerate(pools(case.num_ranks).run(count_bytes, case)):
        expected = {link: rows[rank] * row_bytes for link, rows in sent.items()}
        expected[links[0]] += sent[links[0]][rank] * record_bytes(case)
        assert cached == expected
        assert combined == {link: rows[rank] * 2 * 2048 for link, rows in back.items()}
        assert all(first[link] >= cached[link] for link in cached)


@on_device_backends
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("payload", ["bf16", "cast fp8_e4m3:float32"])
def test_wire_bytes_between_gpus(pools: Callable[[int], Pool], backend: str, layout: str, payload: str) -> None:
    """A row crosses once for each other rank, whatever the layout: several experts get it from there."""
    case = case_on(backend, layout=layout, hidden=2048, payload=payload, routing="sparse")
    topk_idx = [data.inputs(case, rank).topk_idx for rank in range(case.num_ranks)]
    row_bytes = 2 * 2048 if payload == "bf16" else 2048 + 4 * 16
    rows, _ = reference.wire_rows(case.setting(), topk_idx, combining=True)
    for rank, (first, cached, combined) in enumerate(pools(case.num_ranks).run(count_bytes, case)):
        assert cached == {"nvlink": rows[rank] * (row_bytes + record_bytes(case))}
        assert combined == {"nvlink": rows[rank] * 2 * 2048}
        assert first["nvlink"] >= cached["nvlink"]


# ---- several buffers -------------------------------------------------------------------------------------------


def use_buffers(group: dist.ProcessGroup, cases: list[Case]) -> list[list[Turn]]:
    """Three buffers in turns; the first goes while the others are used; the last two go in any order."""
    buffers = [exchange.make_buffer(group, case) for case in cases]
    results = [exchange.dispatch(buffer, case) for buffer, case in zip(buffers, cases, strict=True)]
    received = [exchange.copy_result(result) for result in results]
    turns = [
        [Turn(received[idx], (sums := exchange.combine(buffer, cases[idx], 0, results[idx])).x, sums.side)]
        for idx, buffer in enumerate(buffers)
    ]
    buffers[0].destroy()
    turns.append(exchange.run_case(buffers[1], cases[1]))
    for buffer in buffers[1:] if dist.get_rank(group) % 3 else buffers[:0:-1]:
        buffer.destroy()
        buffer.destroy()
    return turns


@on_backends
def test_buffers_side_by_side(pools: Callable[[int], Pool], backend: str) -> None:
    cases = [
        case_on(backend, layout="rank", seed=1),
        case_on(backend, layout="expert", hidden=128, seed=2),
        case_on(backend, layout="padded", seed=3),
    ]
    nodes = {"cpu": ("2x4", "4x2", "1x8"), "emulated": ("2x2", "4x1", "1x4")}.get(backend, ("1x4",) * 3)
    cases = [replace(case, topology=topology) for case, topology in zip(cases, nodes, strict=True)]
    for case, *by_rank in zip([*cases, cases[1]], *pools(cases[0].num_ranks).run(use_buffers, cases), strict=True):
        check_case(case, by_rank)


def use_backends(group: dist.ProcessGroup, cases: list[Case]) -> list[list[Turn]]:
    """Buffers of different backends in one process, in turns."""
    buffers = [exchange.make_buffer(group, case) for case in cases]
    turns = [exchange.run_case(buffer, case) for buffer, case in zip(buffers, cases, strict=True)]
    for buffer in buffers:
        buffer.destroy()
    return turns


@on_device_backends
def test_backends_side_by_side(pools: Callable[[int], Pool], backend: str) -> None:
    cases = [case_on(name, topology="1x4", seed=1) for name in ("cpu", backend, "cpu")]
    for case, *by_rank in zip(cases, *pools(4).run(use_backends, cases), strict=True):
        check_case(case, by_rank)


def drop_buffers(group: dist.ProcessGroup, cases: list[Case]) -> list[list[Turn]]:
    """Ends in any order: of buffers, results, handles and views, with and without `destroy` and `release`."""
    rank, turns = dist.get_rank(group), []
    for turn, case in enumerate(cases):
        buffer = exchange.make_buffer(group, case)
        result = exchange.dispatch(buffer, case)
        received = exchange.copy_result(result)
        combined = exchange.combine(buffer, case, 0, result)
        kept: dict[str, Any] = {"buffer": buffer, "result": result, "handle": result.handle, "view": result.x}
        turns.append([exchange.turn_of(received, combined)])
        del buffer, result
        order = list(kept)
        random.Random(rank + turn).shuffle(order)
        for name in order:
            thing = kept.pop(name)
            if (rank + turn) % 2 and name in ("buffer", "result"):
                (thing.destroy if name == "buffer" else thing.release)()
            del thing
        gc.collect()
    return turns


@on_backends
@pytest.mark.parametrize("layout", LAYOUTS)
def test_teardown_in_any_order(pools: Callable[[int], Pool], backend: str, layout: str) -> None:
    cases = [case_on(backend, layout=layout, seed=seed) for seed in range(4)]
    for case, *by_rank in zip(cases, *pools(cases[0].num_ranks).run(drop_buffers, cases), strict=True):
        check_case(case, by_rank)


def use_subgroups(group: dist.ProcessGroup, case: Case) -> list[list[Turn]]:
    """Two groups of four ranks, a buffer each; rank numbers are those of the group."""
    halves = [dist.new_group([0, 1, 2, 3]), dist.new_group([4, 5, 6, 7])]
    return exchange.run_cases(halves[dist.get_rank(group) // 4], [case])


@on_backends
def test_buffers_of_other_groups(pools: Callable[[int], Pool], backend: str) -> None:
    case = case_on(backend, topology="2x2" if backend == "cpu" else "1x4")
    by_rank = pools(8).run(use_subgroups, case)
    check_case(case, [turns[0] for turns in by_rank[:4]])
    check_case(case, [turns[0] for turns in by_rank[4:]])


class Alone:
    """A group of whom the others are not asked."""

    rank, size = 0, 2

    def all_gather_bytes(self, message: bytes, timeout_s: float) -> list[bytes]:
        return [message] * self.size


def test_gpus_out_of_reach() -> None:
    """Of two pairs, the one without peer access is named; a GPU that this process does not see is not judged."""
    native = SimpleNamespace(
        device_count=lambda: 3,
        pci_bus_id=lambda ordinal: f"0000:0{ordinal}:00.0",
        can_access_peer=lambda _, peer: peer != 2,
    )
    site = CudaSite(native, "cuda", Device("cuda"), 0, num_sms=8, choice=StreamChoice.own, delay_seed=None)
    others: list[Member] = [
        {**site.member, "device": device, "bus_id": f"0000:0{bus}:00.0"} for device, bus in ((1, 1), (0, 7), (2, 2))
    ]
    settings: Any = SimpleNamespace(ranks_per_node=4, num_nodes=1)
    with pytest.raises(CommError) as raised:
        site.connect(Alone(), [site.member, *others], settings, 1 << 20, 1.0)
    assert "rank 0 (device 0, 0000:00:00.0) and rank 3 (device 2, 0000:02:00.0) have no peer access" in str(
        raised.value
    )
