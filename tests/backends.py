"""The backends that tests run on: what buffers are given for each, and where its arrays lie."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import pytest
import torch
import torch.distributed as dist

import deep_a2a
from deep_a2a.results import Event

# "emulated" is the CUDA kernels run by the CPU. Both have one node; "cpu" alone has traffic between nodes.
BACKENDS = ("cpu", "emulated", "cuda")
MARKS = {"cpu": (), "emulated": (), "cuda": (pytest.mark.gpu,)}
NODES = {  # nodes and ranks per node that tests go through
    "cpu": ("1x1", "1x8", "2x4", "4x2", "8x1", "2x3"),
    "emulated": ("1x1", "1x2", "1x3", "1x4", "1x8"),
    "cuda": ("1x1", "1x2", "1x3", "1x4", "1x8"),
}
USUAL_NODES = {"cpu": "2x4", "emulated": "1x4", "cuda": "1x4"}
# Few, as the emulator runs every thread of every block, and more than one, so that blocks have to meet.
EMULATED_SMS = 2

on_backends = pytest.mark.parametrize("backend", [pytest.param(name, marks=MARKS[name]) for name in BACKENDS])
on_device_backends = pytest.mark.parametrize(
    "backend", [pytest.param(name, marks=MARKS[name]) for name in BACKENDS[1:]]
)


def on_nodes(num_ranks: int, sizes: Iterable[int]) -> pytest.MarkDecorator:
    """`backend` with `ranks_per_node`: any of `sizes` on the CPU, all ranks on the others."""
    places = [("cpu", size) for size in sizes] + [(name, num_ranks) for name in BACKENDS[1:]]
    params = [pytest.param(name, size, marks=MARKS[name], id=f"{name}-{size} per node") for name, size in places]
    return pytest.mark.parametrize(("backend", "ranks_per_node"), params)


def on_topologies() -> pytest.MarkDecorator:
    """`backend` with `topology`."""
    params = [
        pytest.param(name, nodes, marks=MARKS[name], id=f"{name}-{nodes}") for name in BACKENDS for nodes in NODES[name]
    ]
    return pytest.mark.parametrize(("backend", "topology"), params)


# ---- in a rank -------------------------------------------------------------------------------------------------


def device_of(backend: str) -> torch.device:
    """Where arrays of this rank lie; the device is made the current one. Ranks share GPUs where these are fewer."""
    if backend != "cuda":
        return torch.device("cpu")
    device = torch.device("cuda", dist.get_rank() % torch.cuda.device_count())
    torch.cuda.set_device(device)
    return device


def place(backend: str, ranks_per_node: int | None = None) -> dict[str, Any]:
    """Arguments of a Buffer. `ranks_per_node` is for the CPU: the others take all ranks as one node."""
    device_of(backend)
    if backend == "cpu":
        return {"backend": backend, "ranks_per_node": ranks_per_node}
    return {"backend": backend, "num_sms": EMULATED_SMS if backend == "emulated" else None}


def wait_for(event: Event | None) -> None:
    """Before results are read: on a GPU this orders streams, and what copies the results to the host blocks."""
    assert event is not None
    event.wait()


def settle(buffer: deep_a2a.Buffer) -> None:
    """Everything that was launched has come to its end; raises what failed."""
    if buffer.backend == "cuda":
        torch.cuda.synchronize()
    buffer.check()


CLOCK_HZ = 2e9  # of a GPU, at most


def occupy(seconds: float) -> None:
    """Keeps the current CUDA stream busy for at least so long."""
    torch.cuda._sleep(int(seconds * CLOCK_HZ))  # type: ignore[no-untyped-call]


def new_stream() -> torch.cuda.Stream:
    stream: torch.cuda.Stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    return stream
