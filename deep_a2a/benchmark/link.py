"""What the links between GPUs carry: plain bulk copies from every rank to every other at once, on a few SMs or many."""

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


def make_meter(group: dist.ProcessGroup, place: Place, bytes_per_peer: int, timeout_s: float) -> Meter:
    """A meter on each rank, with room to copy `bytes_per_peer` to and from every other. Collective."""
    native, rank, num_ranks = place.native(), dist.get_rank(group), dist.get_world_size(group)
    nbytes = meter_bytes(num_ranks, bytes_per_peer)
    windows: list[Any] = []
    agree(group, attempt(lambda: windows.append(native.Window.create(nbytes, place.device_idx))))
    own = windows[0]
    handles = [b""] * num_ranks
    dist.all_gather_object(handles, own.handle, group=group)

    def open_all() -> None:
        windows[:] = [
            own if peer == rank else native.Window.open(handle, nbytes, place.device_idx)
            for peer, handle in enumerate(handles)
        ]

    agree(group, attempt(open_all))
    meter: Meter = native.Meter(rank=rank, device=place.device_idx, windows=windows, timeout_s=timeout_s)
    return meter


def measure_link(gate: StreamGate, place: Place, bytes_per_peer: int, num_sms: Sequence[int]) -> Link | None:
    """The speed in both directions on each number of SMs; None for a rank that is alone. Collective."""
    num_ranks = gate.num_ranks
    if num_ranks == 1:
        return None
    native, nbytes = place.native(), whole_pieces(bytes_per_peer)
    speeds = []
    for direction, sms in itertools.product(get_args(Direction), num_sms):
        copy = partial(
            gate.meter.copy_all_to_all, direction=getattr(native.Direction, direction), nbytes=nbytes, num_sms=sms
        )
        gate.measure(partial(_on, copy), "released")  # loaded while nothing is held: loading may wait for all kernels
        times = [gate.measure(partial(_on, copy)) for _ in range(_NUM_WARMUP + _NUM_ITERS)]
        microseconds = statistics.median(times[_NUM_WARMUP:])
        speeds.append(LinkSpeed(direction, sms, round(nbytes * (num_ranks - 1) / microseconds / 1e3, 3)))
    shared = place.num_gpus is not None and place.num_gpus < num_ranks
    note = f"; {num_ranks} ranks share {place.num_gpus} GPU(s), so this is their memory too" if shared else ""
    return Link(speeds, note)


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
    """What a record says of the link: its ceiling, and the total over the time that the busiest class takes at it."""
    if ceiling_gbs is None:
        return {"ceiling_gbs": None, "ceiling_of": None, "link_time_ratio": None}
    link_us = wire.slowest / ceiling_gbs / 1e3
    ratio = round(total_us / link_us, 3) if link_us > 0 else None
    return {"ceiling_gbs": round(ceiling_gbs, 3), "ceiling_of": ceiling_of, "link_time_ratio": ratio}
