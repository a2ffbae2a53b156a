"""The Buffer: dispatch and combine for one shape of MoE layer, over one process group."""

from __future__ import annotations

from typing import Any, Literal

import torch

from deep_a2a.bootstrap import exchange_windows, meet, ranks_per_host
from deep_a2a.cpu_backend import CpuBackend
from deep_a2a.group import as_group
from deep_a2a.memory import MemoryTable, check_affordable, table_of
from deep_a2a.operations import Operations
from deep_a2a.payload import DispatchInput, check_combine, check_payload, check_routing, describe
from deep_a2a.pending import PendingCombine, PendingDispatch
from deep_a2a.results import CombineResult, DispatchHandle, DispatchResult
from deep_a2a.settings import LayoutName, Settings


class Buffer:
    """Sends tokens to the ranks that hold their experts, and brings the experts' outputs back.

    Every rank of `group` constructs it with the same settings. Operations come in the same order on every rank: those
    of a lane among themselves, and dispatches and releases of results (they take and free slots) on all lanes together.
    A bad argument raises on the rank that gave it; the others wait for that rank until their deadline. A `Pending` half
    blocks its lane until it is received.

    Expert `e` lives on rank ``e // num_local_experts``; rank `r` is on node ``r // ranks_per_node``.

    Attributes: rank, num_ranks, node, num_nodes, local_rank, ranks_per_node, num_local_experts (int), max_recv_rows
    (int: rows of ``x`` that a slot holds), memory (`MemoryTable`), settings, and the arguments hidden, num_experts,
    num_topk, num_max_tokens_per_rank, layout.

    Args:
        group: a ``torch.distributed`` process group, None for the default one, or a `deep_a2a.group.Group`.
        hidden: channels of a token, a multiple of 8 (16 to send FP8).
        num_experts: of all ranks together; a multiple of the number of ranks.
        num_topk: experts per token, 1 to 32.
        num_max_tokens_per_rank: the most tokens that one rank dispatches at a time.
        ranks_per_node: None for the ranks of each host. Otherwise it splits them into pretend nodes, and all traffic
            between these takes the path between nodes.
        backend: "cpu" (ranks are processes of one host), or "auto", which today is the same.
        layout: of received rows: "rank" (a row per token and rank), "expert" (a row per token and local expert,
            grouped by expert), "padded" (the same in a fixed [experts, capacity] shape).
        expert_alignment: layout "expert": every expert's group starts at a multiple of it.
        expert_capacity: layout "padded": rows per local expert; None for num_ranks * num_max_tokens_per_rank.
        max_recv_rows: layouts "rank" and "expert": rows of a slot; None for the worst case. A dispatch that would bring
            more to any rank raises CapacityError on all of them.
        num_slots: results that may be leased at a time.
        num_lanes: sequences of operations that run beside each other.
        timeout_s: seconds that a rank waits for another before it gives up.
        num_sms: SMs that a kernel may take; of no meaning on the CPU.
        network_seed: tests: deliver what goes between nodes late, in pieces and out of order, as drawn from the seed.

    Raises:
        TypeError, ValueError: a setting is bad (on that rank; the others raise CommError).
        MismatchError: settings differ between ranks.
        MemoryError: the windows do not fit the host; the message holds the memory table.
        CommTimeoutError: a rank did not come.
    """

    def __init__(
        self,
        group: Any = None,
        *,
        hidden: int,
        num_experts: int,
        num_topk: int,
        num_max_tokens_per_rank: int,
        ranks_per_node: int | None = None,
        backend: Literal["auto", "cpu"] = "auto",
        layout: LayoutName = "rank",
        expert_alignment: int = 1,
        expert_capacity: int | None = None,
        max_recv_rows: int | None = None,
        num_slots: int = 2,
        num_lanes: int = 2,
        timeout_s: float = 300.0,
        num_sms: int | None = None,
        network_seed: int | None = None,
    ) -> None:
        self.group = as_group(group)
        self.rank = self.group.rank
        self.num_ranks = self.group.size
        given: dict[str, Any] = {
            "hidden": hidden,
            "num_experts": num_experts,
            "num_topk": num_topk,
            "num_max_tokens_per_rank": num_max_tokens_per_rank,
            "layout": layout,
            "expert_alignment": expert_alignment,
            "expert_capacity": expert_capacity,
            "max_recv_rows": max_recv_rows,
            "num_slots": num_slots,
            "num_lanes": num_lanes,
        }
        error = None
        try:
            _check_options(backend, timeout_s, num_sms, network_seed)
            nodes = self.num_ranks if ranks_per_node is None else ranks_per_node
            Settings(num_ranks=self.num_ranks, ranks_per_node=nodes, **given).shape()
        except (TypeError, ValueError) as bad:
            error, timeout_s = bad, 300.0
        compared = {**given, "ranks_per_node": ranks_per_node, "backend": backend, "num_sms": num_sms}
        listener, members = meet(self.group, compared, error, timeout_s)
        with listener:
            if ranks_per_node is None:
                ranks_per_node = ranks_per_host([member.host for member in members])
            settings = Settings(num_ranks=self.num_ranks, ranks_per_node=ranks_per_node, **given)
            self.memory: MemoryTable = table_of(settings.shape())
            check_affordable(self.memory, self.num_ranks)
            windows = exchange_windows(self.group, listener, members, self.memory.total_bytes, timeout_s)

        self.settings = settings
        self.ranks_per_node = ranks_per_node
        self.num_nodes = self.num_ranks // ranks_per_node
        self.node, self.local_rank = divmod(self.rank, ranks_per_node)
        self.hidden, self.num_experts, self.num_topk = hidden, num_experts, num_topk
        self.num_local_experts = num_experts // self.num_ranks
        self.num_max_tokens_per_rank = num_max_tokens_per_rank
        self.layout = layout
        self.max_recv_rows: int = settings.shape().slot_rows
        backend_here = CpuBackend(settings, self.rank, windows, timeout_s, network_seed)
        self._operations: Operations | None = Operations(settings, backend_here)

    # Operations.

    def dispatch(
        self,
        x: DispatchInput,
        topk_idx: torch.Tensor | None = None,
        topk_weights: torch.Tensor | None = None,
        *,
        handle: DispatchHandle | None = None,
        quantize: str | None = None,
        scale_format: str = "float32",
        host_sync: bool = True,
        output: Literal["leased", "owned"] = "leased",
        zero_padding: bool = False,
        lane: int = 0,
        async_op: bool = False,
    ) -> DispatchResult:
        """Send every token to the ranks that hold its experts.

        Args:
            x: bfloat16 [tokens, hidden], or a pair (fp8, scales): float8_e4m3fn or float8_e5m2 [tokens, hidden] and
                [tokens, ceil(hidden / 128)] of float32 or of UE8M0 exponents (uint8 or float8_e8m0fnu). Rows
                contiguous, read in place (`lend_input` tells more). Has to stay as it is until the call returns, with
                `async_op` until ``event``.
            topk_idx: int32 or int64 [tokens, num_topk], contiguous, global experts; -1 for none. An expert that a token
                names twice gets it twice.
            topk_weights: float32 [tokens, num_topk]; None for ones.
            handle: of an earlier dispatch, instead of the two above: same routing and weights, nothing is counted or
                exchanged. The result has the sizes of the handle.
            quantize: "fp8" (or "fp8_e4m3", "fp8_e5m2") casts bfloat16 rows on the way, see `deep_a2a.quant`.
            scale_format: of these scales: "float32" or "ue8m0".
            host_sync: True for exact sizes. False for fixed shapes, with the counts in tensors.
            output: "leased" for views of the window, valid while the result object is kept and not released; "owned"
                for ordinary tensors (one more copy).
            zero_padding: layouts "expert" and "padded": zero the rows between groups (one more pass over them).
                Without it they hold anything.
            lane: on which to run.
            async_op: return before the rows have arrived; ``result.event`` tells when.

        Raises:
            TypeError, ValueError: a bad argument; an expert out of range is raised on every rank.
            CapacityError, MismatchError: on every rank, before a row reached a slot. The buffer stays usable, unless
                the ranks disagree on the slot or on what a cached dispatch is.
            LeaseError: no slot is free. Nothing was sent: release a result and call again.
            CommTimeoutError, PeerAbortError: a rank was lost or late. The buffer is of no use any more.
        """
        return self.dispatch_send(
            x,
            topk_idx,
            topk_weights,
            handle=handle,
            quantize=quantize,
            scale_format=scale_format,
            host_sync=host_sync,
            output=output,
            zero_padding=zero_padding,
            lane=lane,
            async_op=async_op,
        ).recv()

    def dispatch_send(
        self,
        x: DispatchInput,
        topk_idx: torch.Tensor | None = None,
        topk_weights: torch.Tensor | None = None,
        *,
        handle: DispatchHandle | None = None,
        quantize: str | None = None,
        scale_format: str = "float32",
        host_sync: bool = True,
        output: Literal["leased", "owned"] = "leased",
        zero_padding: bool = False,
        lane: int = 0,
        async_op: bool = False,
    ) -> PendingDispatch:
        """The send half of `dispatch`, same arguments; ``recv()`` of what it returns is the other half.

        A receive half relays for other ranks. So halves of different lanes are received in the same order on every
        rank, or with ``async_op=True``, which does not block.
        """
        operations = self._usable(lane)
        payload = check_payload(x, quantize, scale_format, self.hidden, self.num_max_tokens_per_rank)
        if output not in ("leased", "owned"):
            raise ValueError(f"output must be 'leased' or 'owned', got {output!r}")
        if handle is None:
            topk_idx, topk_weights = check_routing(topk_idx, topk_weights, payload.num_tokens, self.num_topk)
        else:
            self._check_handle(handle)
            if topk_idx is not None or topk_weights is not None:
                raise ValueError("topk_idx and topk_weights must be None when a handle is given: it has both")
            if payload.num_tokens != handle.num_tokens:
                raise ValueError(f"x must have the handle's {handle.num_tokens} tokens, got {payload.num_tokens}")
        return operations.dispatch(
            payload,
            topk_idx,
            topk_weights,
            handle,
            lane=lane,
            host_sync=host_sync,
            owned=output == "owned",
            zero_padding=zero_padding,
            async_op=async_op,
        )

    def combine(
        self,
        x: torch.Tensor,
        handle: DispatchHandle,
        *,
        weighted: bool | None = None,
        side: torch.Tensor | None = None,
        lane: int = 0,
        async_op: bool = False,
    ) -> CombineResult:
        """Bring the experts' outputs back to the tokens' ranks and sum them, in FP32 and in a fixed order.

        Args:
            x: bfloat16, contiguous. Layout "rank": [rank_rows, hidden], rows that the layer has already weighed and
                added over this rank's experts; copied into the window unless lent by `lend_expert_output`. Others:
                shaped like the dispatch result's ``x``, one row per expert. Has to stay as it is until the call
                returns, with `async_op` until ``event``; a leased x on another lane than its dispatch keeps its
                lease as long.
            handle: of the dispatch.
            weighted: layouts "expert" and "padded": multiply each row by its top-k weight (the default) or just add.
            side: float32 values to bring back beside the rows, one per top-k slot and without a sum. Layout "rank":
                [rank_rows, num_topk]; others: one per row of `x`. Gradients of the top-k weights travel this way.
            lane, async_op: as for `dispatch`.

        Raises: as `dispatch`, but for capacity and leases.
        """
        return self.combine_send(x, handle, weighted=weighted, side=side, lane=lane, async_op=async_op).recv()

    def combine_send(
        self,
        x: torch.Tensor,
        handle: DispatchHandle,
        *,
        weighted: bool | None = None,
        side: torch.Tensor | None = None,
        lane: int = 0,
        async_op: bool = False,
    ) -> PendingCombine:
        """The send half of `combine`, same arguments; ``recv()`` of what it returns is the other half."""
        operations = self._usable(lane)
        self._check_handle(handle)
        if self.layout == "rank" and weighted:
            raise ValueError(
                "weighted must be None or False in layout 'rank', whose rows the layer has weighed, got True"
            )
        row_shape = self._row_shape(handle)
        side_shape = (*row_shape, self.num_topk) if self.layout == "rank" else row_shape
        check_combine(x, (*row_shape, self.hidden), side, side_shape)
        weigh = self.layout != "rank" and weighted is not False
        return operations.combine(x, side, handle, lane=lane, weighted=weigh, async_op=async_op)

    # Lent memory.

    def lend_input(self, num_tokens: int, dtype: torch.dtype = torch.bfloat16, *, lane: int = 0) -> torch.Tensor:
        """Window memory [num_tokens, hidden] to write the input of the lane's next dispatch into.

        On the CPU, dispatch reads any tensor in place, so lent input saves nothing; where peers read the input
        themselves it saves a copy. One per lane: a later call returns the same memory. May be overwritten once the
        dispatch that read it has returned.
        """
        operations = self._usable(lane)
        if not 0 <= num_tokens <= self.num_max_tokens_per_rank:
            raise ValueError(f"num_tokens must be in [0, {self.num_max_tokens_per_rank}], got {num_tokens}")
        if dtype.itemsize > 2:
            raise ValueError(f"dtype must have at most 2 bytes (bfloat16 or an FP8), got {dtype}")
        return operations.backend.view("input_rows", lane, num_tokens, self.hidden, dtype)

    def lend_expert_output(self, handle: DispatchHandle | DispatchResult, *, lane: int = 0) -> torch.Tensor:
        """Layout "rank": window memory, bfloat16 [rank_rows, hidden], for the input of the lane's next combine.

        Saves the copy that `combine` makes of other tensors. One per lane: a later call returns the same memory. May be
        overwritten once the combine that read it has returned.
        """
        operations = self._usable(lane)
        if self.layout != "rank":
            raise ValueError(
                f"lend_expert_output is for layout 'rank', this is {self.layout!r}: any tensor is read in place"
            )
        owner = handle.handle if isinstance(handle, DispatchResult) else handle
        self._check_handle(owner)
        return operations.backend.view("combine_rows", lane, self._row_shape(owner)[0], self.hidden, torch.bfloat16)

    # State.

    @property
    def wire_bytes(self) -> dict[str, int]:
        """Bytes that this rank has moved so far, by link class.

        "shm": stored to or read from other ranks of its node; "network": put to other nodes.
        """
        engine = self._usable().backend.engine
        return {"shm": engine.shm_bytes, "network": engine.network_bytes}

    def check(self) -> None:
        """Raise what made the buffer useless, if anything did."""
        self._usable().backend.engine.check()

    def destroy(self) -> None:
        """Finish what was launched and stop. No collective: returns whatever the other ranks do, by the deadline.

        The windows stay mapped until the last result, handle or view of them is dropped. Repeated calls do nothing.
        """
        operations, self._operations = self._operations, None
        if operations is not None:
            operations.close()

    def __del__(self) -> None:
        if getattr(self, "_operations", None) is not None:
            self.destroy()

    def __enter__(self) -> Buffer:
        return self

    def __exit__(self, *_: object) -> None:
        self.destroy()

    # Inside.

    def _usable(self, lane: int = 0) -> Operations:
        if self._operations is None:
            raise RuntimeError("the Buffer was destroyed")
        if isinstance(lane, bool) or not isinstance(lane, int) or not 0 <= lane < self.settings.num_lanes:
            raise ValueError(f"lane must be an int in [0, {self.settings.num_lanes}), got {lane!r}")
        return self._operations

    def _check_handle(self, handle: DispatchHandle) -> None:
        if not isinstance(handle, DispatchHandle):
            raise TypeError(f"handle must be a DispatchHandle, got {describe(handle)}")
        if handle.owner is not self._operations:
            raise ValueError("handle must come from a dispatch of this Buffer, got one of another Buffer")

    def _row_shape(self, handle: DispatchHandle) -> tuple[int, ...]:
        """Of the rows that combine takes, without their channels."""
        shape = self._usable().backend.shape
        if self.layout == "padded":
            return (self.num_local_experts, shape.slot_rows // self.num_local_experts)
        if self.layout == "expert":
            return (shape.slot_rows if handle.fixed_shapes else handle.num_rows,)
        return (shape.slot_rank_rows if handle.fixed_shapes else handle.num_rank_rows,)


def _check_options(backend: str, timeout_s: float, num_sms: int | None, network_seed: int | None) -> None:
    """Settings that may differ between ranks, or that no shape depends on."""
    if backend not in ("auto", "cpu"):
        raise ValueError(f"backend must be 'auto' or 'cpu' (this version has no CUDA backend), got {backend!r}")
    if isinstance(timeout_s, bool) or not isinstance(timeout_s, int | float) or not 0 < timeout_s <= 1e6:
        raise ValueError(f"timeout_s must be seconds in (0, 1e6], got {timeout_s!r}")
    for name, value in (("num_sms", num_sms), ("network_seed", network_seed)):
        if value is not None and (isinstance(value, bool) or not isinstance(value, int) or not 0 <= value < 2**31):
            raise ValueError(f"{name} must be None or an int in [0, 2**31), got {value!r}")
