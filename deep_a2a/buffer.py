"""The Buffer: dispatch and combine for one shape of MoE layer, over one process group."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

from deep_a2a.backend import Halves
from deep_a2a.construction import Options, construct
from deep_a2a.group import as_group
from deep_a2a.lending import lend_input, lend_rows
from deep_a2a.memory import MemoryTable
from deep_a2a.operations import Operations
from deep_a2a.payload import describe
from deep_a2a.pending import PendingCombine, PendingDispatch
from deep_a2a.requests import combine_request, combine_shape, dispatch_request
from deep_a2a.results import CombineResult, DispatchHandle, DispatchResult, Event
from deep_a2a.settings import LayoutName
from deep_a2a.sites import BackendName, StreamName

if TYPE_CHECKING:
    import torch

    from deep_a2a.payload import DispatchInput


class Buffer:
    """Sends tokens to the ranks that hold their experts, and brings the experts' outputs back.

    Every rank of `group` constructs it with the same settings. Operations come in the same order on every rank: those
    of a lane among themselves, and dispatches and releases of results (they take and free slots) on all lanes together.
    A bad argument raises on the rank that gave it; the others wait for that rank until their deadline. A `Pending` half
    blocks its lane until it is received.

    Expert `e` lives on rank ``e // num_local_experts``; rank `r` is on node ``r // ranks_per_node``.

    Arrays are torch tensors, or CuPy arrays on a GPU (`deep_a2a.numpy_arrays` has the dtypes that CuPy lacks), or
    anything that speaks ``__cuda_array_interface__`` or DLPack. They lie where the backend works, on `device`. Results
    come in the library of the input.

    Attributes: rank, num_ranks, node, num_nodes, local_rank, ranks_per_node, num_local_experts (int), max_recv_rows
    (int: rows of ``x`` that a slot holds), memory (`MemoryTable`), backend (str, never "auto"), settings, and the
    arguments hidden, num_experts, num_topk, num_max_tokens_per_rank, layout.

    Args:
        group: a ``torch.distributed`` process group, None for the default one, or a `deep_a2a.group.Group`.
        hidden: channels of a token, a multiple of 8 (16 to send FP8).
        num_experts: of all ranks together; a multiple of the number of ranks.
        num_topk: experts per token, 1 to 32.
        num_max_tokens_per_rank: the most tokens that one rank dispatches at a time.
        ranks_per_node: None for the ranks of each host. Otherwise it splits them into pretend nodes, and all traffic
            between these takes the path between nodes. Backend "cuda" needs NVSHMEM then.
        backend: "cpu" (ranks are processes of one host), "cuda" (ranks have GPUs of one host that reach each other over
            NVLink or PCIe; several may share one), "emulated" (the kernels of "cuda" on the CPU, slowly: for tests), or
            "auto": "cuda" where there is a GPU for torch or CuPy, or for `device`, else "cpu".
        layout: of received rows: "rank" (a row per token and rank), "expert" (a row per token and local expert,
            grouped by expert), "padded" (the same in a fixed [experts, capacity] shape).
        expert_alignment: layout "expert": every expert's group starts at a multiple of it.
        expert_capacity: layout "padded": rows per local expert; None for num_ranks * num_max_tokens_per_rank.
        max_recv_rows: layouts "rank" and "expert": rows of a slot; None for the worst case. A dispatch that would bring
            more to any rank raises CapacityError on all of them.
        num_slots: results that may be leased at a time.
        num_lanes: sequences of operations that run beside each other.
        staging_bytes: several nodes: the most bytes of a lane's rows on their way between nodes (regions net_in and
            net_out of `memory`); None for 1 GiB. Where a lane's rows do not fit, its tokens go in rounds.
        timeout_s: seconds that a rank waits for another before it gives up.
        num_sms: SMs that a kernel takes; None for the default. Of no meaning on the CPU.
        device: backend "cuda": index of the GPU; None for the current one.
        stream: backend "cuda": "own" runs each lane on a communication stream of its own, of high priority; "current"
            runs everything on the caller's current stream.
        network_seed: tests: deliver what goes between nodes late, in pieces and out of order, as drawn from the seed;
            backends "cuda" and "emulated": signal late.

    Raises:
        TypeError, ValueError: a setting is bad (on that rank; the others raise CommError).
        MismatchError: settings differ between ranks.
        MemoryError: the windows do not fit the host, or a rank's GPU; the message holds the memory table.
        CommError: the ranks are not on one host, or two of their GPUs do not reach each other; the pair is named.
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
        backend: BackendName = "auto",
        layout: LayoutName = "rank",
        expert_alignment: int = 1,
        expert_capacity: int | None = None,
        max_recv_rows: int | None = None,
        num_slots: int = 2,
        num_lanes: int = 2,
        staging_bytes: int | None = None,
        timeout_s: float = 300.0,
        num_sms: int | None = None,
        device: int | None = None,
        stream: StreamName = "own",
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
            "staging_bytes": staging_bytes,
        }
        options = Options(backend, device, num_sms, stream, timeout_s, network_seed)
        made = construct(self.group, given, ranks_per_node, options)
        self.settings = made.settings
        self.memory: MemoryTable = made.memory
        self.backend = made.name
        self.ranks_per_node = ranks_per_node = made.settings.ranks_per_node
        self.num_nodes = self.num_ranks // ranks_per_node
        self.node, self.local_rank = divmod(self.rank, ranks_per_node)
        self.hidden, self.num_experts, self.num_topk = hidden, num_experts, num_topk
        self.num_local_experts = num_experts // self.num_ranks
        self.num_max_tokens_per_rank = num_max_tokens_per_rank
        self.layout = layout
        self.max_recv_rows: int = made.backend.shape.slot_rows
        self._operations: Operations | None = Operations(made.settings, made.backend)

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
        scale_layout: Literal["row_major", "column_major"] = "row_major",
        host_sync: bool = True,
        output: Literal["leased", "owned"] = "leased",
        zero_padding: bool = False,
        lane: int = 0,
        async_op: bool = False,
        previous_event: Event | None = None,
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
            scale_layout: of the result's scales: "row_major", or "column_major" (see `DispatchResult`), which the
                receiver makes of them in one more pass. The ranks need not agree.
            host_sync: True for exact sizes. False for fixed shapes, with the counts in tensors.
            output: "leased" for views of the window, valid while the result object is kept and not released; "owned"
                for ordinary tensors (one more copy).
            zero_padding: layouts "expert" and "padded": zero the rows between groups (one more pass over them).
                Without it they hold anything.
            lane: on which to run.
            async_op: return before the rows have arrived; ``result.event`` tells when.
            previous_event: of another operation, of this or another Buffer, that comes first.

        Streams (backend "cuda"): the operation comes after what is on the caller's current stream, and what the caller
        launches there afterwards comes after the operation. With ``async_op=True`` that is so from ``event.wait()`` on,
        which does not block the host; until then `x` must not be overwritten. The host waits for the counts alone, so
        not at all with ``host_sync=False`` or a handle. Inputs and results are not freed while kernels use them.

        With ``host_sync=False``, dispatch, combine and ``result.release()`` can be captured in a CUDA graph. The graph
        has to release what it dispatches. A handle or an event from before the capture has to be over when it begins,
        and so have other operations of the lanes at a replay. No replay after `destroy`.

        Raises:
            TypeError, ValueError: a bad argument; an expert out of range is raised on every rank. With
                ``host_sync=False`` a GPU finds it later: the result has counts of zero, and a later call,
                ``event.synchronize()`` or `check` raises. So it is with CapacityError and MismatchError.
            CapacityError, MismatchError: on every rank, before a row reached a slot. The buffer stays usable, unless
                the ranks disagree on the slot or on what a cached dispatch is.
            LeaseError: no slot is free. Nothing was sent: release a result and call again.
            CommTimeoutError, PeerAbortError: a rank was lost or late. The buffer is of no use any more.
        """
        return self._dispatch(
            Halves.together,
            x,
            topk_idx,
            topk_weights,
            handle,
            quantize=quantize,
            scale_format=scale_format,
            scale_layout=scale_layout,
            host_sync=host_sync,
            output=output,
            zero_padding=zero_padding,
            lane=lane,
            async_op=async_op,
            previous_event=previous_event,
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
        scale_layout: Literal["row_major", "column_major"] = "row_major",
        host_sync: bool = True,
        output: Literal["leased", "owned"] = "leased",
        zero_padding: bool = False,
        lane: int = 0,
        async_op: bool = False,
        previous_event: Event | None = None,
    ) -> PendingDispatch:
        """The send half of `dispatch`, same arguments; ``recv()`` of what it returns is the other half.

        A receive half relays for other ranks. So halves of different lanes are received in the same order on every
        rank, or with ``async_op=True``, which does not block.
        """
        return self._dispatch(
            Halves.apart,
            x,
            topk_idx,
            topk_weights,
            handle,
            quantize=quantize,
            scale_format=scale_format,
            scale_layout=scale_layout,
            host_sync=host_sync,
            output=output,
            zero_padding=zero_padding,
            lane=lane,
            async_op=async_op,
            previous_event=previous_event,
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
        previous_event: Event | None = None,
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
            lane, async_op, previous_event: as for `dispatch`, and so are streams.

        Raises: as `dispatch`, but for capacity and leases.
        """
        return self._combine(Halves.together, x, handle, weighted, side, lane, async_op, previous_event).recv()

    def combine_send(
        self,
        x: torch.Tensor,
        handle: DispatchHandle,
        *,
        weighted: bool | None = None,
        side: torch.Tensor | None = None,
        lane: int = 0,
        async_op: bool = False,
        previous_event: Event | None = None,
    ) -> PendingCombine:
        """The send half of `combine`, same arguments; ``recv()`` of what it returns is the other half."""
        return self._combine(Halves.apart, x, handle, weighted, side, lane, async_op, previous_event)

    # Lent memory.

    def lend_input(self, num_tokens: int, dtype: torch.dtype | None = None, *, lane: int = 0) -> torch.Tensor:
        """Window memory [num_tokens, hidden] to write the input of the lane's next dispatch into.

        On the CPU, dispatch reads any tensor in place, so lent input saves nothing; where peers read the input
        themselves (backend "cuda", layouts "expert" and "padded") it saves a copy. One per lane: a later call returns
        the same memory. May be overwritten once the dispatch that read it has returned; on a GPU, in stream order.

        `dtype` is bfloat16 (None) or an FP8, of torch; or of NumPy, for an array of CuPy (or of NumPy, in host memory).
        """
        operations = self._usable(lane)
        if not 0 <= num_tokens <= self.num_max_tokens_per_rank:
            raise ValueError(f"num_tokens must be in [0, {self.num_max_tokens_per_rank}], got {num_tokens}")
        lent: torch.Tensor = lend_input(operations.backend, num_tokens, self.hidden, dtype, lane)
        return lent

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
        num_rows = combine_shape(self.settings, operations.backend, owner)[0]
        lent: torch.Tensor = lend_rows(operations.backend, handle, num_rows, self.hidden, lane)
        return lent

    # State.

    @property
    def wire_bytes(self) -> dict[str, int]:
        """Bytes that this rank has moved so far, by link class.

        "shm" ("nvlink" with the backends "cuda" and "emulated"): stored to or read from other ranks of its node;
        "network": put to other nodes. On GPUs: of the operations that have come to their end.
        """
        return self._usable().backend.wire_bytes

    def check(self) -> None:
        """Raise what made the buffer useless, or what a dispatch was refused with, as far as that is known."""
        self._usable().backend.check()

    def destroy(self) -> None:
        """Finish what was launched and stop. No collective: returns whatever the other ranks do, by the deadline.

        The own window stays until the last result or view of it is dropped. Repeated calls do nothing.
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

    def _dispatch(
        self,
        halves: Halves,
        x: DispatchInput,
        topk_idx: torch.Tensor | None,
        topk_weights: torch.Tensor | None,
        handle: DispatchHandle | None,
        *,
        lane: int,
        async_op: bool,
        **modes: Any,
    ) -> PendingDispatch:
        operations = self._usable(lane)
        if handle is not None:
            self._check_handle(handle)
        request = dispatch_request(
            self.settings, operations.backend, x, topk_idx, topk_weights, handle, lane=lane, halves=halves, **modes
        )
        return operations.dispatch(request, async_op=async_op)

    def _combine(
        self,
        halves: Halves,
        x: torch.Tensor,
        handle: DispatchHandle,
        weighted: bool | None,
        side: torch.Tensor | None,
        lane: int,
        async_op: bool,
        previous_event: Event | None,
    ) -> PendingCombine:
        operations = self._usable(lane)
        self._check_handle(handle)
        request = combine_request(
            self.settings,
            operations.backend,
            x,
            handle,
            weighted=weighted,
            side=side,
            lane=lane,
            halves=halves,
            previous_event=previous_event,
        )
        return operations.combine(request, async_op=async_op)

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
