# The native CPU backend (csrc/bind/cpu.cpp). Pointers are integers; Python has checked what they point to.
import enum

SCALE_ALIGNMENT: int  # bytes: from one row of received scales to the next
STAGED_ROUNDS: int  # that have room between nodes; with more rounds the receive half of a dispatch reads its input too

class Layout(enum.Enum):
    rank = ...
    expert = ...
    padded = ...

class Cast(enum.Enum):
    none = ...
    fp8_e4m3 = ...
    fp8_e5m2 = ...

class ScaleFormat(enum.Enum):
    float32 = ...
    ue8m0 = ...

class Shape:
    slot_rows: int
    slot_rank_rows: int
    num_rounds: int
    tokens_per_round: int
    num_local_experts: int
    window_bytes: int
    def __init__(
        self,
        *,
        num_ranks: int,
        ranks_per_node: int,
        layout: Layout,
        hidden: int,
        num_experts: int,
        num_topk: int,
        max_tokens: int,
        expert_alignment: int,
        expert_capacity: int,
        max_recv_rows: int,
        num_slots: int,
        num_lanes: int,
        staging_bytes: int = 0,  # of net_in and net_out of a lane; 0 for no limit
    ) -> None: ...

def regions(shape: Shape) -> list[tuple[str, int, int, int, int, str]]: ...

class Window:
    fd: int
    address: int
    @staticmethod
    def create(nbytes: int) -> Window: ...
    @staticmethod
    def map(fd: int, nbytes: int) -> Window: ...
    def close_fd(self) -> None: ...
    def __buffer__(self, flags: int, /) -> memoryview: ...

class IntColumn:
    def __buffer__(self, flags: int, /) -> memoryview: ...

class FloatColumn:
    def __buffer__(self, flags: int, /) -> memoryview: ...

class Handle:
    num_tokens: int

class Received:
    num_rows: int
    num_rank_rows: int
    num_received: IntColumn
    topk_idx: IntColumn
    expert_rows: IntColumn
    topk_weights: FloatColumn
    rows_per_rank: IntColumn
    rows_per_expert: IntColumn
    expert_offsets: IntColumn
    expert_load: IntColumn

class Event:
    def wait(self) -> None: ...
    def done(self) -> bool: ...

class DispatchCall:
    handle: Handle
    result: Received
    counts: Event
    sent: Event
    received: Event | None

class CombineCall:
    sent: Event
    received: Event | None

class Rank:
    shm_bytes: int
    network_bytes: int
    def __init__(
        self, *, shape: Shape, rank: int, windows: list[Window], timeout_s: float, network_seed: int | None
    ) -> None: ...
    def dispatch(
        self,
        *,
        lane: int,
        slot: int,
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
        fixed_shapes: bool,
        cached: Handle | None,
    ) -> DispatchCall: ...
    def combine(
        self,
        *,
        lane: int,
        rows: int,
        side: int,
        weighted: bool,
        with_side: bool,
        out: int,
        side_out: int,
        handle: Handle,
    ) -> CombineCall: ...
    def receive_dispatch(
        self,
        call: DispatchCall,
        *,
        owned_rows: int,
        owned_scales: int,
        column_scales: int,
        column_words: int,  # of 4 bytes, from one column to the next
    ) -> None: ...
    def receive_combine(self, call: CombineCall) -> None: ...
    def release(self, call: DispatchCall) -> None: ...
    def check(self) -> None: ...
    def close(self) -> None: ...

def cast_rows(
    *,
    rows: int,
    num_rows: int,
    hidden: int,
    cast: Cast,
    scale_format: ScaleFormat,
    payload: int,
    scales: int,
    scales_pitch: int,
) -> None: ...
