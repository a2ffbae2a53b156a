"""The two that are measured, behind one interface: a Buffer, and the baseline over the same process group."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal, Protocol

import torch

from deep_a2a.benchmark.alltoall import AllToAll, Route
from deep_a2a.benchmark.cell import Cell
from deep_a2a.benchmark.plain import Delivered
from deep_a2a.benchmark.workload import Payload

if TYPE_CHECKING:
    from deep_a2a import Buffer, DispatchHandle, DispatchResult


class Contender(Protocol):
    """One iteration: load, dispatch, delivered, load_expert_output, combine, combined, finish. Collective.

    Only `dispatch` and `combine` are timed; the others do what a model would have done, or look at results. `close`
    comes after the last iteration.
    """

    def load(self, x: Payload, topk_idx: torch.Tensor, topk_weights: torch.Tensor) -> None: ...

    def dispatch(self) -> None: ...

    def delivered(self) -> Delivered: ...

    def load_expert_output(self, y: torch.Tensor) -> None: ...

    def combine(self) -> None: ...

    def combined(self) -> torch.Tensor: ...

    def finish(self) -> None: ...

    def close(self) -> None: ...


Mode = Literal["blocking", "async"]


class BufferContender:
    """deep_a2a, with inputs and outputs as the cell asks. In mode "async" nothing waits for an operation but `wait`."""

    def __init__(self, buffer: Buffer, cell: Cell, mode: Mode = "blocking") -> None:
        self._buffer, self._cell, self._async = buffer, cell, mode == "async"
        self._quantize = "fp8" if cell.dtype == "fp8_cast" else None
        self._spare_rows = torch.empty(0)
        self._handle: DispatchHandle | None = None
        self._result: DispatchResult | None = None

    def load(self, x: Payload, topk_idx: torch.Tensor, topk_weights: torch.Tensor) -> None:
        rows, scales = x
        if self._cell.input == "lent":
            rows = self._buffer.lend_input(rows.shape[0], rows.dtype).copy_(rows)
        else:
            rows = self._settle("rows", rows)
        self._x = rows if scales is None else (rows, self._settle("scales", scales))
        self._topk = (self._settle("topk_idx", topk_idx), self._settle("topk_weights", topk_weights))
        if self._cell.cached and self._handle is None:
            result = self._dispatch(None)
            self._handle = result.handle
            result.release()

    def dispatch(self) -> None:
        self._result = self._dispatch(self._handle)

    def _settle(self, name: str, tensor: torch.Tensor) -> torch.Tensor:
        """Where an input lies that is not lent: anywhere."""
        return tensor

    def _dispatch(self, handle: DispatchHandle | None) -> DispatchResult:
        topk_idx, topk_weights = self._topk if handle is None else (None, None)
        return self._buffer.dispatch(
            self._x,
            topk_idx,
            topk_weights,
            handle=handle,
            quantize=self._quantize,
            scale_format=self._cell.scale_format,
            host_sync=self._cell.host_sync,
            output=self._cell.output,
            async_op=self._async,
        )

    def delivered(self) -> Delivered:
        result = self._current
        rows, rank_rows = (int(count) for count in result.num_rows_tensor)
        cut = slice(None) if self._cell.layout == "padded" else slice(rows)
        scales = None if result.scales is None else result.scales[cut]
        return Delivered(result.x[cut], scales, result.topk_idx[:rank_rows], result.topk_weights[:rank_rows])

    def load_expert_output(self, y: torch.Tensor) -> None:
        if self._cell.layout == "padded":
            self._y = y
        elif self._cell.layout == "rank" and self._cell.input == "lent":
            self._y = self._buffer.lend_expert_output(self._current)
            self._y[: y.shape[0]].copy_(y)
        else:
            self._y = self._with_spare_rows(y)

    def _with_spare_rows(self, y: torch.Tensor) -> torch.Tensor:
        """With host_sync=False combine takes as many rows as the result has room for."""
        num_rows = (self._current.topk_idx if self._cell.layout == "rank" else self._current.x).shape[0]
        if y.shape[0] == num_rows:
            return y
        if self._spare_rows.shape[0] != num_rows:
            self._spare_rows = y.new_zeros(num_rows, y.shape[1])
        self._spare_rows[: y.shape[0]].copy_(y)
        return self._spare_rows

    def combine(self) -> None:
        self._combined = self._buffer.combine(self._y, self._current.handle, async_op=self._async)

    def refill(self, y: torch.Tensor) -> None:
        """As `load_expert_output`, into the memory of the time before: so it may come before the dispatch."""
        self._y[: y.shape[0]].copy_(y)

    def wait(self) -> None:
        """For combine, and so for dispatch, which runs before it."""
        if self._combined.event is not None:
            self._combined.event.wait()

    def combined(self) -> torch.Tensor:
        return self._combined.x

    def finish(self) -> None:
        self._current.release()
        self._result = None

    def close(self) -> None:
        self._handle = None

    @property
    def _current(self) -> DispatchResult:
        assert self._result is not None, "dispatch comes first"
        return self._result


Counting = Literal["timed", "ahead"]


class AllToAllContender:
    """The baseline. Its buffers are its own and reused, which is what a leased output is to the other.

    counting: "ahead" leaves out of its time who sends how much: that is asked of the host, which no held stream allows.
    """

    def __init__(self, exchange: AllToAll, cell: Cell, counting: Counting = "timed") -> None:
        self._exchange, self._cell, self._counting = exchange, cell, counting
        self._known: Route | None = None

    def load(self, x: Payload, topk_idx: torch.Tensor, topk_weights: torch.Tensor) -> None:
        self._x, self._topk = x, (topk_idx, topk_weights)
        if self._counting == "ahead" or (self._cell.cached and self._known is None):
            self._known = self._exchange.plan(topk_idx, topk_weights)

    def dispatch(self) -> None:
        self._route = self._known or self._exchange.plan(*self._topk)
        self._rows, self._scales = self._exchange.dispatch(self._x, self._route)

    def delivered(self) -> Delivered:
        return Delivered(self._rows, self._scales, self._route.topk_idx, self._route.topk_weights)

    def load_expert_output(self, y: torch.Tensor) -> None:
        self._y = y

    def combine(self) -> None:
        self._combined = self._exchange.combine(self._y, self._route)

    def combined(self) -> torch.Tensor:
        return self._combined

    def finish(self) -> None:
        pass

    def close(self) -> None:
        self._known = None
