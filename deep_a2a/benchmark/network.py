"""What the network between nodes carries: plain puts from every rank to its rail peers on all other nodes at once.

Puts by the library, with a warp or a thread for each, or plain stores where the other nodes' memory is mapped; in
chunks of several sizes, on several numbers of SMs. The fastest way is the ceiling.
"""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import torch.distributed as dist

from deep_a2a import memory_table, nvshmem_environment, nvshmem_job, nvshmem_memory
from deep_a2a.benchmark.agreement import agree, attempt, largest
from deep_a2a.benchmark.cell import Cell
from deep_a2a.benchmark.link import shared_note, six_digits
from deep_a2a.benchmark.place import Place
from deep_a2a.benchmark.stream_gate import StreamGate
from deep_a2a.group import as_group

if TYPE_CHECKING:
    from deep_a2a._nvshmem import PutMeter

# What each rank puts to all its rail peers together: about what a dispatch does. The emulator takes small sizes only.
_BYTES = {"cuda": 64 << 20, "emulated": 8192}
_CHUNK_BYTES = {"cuda": (32 << 10, 128 << 10, 512 << 10), "emulated": (1024, 4096)}
_SMS = {"cuda": (4, 8, 16, 24), "emulated": (1, 2)}
_WARPS = {"cuda": 16, "emulated": 2}
_USUAL_SMS = 12  # of a Buffer that is told nothing
_NUM_ITERS, _NUM_WARMUP = 10, 2
_LONG_US, _FEW_ITERS = 50_000.0, 3  # slow networks, and a slow emulator, need no more to be told from others


@dataclass(frozen=True)
class PutSpeed:
    """`gbs`: 1e9 bytes a second that each rank puts while all do. `by`: warp, thread, or stores."""

    by: str
    chunk_bytes: int
    num_sms: int
    gbs: float


@dataclass(frozen=True)
class Network:
    """All speeds that were measured, and what the library says that it moves bytes by."""

    speeds: Sequence[PutSpeed]
    carrier: str
    note: str = ""

    @property
    def ceiling(self) -> PutSpeed:
        return max(self.speeds, key=lambda speed: speed.gbs)

    def gbs_at(self, num_sms: int | None) -> float | None:
        """The fastest on no more SMs than that; None where nothing so small was measured, or it is not known."""
        return max((speed.gbs for speed in self.speeds if speed.num_sms <= (num_sms or 0)), default=None)

    def describe(self) -> str:
        """What the ceiling was measured with, as a record says it."""
        best = self.ceiling
        return f"puts by {best.by}, {best.chunk_bytes} bytes each, {best.num_sms} SMs{self.note}"

    def to_json(self) -> list[dict[str, Any]]:
        """The fastest way on each number of SMs."""
        best: dict[int, PutSpeed] = {}
        for speed in sorted(self.speeds, key=lambda speed: (speed.num_sms, speed.gbs)):
            best[speed.num_sms] = speed
        return [asdict(speed) for speed in best.values()]


class Puts:
    """The meter of puts on one rank, and its memory. Collective, as is all that it does."""

    def __init__(self, group: dist.ProcessGroup, place: Place, ranks_per_node: int, timeout_s: float) -> None:
        num_ranks, rank = dist.get_world_size(group), dist.get_rank(group)
        self._backend = backend = place.backend
        self.num_streams = num_ranks // ranks_per_node - 1
        self.bytes_per_stream = -(-_BYTES[backend] // self.num_streams // 16) * 16
        agree(group, attempt(place.network_native))
        self._native: Any = place.network_native()
        job = nvshmem_job.join(
            self._native, as_group(group), place.device_idx, heap_bytes=4 * _BYTES[backend],
            num_queues=_USUAL_SMS, timeout_s=timeout_s,
        )  # fmt: skip
        self.carrier = job.describe().partition(", ")[2]  # without the rank's own number
        nbytes = max(
            self._native.PutMeter.layout(
                num_ranks=num_ranks, ranks_per_node=ranks_per_node, nbytes=self.bytes_per_stream, chunk_bytes=chunk
            )["nbytes"]
            for chunk in _CHUNK_BYTES[backend]
        )
        windows = nvshmem_memory.allocate(job, as_group(group), nbytes, timeout_s)
        self._window = windows[rank]
        rail = windows[rank % ranks_per_node :: ranks_per_node]
        self.is_mapped = largest(group, any(window is None for window in rail))[0] == 0
        made: list[PutMeter] = []
        construct = partial(
            self._native.PutMeter, ranks_per_node=ranks_per_node, rank=rank, device=place.device_idx,
            window=self._window, pes=list(job.pes), timeout_s=timeout_s,
        )  # fmt: skip
        agree(group, attempt(lambda: made.append(construct())))
        self.meter = made[0]

    def put(self, stream: int, speed: PutSpeed) -> None:
        """As `speed` says, whose `gbs` is not looked at."""
        by = getattr(self._native.PutBy, speed.by)
        self.meter.put(
            stream=stream, nbytes=self.bytes_per_stream, chunk_bytes=speed.chunk_bytes, by=by, num_sms=speed.num_sms,
            num_warps=_WARPS[self._backend],
        )  # fmt: skip

    def retire(self) -> None:
        """Memory that late puts may still come to is not used again."""
        if self.meter.late():
            self._native.SymmetricHeap.lose(self._window)


def measure_network(gate: StreamGate, puts: Puts, place: Place, num_sms: Iterable[int]) -> Network:
    """The speed of each way to put, on `num_sms` SMs and on a few other numbers of them. Collective."""
    backend, speeds = place.backend, []
    ways = ("warp", "stores" if puts.is_mapped else "thread")
    all_sms = sorted({*num_sms, *_SMS[backend]})
    for by, chunk_bytes, sms in itertools.product(ways, _CHUNK_BYTES[backend], all_sms):
        way = PutSpeed(by, chunk_bytes, sms, 0.0)
        put = partial(puts.put, speed=way)
        gate.measure(put, "released")  # loaded while nothing is held: loading may wait for all kernels
        warmup = [gate.measure(put) for _ in range(_NUM_WARMUP)]
        num_iters = _NUM_ITERS if min(warmup) < _LONG_US else _FEW_ITERS  # the same on all ranks, as times are
        microseconds = statistics.median(gate.measure(put) for _ in range(num_iters))
        gbs = puts.bytes_per_stream * puts.num_streams / microseconds / 1e3
        speeds.append(PutSpeed(by, chunk_bytes, sms, six_digits(gbs)))
    return Network(speeds, puts.carrier, shared_note(place, gate.num_ranks))


def prepare_network(cells: Iterable[Cell]) -> None:
    """Tells NVSHMEM, before it is joined, of the Buffers that will come: a job is made for the largest of them."""
    far = [cell for cell in cells if cell.num_nodes > 1 and cell.backend != "cpu"]
    if not far:
        return
    # Rows by expert are more than rows by rank, which this counts, and what smaller Buffers took before stays taken.
    heap_bytes = 4 * max(
        memory_table(
            num_ranks=cell.num_ranks, ranks_per_node=cell.ranks_per_node, hidden=cell.hidden,
            num_experts=cell.num_experts, num_topk=cell.num_topk, num_max_tokens_per_rank=cell.num_tokens,
        ).total_bytes
        for cell in far
    )  # fmt: skip
    num_sms = max(cell.num_sms or _USUAL_SMS for cell in far)
    nvshmem_environment.prepare(heap_bytes, 2 * max(num_sms, *_SMS["cuda"]))
