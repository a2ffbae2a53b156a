"""What a rank does in tests of the NVSHMEM transport: it joins the job, and puts random bytes to its rail peers.

As a program it is one rank over real NVSHMEM; ``test_network_gpu.py`` starts it, and so can anybody by hand:

    python tests/network_rank.py --rank 0 --num-ranks 2 --ranks-per-node 1 --store /tmp/store --rounds 10 &
    python tests/network_rank.py --rank 1 --num-ranks 2 --ranks-per-node 1 --store /tmp/store --rounds 10
"""

from __future__ import annotations

import argparse
import ctypes
import datetime
import faulthandler
import os
import random
import time
from importlib import import_module
from typing import Any

import torch
import torch.distributed as dist

from deep_a2a.arrays import Device
from deep_a2a.group import Group, as_group
from deep_a2a.nvshmem_job import Job, join
from deep_a2a.nvshmem_memory import allocate
from deep_a2a.torch_arrays import TorchLibrary

CHUNK_BYTES = (16, 512, 7168, 4096 * 16)
MOST_CHUNKS = 9


def native_of(backend: str) -> Any:
    """The module of an "emulated" or a "cuda" rank."""
    if backend == "emulated":
        return import_module("deep_a2a._emulated")
    from deep_a2a.nvshmem_library import load

    return load()[0]


class Rank:
    """One rank of a group over a job, which several of them may share one after another."""

    def __init__(self, group: Any, backend: str, ranks_per_node: int, timeout_s: float) -> None:
        self.group: Group = as_group(group)
        self.backend = backend
        self.native = native_of(backend)
        self.ranks_per_node = ranks_per_node
        self.timeout_s = timeout_s
        self.device = 0 if backend == "emulated" else self.group.rank % torch.cuda.device_count()
        if backend == "cuda":
            torch.cuda.set_device(self.device)
        self.job: Job = join(self.native, self.group, self.device, heap_bytes=2**24, num_queues=4, timeout_s=timeout_s)
        self.stream = self.native.Stream(self.device)

    @property
    def node(self) -> int:
        return self.group.rank // self.ranks_per_node

    @property
    def peers(self) -> list[int]:
        """Rail peers, in the order of the areas of a PutMeter."""
        nodes = self.group.size // self.ranks_per_node
        local = self.group.rank % self.ranks_per_node
        return [(self.node + 1 + stream) % nodes * self.ranks_per_node + local for stream in range(nodes - 1)]

    def memory(self, window: Any) -> torch.Tensor:
        if self.backend == "emulated":
            return torch.frombuffer((ctypes.c_uint8 * window.nbytes).from_address(window.address), dtype=torch.uint8)
        return TorchLibrary().from_device(window.address, window.nbytes, window, Device("cuda", self.device))

    def wait(self) -> None:
        """For what is on the stream."""
        event = self.native.Event(self.device)
        event.record(self.stream.handle)
        end = time.monotonic() + self.timeout_s
        while not event.done():
            if time.monotonic() > end:
                raise TimeoutError(f"rank {self.group.rank}: the stream has not come to its end")
            time.sleep(0.0005)

    def check_mapping(self, windows: list[Any], remote_is_mapped: bool) -> None:
        """Ranks of the own node are mapped; those of others as the network is said to have it."""
        for rank, window in enumerate(windows):
            near = rank // self.ranks_per_node == self.node
            assert (window is not None) == (near or remote_is_mapped), (self.group.rank, rank, window)


def random_bytes(nbytes: int, *seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(hash(seed) & 0xFFFFFFFF)
    return torch.randint(0, 256, (nbytes,), dtype=torch.uint8, generator=generator)


def put_rounds(rank: Rank, rounds: int, seed: int, remote_is_mapped: bool) -> int:
    """Puts in chunks of a few sizes, each in a window of its own, and compares every byte. Returns how many arrived."""
    draw = random.Random(seed)
    total = 0
    for step, chunk_bytes in enumerate(CHUNK_BYTES):
        most = chunk_bytes * MOST_CHUNKS
        layout = rank.native.PutMeter.layout(
            num_ranks=rank.group.size, ranks_per_node=rank.ranks_per_node, nbytes=most, chunk_bytes=chunk_bytes
        )
        windows = allocate(rank.job, rank.group, layout["nbytes"], rank.timeout_s)
        rank.check_mapping(windows, remote_is_mapped)
        window = windows[rank.group.rank]
        meter = rank.native.PutMeter(
            ranks_per_node=rank.ranks_per_node,
            rank=rank.group.rank,
            device=rank.device,
            window=window,
            pes=list(rank.job.pes),
            timeout_s=rank.timeout_s,
        )
        for turn in range(-(-rounds // len(CHUNK_BYTES))):
            total += put_once(rank, meter, window, chunk_bytes, (seed, step, turn), draw, remote_is_mapped)
    return total


def put_once(
    rank: Rank, meter: Any, window: Any, chunk_bytes: int, seed: tuple[int, ...], draw: random.Random, mapped: bool
) -> int:
    nbytes = draw.randint(1, chunk_bytes * MOST_CHUNKS // 16) * 16
    by = draw.choice(["warp", "thread", "stores"] if mapped else ["warp", "thread"])
    num_sms, num_warps = draw.randint(1, 3), draw.randint(1, 4)
    at = rank.native.PutMeter.layout(
        num_ranks=rank.group.size, ranks_per_node=rank.ranks_per_node, nbytes=nbytes, chunk_bytes=chunk_bytes
    )
    memory = rank.memory(window)

    def area(kind: str, stream: int) -> torch.Tensor:
        start = at[f"{kind}_offset"] + stream * at["area_bytes"]
        return memory[start : start + nbytes]

    meter.hold(rank.stream.handle)  # now nobody needs what the last round has put
    meter.open()
    rank.wait()
    for stream, peer in enumerate(rank.peers):
        area("out", stream).copy_(random_bytes(nbytes, *seed, rank.group.rank, peer))
    if rank.backend == "cuda":
        torch.cuda.synchronize()
    meter.hold(rank.stream.handle)
    meter.open()
    meter.put(
        stream=rank.stream.handle,
        nbytes=nbytes,
        chunk_bytes=chunk_bytes,
        by=getattr(rank.native.PutBy, by),
        num_sms=num_sms,
        num_warps=num_warps,
    )
    rank.wait()
    assert not meter.late(), f"rank {rank.group.rank}: a put or a signal has not come in {rank.timeout_s} s"
    for stream, peer in enumerate(rank.peers):
        seen = area("in", stream).cpu()
        expected = random_bytes(nbytes, *seed, peer, rank.group.rank)
        wrong = int((seen != expected).sum())
        assert wrong == 0, f"rank {rank.group.rank}: {wrong} of {nbytes} bytes of rank {peer} are wrong ({by}, {seed})"
    return nbytes * len(rank.peers)


def main() -> None:
    parser = argparse.ArgumentParser(description="One rank of a test of puts over NVSHMEM.")
    for name in ("--rank", "--num-ranks", "--ranks-per-node", "--rounds"):
        parser.add_argument(name, type=int, required=True)
    parser.add_argument("--store", required=True, help="a file for the ranks to meet in, not there yet")
    parser.add_argument(
        "--network", choices=["mapped", "remote"], default="mapped", help="other nodes' memory is mapped"
    )
    parser.add_argument("--timeout", type=float, default=60.0, help="of every wait, in seconds")
    options = parser.parse_args()
    faulthandler.dump_traceback_later(4 * options.timeout, exit=True)
    timeout = datetime.timedelta(seconds=options.timeout)
    dist.init_process_group(
        "gloo",
        init_method=f"file://{options.store}",
        rank=options.rank,
        world_size=options.num_ranks,
        timeout=timeout,
    )
    rank = Rank(None, "cuda", options.ranks_per_node, options.timeout)
    start = time.monotonic()
    total = put_rounds(rank, options.rounds, seed=1, remote_is_mapped=options.network == "mapped")
    print(
        f"rank {options.rank}: {total} bytes in {options.rounds} rounds, {time.monotonic() - start:.1f} s; "
        f"{rank.job.describe()}",
        flush=True,
    )
    dist.barrier()
    os._exit(0)  # what the library does when a process ends is not under test


if __name__ == "__main__":
    main()
