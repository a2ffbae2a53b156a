"""What the links within a node carry: bulk copies from every rank to the others of its node, on a few SMs or more.

All nodes do it at once. A node is all ranks, unless something else is said.
"""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, Literal, get_args

import torch.distributed as dist

from deep_a2a.benchmark.agreement import agree, attempt
from deep_a2a.benchmark.place import Place
from deep_a2a.benchmark.record import WireBytes
from deep_a2a.benchmark.stream_gate import StreamGate
from deep_a2a.benchmark.wire_bytes import link_time_ratio

if TYPE_CHECKING:
    from deep_a2a._cuda import Meter

Direction = Literal["push", "pull"]

_PIECE_BYTES = 7168  # the meter rounds what it copies to its pieces
_FLAG_BYTES = 4096
_NUM_ITERS, _NUM_WARMUP = 20, 2


@dataclass(frozen=True)
class LinkSpeed:
    """`gbs`: 1e9 bytes a second that each rank sends (push) or gets (pull) while all do."""

    direction: Direction
    num_sms: int
    gbs: float


@dataclass(frozen=True)
class Link:
    """All speeds that were measured. The fastest is the ceiling."""

    speeds: Sequence[LinkSpeed]
    note: str = ""

    @property
    def ceiling(self) -> LinkSpeed:
        return max(self.speeds, key=lambda speed: speed.gbs)

    def describe(self) -> str:
        """What the ceiling was measured with, as a record says it."""
        return f"bulk {self.ceiling.direction}, {self.ceiling.num_sms} SMs{self.note}"

    def to_json(self) -> list[dict[str, Any]]:
        return [asdict(speed) for speed in self.speeds]


def make_meter(
    group: dist.ProcessGroup, place: Place, bytes_per_peer: int, timeout_s: float, ranks_per_node: int | None = None
) -> Meter:
    """A meter on each rank, with room to copy `bytes_per_peer` to and from every other of its node. Collective."""
    native, rank, num_ranks = place.native(), dist.get_rank(group), dist.get_world_size(group)
    size = num_ranks if ranks_per_node is None else ranks_per_node
    local_rank, nbytes = rank % size, meter_bytes(size, bytes_per_peer)
    windows: list[Any] = []
    agree(group, attempt(lambda: windows.append(native.Window.create(nbytes, place.device_idx))))
    own = windows[0]
    handles = [b""] * num_ranks
    dist.all_gather_object(handles, own.handle, group=group)

    def open_all() -> None:
        windows[:] = [
            own if peer == local_rank else native.Window.open(handle, nbytes, place.device_idx)
            for peer, handle in enumerate(handles[rank - local_rank : rank - local_rank + size])
        ]

    agree(group, attempt(open_all))
    meter: Meter = native.Meter(rank=local_rank, device=place.device_idx, windows=windows, timeout_s=timeout_s)
    return meter


def measure_link(
    gate: StreamGate, meter: Meter, num_peers: int, place: Place, bytes_per_peer: int, num_sms: Sequence[int]
) -> Link | None:
    """The speed in both directions on each number of SMs; None for ranks without peers on their node. Collective."""
    if num_peers == 0:
        return None
    native, nbytes = place.native(), whole_pieces(bytes_per_peer)
    speeds = []
    for direction, sms in itertools.product(get_args(Direction), num_sms):
        copy = partial(
            meter.copy_all_to_all, direction=getattr(native.Direction, direction), nbytes=nbytes, num_sms=sms
        )
        gate.measure(partial(_on, copy), "released")  # loaded while nothing is held: loading may wait for all kernels
        times = [gate.measure(partial(_on, copy)) for _ in range(_NUM_WARMUP + _NUM_ITERS)]
        microseconds = statistics.median(times[_NUM_WARMUP:])
        speeds.append(LinkSpeed(direction, sms, six_digits(nbytes * num_peers / microseconds / 1e3)))
    return Link(speeds, shared_note(place, gate.num_ranks))


def shared_note(place: Place, num_ranks: int) -> str:
    """What there is to say of a speed where ranks share GPUs."""
    shared = place.num_gpus is not None and place.num_gpus < num_ranks
    return f"; {num_ranks} ranks share {place.num_gpus} GPU(s), so this is their memory too" if shared else ""


def six_digits(value: float) -> float:
    """What is worth keeping of a speed, whether of a GPU or of the emulator."""
    return float(f"{value:.6g}")


def _on(copy: Callable[..., None], stream: int) -> None:
    copy(stream=stream)


def meter_bytes(num_ranks: int, bytes_per_peer: int) -> int:
    """What a window of a meter needs."""
    return _FLAG_BYTES + 2 * num_ranks * whole_pieces(bytes_per_peer)


def whole_pieces(nbytes: int) -> int:
    """At least `nbytes`, in pieces as the meter copies them."""
    return max(-(-nbytes // _PIECE_BYTES), 1) * _PIECE_BYTES


def ceiling_fields(
    total_us: float, wire: WireBytes, ceiling_gbs: float | None, ceiling_of: str | None
) -> dict[str, float | str | None]:
    """What a record of one node, or of the cpu backend, says of the link: its ceiling, and the total over its time."""
    return {
        "ceiling_gbs": None if ceiling_gbs is None else round(ceiling_gbs, 3),
        "ceiling_of": None if ceiling_gbs is None else ceiling_of,
        "link_time_ratio": link_time_ratio(total_us, wire, ceiling_gbs, None),
    }
