# The native CUDA backend with NVSHMEM linked in: all of _cuda, and what is below (csrc/bind/network.cpp).
# deep_a2a._emulated has the same over the emulator. Load it by deep_a2a.nvshmem_library.
import enum

from deep_a2a._cuda import Direction as Direction
from deep_a2a._cuda import Event as Event
from deep_a2a._cuda import Half as Half
from deep_a2a._cuda import Meter as Meter
from deep_a2a._cuda import Rank as Rank
from deep_a2a._cuda import Stream as Stream
from deep_a2a._cuda import Window as Window
from deep_a2a._cuda import can_access_peer as can_access_peer
from deep_a2a._cuda import cuda_major as cuda_major
from deep_a2a._cuda import device_count as device_count
from deep_a2a._cuda import is_capturing as is_capturing
from deep_a2a._cuda import pci_bus_id as pci_bus_id
from deep_a2a._cuda import plan_combine as plan_combine
from deep_a2a._cuda import plan_dispatch as plan_dispatch

class JobStatus(enum.Enum):
    none = ...
    bootstrapped = ...
    ready = ...

def compiled_version() -> tuple[int, int, int]: ...
def library_version() -> tuple[int, int, int]: ...
def job_status() -> JobStatus: ...
def make_unique_id() -> bytes: ...

# Collective over the job, as far as said, and then without a deadline.
def join_job(*, unique_id: bytes, pe: int, num_pes: int, device: int) -> None:
    """Collective."""

def share_job(device: int) -> None: ...
def leave_job() -> None:
    """Collective, for the last user of the library in its process. ValueError while there are windows."""

def my_pe() -> int: ...
def num_pes() -> int: ...
def transport_choice(device: int) -> dict[str, bool]:
    """direct, proxy, needs_flush: see csrc/nvshmem/job.hpp."""

class SymmetricHeap:
    # Of this process. `pes`: those of a Buffer's ranks.
    alignment: int
    @staticmethod
    def grow(nbytes: int, device: int) -> None:
        """Collective."""
    @staticmethod
    def free_ranges(pes: list[int], most: int) -> list[tuple[int, int, int]]:
        """Block, offset and bytes of each."""
    @staticmethod
    def take(*, block: int, offset: int, nbytes: int, pes: list[int], device: int) -> Window: ...
    @staticmethod
    def reach(window: Window, pe: int, device: int) -> Window | None: ...
    @staticmethod
    def settle(timeout_s: float, device: int) -> bool: ...
    @staticmethod
    def lose(window: Window) -> None: ...
    @staticmethod
    def nbytes() -> int: ...

class PutBy(enum.Enum):
    warp = ...
    thread = ...
    stores = ...

class PutMeter:
    # For benchmarks. `window` is symmetric memory of layout()["nbytes"]; `pes` by rank.
    @staticmethod
    def layout(*, num_ranks: int, ranks_per_node: int, nbytes: int, chunk_bytes: int) -> dict[str, int]:
        """out_offset, in_offset, area_bytes and nbytes: areas for each rail peer, of `nbytes`, from the offsets on."""
    def __init__(
        self, *, ranks_per_node: int, rank: int, device: int, window: Window, pes: list[int], timeout_s: float
    ) -> None: ...
    def hold(self, stream: int) -> None:
        """The stream stops until open(), then until the streams of all ranks have come as far."""
    def open(self) -> None: ...
    def late(self) -> bool:
        """Whether a wait has passed its deadline: then no measurement counts."""
    def put(self, *, stream: int, nbytes: int, chunk_bytes: int, by: PutBy, num_sms: int, num_warps: int) -> None:
        """To every rail peer; the stream goes on when all of theirs have arrived. After a hold()."""
