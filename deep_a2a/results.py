"""What dispatch and combine return."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol

import torch

if TYPE_CHECKING:
    from deep_a2a._cpu import DispatchCall


class Event(Protocol):
    """A point on a lane that will be passed."""

    def wait(self) -> None:
        """Block until it is passed. Raises what the operation failed with."""

    def done(self) -> bool:
        """Whether it has been passed; never blocks, never raises."""


@dataclass(frozen=True)
class DispatchHandle:
    """All that the ranks know about one dispatch. Needed by ``combine`` and by cached dispatches, as often as wanted.

    Lives as long as it is referenced, independent of the result's lease; any number may be alive at once.
    """

    num_tokens: int
    """Tokens that this rank sent."""
    num_rows: int
    """Rows of ``x`` that this rank received; layout "padded": num_local_experts * expert_capacity."""
    num_rank_rows: int
    """(token, this rank) pairs received; equals `num_rows` in layout "rank"."""
    fixed_shapes: bool
    """Made with ``host_sync=False``."""
    lane: int
    """The lane of the dispatch."""
    owner: object = field(repr=False)
    """The Buffer it belongs to."""
    call: DispatchCall = field(repr=False)
    """The native side."""


@dataclass
class DispatchResult:
    """The rows that this rank received, a lease on a slot of the window unless asked for as ``output="owned"``.

    ``rows`` counts rows of `x`, ``rank_rows`` counts (token, this rank) pairs, in the order of the source rank and then
    of the token at its source. Both are the same in layout "rank". With ``host_sync=False`` row dimensions are
    capacities and only the first ``num_rows_tensor`` rows hold anything.

    `x` and `scales` of a leased result are views of the window: valid until `release()`, or until the result is
    dropped. Everything else is the caller's to keep. With ``async_op=True`` nothing but shapes may be read before
    ``event.wait()``.
    """

    x: torch.Tensor
    """Payload dtype. Layouts "rank" and "expert": [rows, hidden]; "padded": [local experts, capacity, hidden]."""
    scales: torch.Tensor | None
    """FP8: like `x`, last dimension ceil(hidden / 128); float32, or uint8 for UE8M0. Row pitch: whole 16 bytes."""
    topk_idx: torch.Tensor
    """int32 [rank_rows, num_topk]: local expert of each top-k slot of the token, -1 where it is not on this rank."""
    topk_weights: torch.Tensor
    """float32 [rank_rows, num_topk]: its weight, 0 where `topk_idx` is -1."""
    expert_rows: torch.Tensor | None
    """int32 [rank_rows, num_topk]: row of `x` (flattened) for the slot, or -1. None in layout "rank"."""
    rows_per_expert: torch.Tensor
    """int32 [num_local_experts]: tokens received for each local expert, padding not counted."""
    expert_offsets: torch.Tensor | None
    """int32 [num_local_experts + 1]: where each expert's rows start in (flattened) `x`. None in layout "rank"."""
    rows_per_rank: torch.Tensor
    """int32 [num_ranks]: rank rows by source rank."""
    expert_load: torch.Tensor
    """int32 [num_experts]: tokens that all ranks together sent to each expert."""
    num_rows_tensor: torch.Tensor
    """int32 [2]: rows and rank rows."""
    num_rows: int | None
    """Rows of `x`; None with ``host_sync=False``."""
    num_rank_rows: int | None
    """Rank rows; None with ``host_sync=False``."""
    handle: DispatchHandle
    """For ``combine`` and for cached dispatches."""
    event: Event | None
    """Passed when the result may be read; None if it may be read already."""
    lease: Lease | None = field(repr=False)
    """None for an owned result."""

    def release(self) -> None:
        """Give the slot back once the lane has come to this point. Repeated calls do nothing."""
        if self.lease is not None:
            self.lease.release()

    @property
    def row_weights(self) -> torch.Tensor | None:
        """float32, the top-k weight of each row of `x`: [rows] or [num_local_experts, expert_capacity], 0 in padding.

        None in layout "rank". A new tensor each time.
        """
        if self.expert_rows is None:
            return None
        shape = self.x.shape[:-1]
        spare = shape.numel()  # where slots of other ranks go
        flat = torch.zeros(spare + 1, dtype=torch.float32)
        rows = self.expert_rows.flatten().long()
        flat[torch.where(rows < 0, spare, rows)] = self.topk_weights.flatten()
        return flat[:spare].view(shape)


@dataclass(frozen=True)
class CombineResult:
    """The combined tokens of this rank in ordinary tensors; with ``async_op=True``, read after ``event.wait()``."""

    x: torch.Tensor
    """bfloat16 [tokens, hidden]."""
    side: torch.Tensor | None
    """float32 [tokens, num_topk], the side payload if one was given."""
    event: Event | None
    """Passed when the result may be read; None if it may be read already."""


class Lease:
    """The right to one slot, given back once."""

    def __init__(self, slots: Slots, slot: int) -> None:
        self.slot = slot
        self._slots: Slots | None = slots
        self._call: DispatchCall | None = None

    def bind(self, call: DispatchCall) -> None:
        """The dispatch that writes into the slot: it has to be over before the slot is free."""
        self._call = call

    def release(self) -> None:
        slots, self._slots = self._slots, None
        if slots is not None:
            slots.give_back(self.slot, self._call)


class Slots(Protocol):
    """Where leases come from."""

    def give_back(self, slot: int, call: DispatchCall | None) -> None: ...
