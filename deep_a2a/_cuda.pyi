# The native CUDA backend (csrc/bind/cuda.cpp); deep_a2a._emulated is the same over the emulator. Pointers and streams
# are integers; Python has checked what they point to. Import deep_a2a._cpu first: Shape and the enums are its types.
import enum

from deep_a2a._cpu import Cast, ScaleFormat, Shape

class Half(enum.Enum):
    send = ...
    receive = ...
    both = ...

cuda_major: int  # that the module was built with; not in _emulated

def device_count() -> int: ...
def can_access_peer(device: int, peer: int) -> bool: ...
def pci_bus_id(device: int) -> str: ...

class Window:
    # Device memory of this process, or of a peer's process. Freed or closed when the last reference goes.
    address: int
    nbytes: int
    handle: bytes  # 64 bytes, for open() in other processes
    @staticmethod
    def create(nbytes: int, device: int) -> Window: ...
    @staticmethod
    def open(handle: bytes, nbytes: int, device: int) -> Window: ...

class Stream:
    # Non-blocking, of high priority.
    handle: int
    def __init__(self, device: int) -> None: ...
    def synchronize(self) -> None: ...

def is_capturing(stream: int) -> bool: ...

class Event:
    def __init__(self, device: int) -> None: ...
    def record(self, stream: int) -> None: ...
    def block(self, stream: int) -> None:
        """The stream waits for what was recorded."""
    def synchronize(self) -> None: ...
    def done(self) -> bool: ...

# The launch plans (csrc/cuda/tuning.hpp), field by field.
def plan_dispatch(
    shape: Shape, *, payload_bytes: int, scale_bytes: int, cast: Cast, shared_bytes: int
) -> dict[str, int]: ...
def plan_combine(shape: Shape, *, num_sms: int, shared_bytes: int) -> dict[str, int]: ...

class Rank:
    num_sms: int  # of the device
    wire_bytes: tuple[int, int]  # moved so far, between GPUs of a node and over the network
    def __init__(
        self,
        *,
        shape: Shape,
        rank: int,
        device: int,
        windows: list[Window],
        rail_pes: list[int] = ...,
        rail_windows: list[Window | None] = ...,
        timeout_s: float,
        delay_seed: int | None = None,
    ) -> None: ...
    # Sizes of the blocks of device memory that the caller allocates, 16-byte aligned.
    def source_bytes(self, num_tokens: int) -> int: ...
    def relay_bytes(self) -> int: ...
    def counts_words(self) -> int: ...
    def routing_words(self, capacity: int) -> int: ...
    def dispatch(
        self,
        *,
        stream: int,
        lane: int,
        slot: int,
        half: Half,
        num_sms: int,
        x: int,
        x_pitch: int,
        num_tokens: int,
        payload_bytes: int,
        scales: int,
        scales_pitch: int,
        scale_bytes: int,
        format_code: int,
        topk_idx: int,
        topk_idx_bytes: int,
        topk_weights: int,
        cast: Cast,
        scale_format: ScaleFormat,
        zero_padding: bool,
        cached: bool,
        source: int,
        relay: int,
        kept_counts: int,
        kept_routing: int,
        kept_capacity: int,
        result_counts: int,
        result_routing: int,
        result_capacity: int,
        column_scales: int,
        column_words: int,  # of 4 bytes, from one column to the next
    ) -> int:
        """Returns the ticket for wait_counts()."""
    def copy_out(
        self, *, stream: int, slot: int, num_rows: int, payload_bytes: int, scale_bytes: int, rows: int, scales: int
    ) -> None: ...
    def combine(
        self,
        *,
        stream: int,
        lane: int,
        half: Half,
        num_sms: int,
        rows: int,
        num_rows: int,
        side: int,
        weighted: bool,
        with_side: bool,
        out: int,
        side_out: int,
        num_tokens: int,
        source: int,
        relay: int,
        kept_counts: int,
        kept_routing: int,
        kept_capacity: int,
    ) -> None: ...
    def release(self, stream: int, slot: int) -> None: ...
    def wait_counts(self, lane: int, ticket: int, stream: int) -> tuple[int, int]:
        """Blocks the host: rows and rank rows. Raises a refusal or a fault."""
    def check(self) -> None:
        """Raises a refusal, once, or a fault, for ever."""
    def check_faults(self) -> None: ...

class Direction(enum.Enum):
    push = ...
    pull = ...

class Meter:
    # For benchmarks; `windows` by rank, all of one size.
    def __init__(self, *, rank: int, device: int, windows: list[Window], timeout_s: float) -> None: ...
    def hold(self, stream: int) -> None:
        """The stream stops until open(), then until the streams of all ranks have come as far."""
    def open(self) -> None: ...
    def late(self) -> bool:
        """Whether a wait has passed its deadline: then no measurement counts."""
    def copy_all_to_all(self, *, stream: int, direction: Direction, nbytes: int, num_sms: int) -> None:
        """Bulk copies of `nbytes` to or from every other rank; a window needs 4096 + 2 * ranks * nbytes bytes."""
