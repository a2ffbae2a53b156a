"""The backends that tests run on: what buffers are given for each, and where its arrays lie."""

from __future__ import annotations

import os
import time
from collections.abc import Iterable, Mapping
from typing import Any

import loopback
import pytest
import torch
import torch.distributed as dist

import deep_a2a
from deep_a2a.results import Event

# "emulated" is the CUDA kernels run by the CPU.
BACKENDS = ("cpu", "emulated", "cuda")
MARKS = {"cpu": (), "emulated": (), "cuda": (pytest.mark.gpu,)}
# Into what nodes ranks with GPUs of this host may be split, such as "2x1,2x2,4x1": then NVSHMEM is needed. With the
# network of tests/loopback.py all have the same number of ranks per node.
GPU_NODES = tuple(filter(None, os.environ.get("DEEP_A2A_TEST_GPU_NODES", "").split(",")))

ONE_NODE = tuple(f"1x{num_ranks}" for num_ranks in range(1, 9))
NODES = {  # nodes and ranks per node that tests go through
    "cpu": ("1x1", "1x8", "2x4", "4x2", "8x1", "2x3"),
    "emulated": (*ONE_NODE, "2x1", "2x2", "4x1", "3x2"),
    "cuda": (*ONE_NODE, *GPU_NODES),
}
USUAL_NODES = {  # the first ones where nothing else is said
    "cpu": ("2x4",),
    "emulated": ("1x4", "2x2"),
    "cuda": ("1x4", *(nodes for nodes in GPU_NODES if nodes in ("2x2", "4x1"))),
}
# Few, as the emulator runs every thread of every block, and more than one, so that blocks have to meet.
EMULATED_SMS = 2

on_backends = pytest.mark.parametrize("backend", [pytest.param(name, marks=MARKS[name]) for name in BACKENDS])
on_device_backends = pytest.mark.parametrize(
    "backend", [pytest.param(name, marks=MARKS[name]) for name in BACKENDS[1:]]
)


def on_nodes(num_ranks: int, sizes: Iterable[int], first: int = 0) -> pytest.MarkDecorator:
    """`backend`, of all but the `first` ones, with `ranks_per_node`: any of `sizes`, and all ranks."""
    places = [
        (name, size)
        for name in BACKENDS[first:]
        for size in sorted({*sizes, num_ranks})
        if name != "cuda" or size == num_ranks or f"{num_ranks // size}x{size}" in GPU_NODES
    ]
    params = [pytest.param(name, size, marks=MARKS[name], id=f"{name}-{size} per node") for name, size in places]
    return pytest.mark.parametrize(("backend", "ranks_per_node"), params)


def several(topologies: Iterable[str]) -> list[str]:
    """Those with more than one node."""
    return [topology for topology in topologies if not topology.startswith("1x")]


def on_topologies(nodes: Mapping[str, Iterable[str]] = NODES, first: int = 0) -> pytest.MarkDecorator:
    """`backend`, of all but the `first` ones, with `topology`, one of the backend's `nodes`."""
    params = [
        pytest.param(name, topology, marks=MARKS[name], id=f"{name}-{topology}")
        for name in BACKENDS[first:]
        for topology in nodes[name]
    ]
    return pytest.mark.parametrize(("backend", "topology"), params)


on_usual_nodes = on_topologies(USUAL_NODES)
on_several_nodes = on_topologies({name: several(nodes) for name, nodes in USUAL_NODES.items()})
on_usual_nodes_of_devices = on_topologies(USUAL_NODES, 1)


# ---- in a rank -------------------------------------------------------------------------------------------------


def device_of(backend: str) -> torch.device:
    """Where arrays of this rank lie; the device is made the current one. Ranks share GPUs where these are fewer."""
    if backend != "cuda":
        return torch.device("cpu")
    device = torch.device("cuda", dist.get_rank() % torch.cuda.device_count())
    torch.cuda.set_device(device)
    return device


def place(backend: str, ranks_per_node: int | None = None) -> dict[str, Any]:
    """Arguments of a Buffer. On GPUs the ranks are one node unless this split is among GPU_NODES."""
    device_of(backend)
    if backend == "cuda" and f"{dist.get_world_size() // (ranks_per_node or 1)}x{ranks_per_node}" not in GPU_NODES:
        ranks_per_node = None
    return {
        "backend": backend,
        "ranks_per_node": ranks_per_node,
        "num_sms": EMULATED_SMS if backend == "emulated" else None,
    }


def wait_for(event: Event | None) -> None:
    """Before results are read: on a GPU this orders streams, and what copies the results to the host blocks."""
    assert event is not None
    event.wait()


def settle(buffer: deep_a2a.Buffer) -> None:
    """Everything that was launched has come to its end; raises what failed."""
    if buffer.backend == "cuda":
        torch.cuda.synchronize()
    buffer.check()


def let_arrive(backend: str) -> None:
    """Before the host copies results: over the loopback network rows come by copies that this process makes, and a
    thread that waits for its stream inside of the driver would keep them from being made."""
    if backend != "cuda" or loopback.DIRECTORY is None:
        return
    event: Any = torch.cuda.Event()  # type: ignore[no-untyped-call]
    event.record()
    while not event.query():
        time.sleep(0.001)


CLOCK_HZ = 2e9  # of a GPU, at most


def occupy(seconds: float) -> None:
    """Keeps the current CUDA stream busy for at least so long."""
    torch.cuda._sleep(int(seconds * CLOCK_HZ))  # type: ignore[no-untyped-call]


def new_stream() -> torch.cuda.Stream:
    stream: torch.cuda.Stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    return stream
