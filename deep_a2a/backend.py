"""What a backend does for the operations of a Buffer, and what it is asked to do. Arguments are checked by then."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from typing import TYPE_CHECKING, Any, Protocol

from deep_a2a._cpu import Shape
from deep_a2a.arrays import Array, Device, Library
from deep_a2a.formats import ScaleLayout
from deep_a2a.leases import SlotUse
from deep_a2a.payload import Payload
from deep_a2a.results import DispatchHandle, Event
from deep_a2a.settings import Settings

if TYPE_CHECKING:
    import torch


class Halves(Enum):
    """How an operation is launched."""

    together = "the caller wants the result at once"
    apart = "other work comes between the halves"


@dataclass(slots=True, eq=False)
class DispatchRequest:
    payload: Payload
    topk_idx: Array | None
    topk_weights: Array | None
    handle: DispatchHandle | None  # of the dispatch to repeat
    lane: int
    fixed_shapes: bool
    owned: bool
    zero_padding: bool
    scale_layout: ScaleLayout
    halves: Halves
    previous: Event | None

    @property
    def row_scale_dtype(self) -> str | None:
        """Of the result's scales if they stay in rows; None for others, and without scales."""
        return self.payload.scale_dtype if self.scale_layout is ScaleLayout.row_major else None


@dataclass(slots=True, eq=False)
class CombineRequest:
    rows: Array
    side: Array | None
    handle: DispatchHandle
    lane: int
    weighted: bool
    halves: Halves
    previous: Event | None


@dataclass(slots=True, eq=False)
class Received:
    """What a dispatch brought, or will have brought at `event`; fields as in ``DispatchResult``.

    `num_rows` and `num_rank_rows` are None where the host does not know them. `x` is [rows, columns], and so are scales
    of layout row_major; others are as in ``DispatchResult`` already.
    """

    x: torch.Tensor
    scales: torch.Tensor | None
    topk_idx: torch.Tensor
    topk_weights: torch.Tensor
    expert_rows: torch.Tensor | None
    rows_per_expert: torch.Tensor
    expert_offsets: torch.Tensor | None
    rows_per_rank: torch.Tensor
    expert_load: torch.Tensor
    num_rows_tensor: torch.Tensor
    num_rows: int | None
    num_rank_rows: int | None
    event: LaneEvent


class LaneEvent(Event, Protocol):
    """The event of an operation."""

    captured: bool  # it is a point in a CUDA graph, which is passed in every replay, and may never be asked


class DispatchCall(Protocol):
    """A dispatch whose send half is launched."""

    @property
    def sent(self) -> LaneEvent: ...

    @property
    def handle(self) -> Any:
        """What a later combine or dispatch needs of it."""

    @property
    def slot_use(self) -> SlotUse: ...

    def wait_counts(self) -> None:
        """Until the host knows what it has to. Raises what the dispatch was refused with."""

    def receive(self) -> Received:
        """Launches the receive half."""

    def abandon(self) -> LaneEvent | None:
        """After a failure: launches what the peers still count on, until the event."""


class CombineCall(Protocol):
    """A combine whose send half is launched."""

    @property
    def sent(self) -> LaneEvent: ...

    x: Any
    side: Any

    def receive(self) -> LaneEvent:
        """Launches the receive half; the event is passed when `x` and `side` may be read."""


class Backend(Protocol):
    """One rank of a Buffer: its window and its native engine."""

    shape: Shape
    settings: Settings
    device: Device

    @property
    def wire_bytes(self) -> dict[str, int]:
        """See ``Buffer.wire_bytes``."""

    def dispatch(self, request: DispatchRequest, slot: int) -> DispatchCall:
        """Launches the send half. What the call refers to lives as long as the call does."""

    def combine(self, request: CombineRequest) -> CombineCall:
        """Launches the send half."""

    def view(
        self, library: Library, region: str, instance: int, rows: int, columns: int, dtype: str, align: int = 1
    ) -> Any:
        """[rows, columns] of `dtype` in the own window, rows in multiples of `align` bytes. Keeps the window."""

    def may_poll(self) -> bool:
        """Whether events may be asked if they have been passed."""

    def check(self) -> None:
        """Raises what made the buffer useless, or what a dispatch was refused with."""

    def close(self, in_flight: object) -> None:
        """Ends what is under way, by the deadline; what that uses is dropped then. The own window stays while there are
        views of it."""
