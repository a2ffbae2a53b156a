"""What dispatch and combine return."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

from deep_a2a.arrays import library_of

if TYPE_CHECKING:
    import torch

    from deep_a2a.leases import Lease


@runtime_checkable
class Event(Protocol):
    """A point on a lane that will be passed."""

    def wait(self) -> None:
        """Nothing that the caller does after this comes before that point.

        CPU: blocks until it is passed. CUDA: makes the caller's current stream wait, not the host. Raises what the
        operation failed with, as far as that is known by then.
        """

    def synchronize(self) -> None:
        """Block the host until it is passed. Raises what the operation failed with."""

    def done(self) -> bool:
        """Whether it has been passed; never blocks, never raises."""


class _ShortRepr:
    """Says only dtype and shape of a tensor: rows may be many, not there yet, or another's by now."""

    def __repr__(self) -> str:
        shown = [f"{each.name}={_short(getattr(self, each.name))}" for each in fields(self) if each.repr]  # type: ignore[arg-type]
        return f"{type(self).__name__}({', '.join(shown)})"


def _short(value: object) -> str:
    library = library_of(value)
    if library is None:
        return repr(value)
    array = library.describe(value)
    return f"{array.dtype} {list(array.shape)}"


@dataclass(frozen=True, repr=False)
class DispatchHandle(_ShortRepr):
    """All that the ranks know about one dispatch. Needed by ``combine`` and by cached dispatches, as often as wanted.

    Lives as long as it is referenced, independent of the result's lease; any number may be alive at once.

    Attributes:
        num_tokens: tokens that this rank sent.
        num_rows: rows of ``x`` that this rank received, padding between groups counted; layout "padded":
            num_local_experts * expert_capacity. None where only the GPU knows (``host_sync=False``).
        num_rank_rows: (token, this rank) pairs received; equals `num_rows` in layout "rank". None as `num_rows`.
        fixed_shapes: made with ``host_sync=False``.
        lane: of the dispatch.
        owner, call: the Buffer's side and the native side, of no use to callers.
    """

    num_tokens: int
    num_rows: int | None
    num_rank_rows: int | None
    fixed_shapes: bool
    lane: int
    owner: object = field(repr=False)
    call: Any = field(repr=False)


@dataclass(repr=False)
class DispatchResult(_ShortRepr):
    """The rows that this rank received, a lease on a slot of the window unless asked for as ``output="owned"``.

    ``rows`` counts rows of `x`, ``rank_rows`` counts (token, this rank) pairs, in the order of the source rank and then
    of the token at its source. Both are the same in layout "rank".

    Lifetime: `x` and `scales` of a leased result are views of the window, valid until `release()`, or until the result
    is dropped. All other fields, both of an owned result, and `scales` with ``scale_layout="column_major"`` are the
    caller's to keep and to change. With ``async_op=True`` nothing but shapes may be read before ``event.wait()``.

    What holds something: layout "rank": all rows. "expert": the first ``rows_per_expert[e]`` rows from
    ``expert_offsets[e]`` on. "padded": the first ``rows_per_expert[e]`` rows of ``x[e]``. Rows in between are undefined
    in `x` and `scales`, or zero with ``zero_padding=True``.

    With ``host_sync=False`` the dimensions ``rows`` and ``rank_rows`` are capacities, and `num_rows_tensor` has the
    numbers: of layouts "rank" and "expert" only the first `rows` rows of `x` and `scales` are as above, the rest is
    undefined. Behind the first `rank_rows` rows, `topk_idx` and `expert_rows` are -1 and `topk_weights` 0.

    Attributes:
        x: payload dtype (bfloat16, float8_e4m3fn or float8_e5m2). Layouts "rank" and "expert": [rows, hidden];
            "padded": [num_local_experts, expert_capacity, hidden].
        scales: of FP8 payloads, None for BF16. Shaped like `x`, with a last dimension of ceil(hidden / 128); float32,
            or uint8 for UE8M0 (exponent + 127). Leased, its rows lie at multiples of 128 bytes, so it need not be
            contiguous. With ``scale_layout="column_major"`` strides are (1, R), in layout "padded" (columns * R, 1, R),
            where R is the number of rows (the capacity) in whole 16 bytes, that is, rounded up to a multiple of 4: as
            TMA descriptors need it. UE8M0 is int32 there, with a last dimension of ceil(hidden / 512): four exponents
            each, the first in the lowest byte, 0 where there are no more.
        topk_idx: int32 [rank_rows, num_topk], for each top-k slot of the token the LOCAL expert, 0 to
            num_local_experts - 1; -1 where the slot's expert is on another rank, or none.
        topk_weights: float32 [rank_rows, num_topk], the slot's weight; 0 where `topk_idx` is -1.
        expert_rows: int32 [rank_rows, num_topk], the slot's row of `x` (in layout "padded", of `x` flattened to
            [num_local_experts * expert_capacity, hidden]); -1 for none. None in layout "rank".
        rows_per_expert: int32 [num_local_experts], tokens received for each local expert, padding not counted. A token
            that names an expert twice counts twice.
        expert_offsets: int32 [num_local_experts + 1], where each expert's rows start in `x` (flattened in layout
            "padded"); the last is the number of rows. None in layout "rank".
        rows_per_rank: int32 [num_ranks], rank rows by source rank.
        expert_load: int32 [num_experts], tokens that all ranks together sent to each expert.
        num_rows_tensor: int32 [2]: rows, rank_rows. Rows of layout "padded" are num_local_experts * expert_capacity.
        num_rows: rows of `x`; None with ``host_sync=False``.
        num_rank_rows: rank rows; None with ``host_sync=False``.
        handle: for ``combine`` and for cached dispatches.
        event: passed when the result may be read; None if it may be read already.
        lease: None for an owned result.
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
    handle: DispatchHandle
    event: Event | None
    lease: Lease | None = field(repr=False)

    def release(self) -> None:
        """Give the slot back; nothing that comes later may touch the rows. Repeated calls do nothing.

        CPU: once the lane has come to this point. CUDA: in the order of the caller's current stream, without waiting on
        the host. A result that is dropped instead is given back in the order of the stream that was current at
        ``dispatch``: readers on other streams have to be waited for before.
        """
        if self.lease is not None:
            self.lease.release()

    @property
    def row_weights(self) -> torch.Tensor | None:
        """float32, the top-k weight of each row of `x`: [rows] or [num_local_experts, expert_capacity], 0 in padding.

        None in layout "rank". A new tensor each time.
        """
        if self.expert_rows is None:
            return None
        library = library_of(self.expert_rows)
        assert library is not None
        shape = tuple(self.x.shape[:-1])
        weights: torch.Tensor = library.spread(self.topk_weights, self.expert_rows, math.prod(shape)).reshape(shape)
        return weights


@dataclass(frozen=True, repr=False)
class CombineResult(_ShortRepr):
    """The combined tokens of this rank in ordinary tensors; with ``async_op=True``, read after ``event.wait()``.

    Attributes:
        x: bfloat16 [tokens, hidden].
        side: float32 [tokens, num_topk], the side payload if one was given, 0 where `topk_idx` was -1; else None.
        event: passed when the result may be read; None if it may be read already.
    """

    x: torch.Tensor
    side: torch.Tensor | None
    event: Event | None
