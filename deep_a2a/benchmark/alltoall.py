"""The baseline: dispatch and combine from `torch.distributed.all_to_all_single` and torch indexing.

Written as one would without this package, and with care: buffers are allocated once, one row travels per token and
destination rank, ids and weights travel in one message, sums run in FP32 over pieces that stay in the cache (on a GPU:
at once). Rows travel over any group, gloo or NCCL; who sends how much is always found out over gloo, on the CPU.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
import torch.distributed as dist

from deep_a2a.benchmark.cell import Cell
from deep_a2a.benchmark.workload import Payload
from deep_a2a.quant import num_scale_groups, quantize

_CACHED_ROWS = 64  # float32 copies of this many rows stay in the cache


@dataclass(frozen=True)
class Route:
    """What the baseline knows after a dispatch; the handle of its cached mode.

    Attributes:
        send_tokens: int64 [sent rows], own token of each row, by destination rank, then token.
        send_counts, recv_counts: rows to and from each rank.
        topk_idx: int32 [received rows, num_topk], local expert or -1.
        topk_weights: float32 [received rows, num_topk].
        expert_sources: int64 [expert rows], received row of each expert row (layouts expert and padded).
        expert_weights: float32 [expert rows].
        places: int64 [expert rows], where each goes in the output.
    """

    send_tokens: torch.Tensor
    send_counts: list[int]
    recv_counts: list[int]
    topk_idx: torch.Tensor
    topk_weights: torch.Tensor
    expert_sources: torch.Tensor
    expert_weights: torch.Tensor
    places: torch.Tensor

    @property
    def num_sent(self) -> int:
        return sum(self.send_counts)

    @property
    def num_received(self) -> int:
        return sum(self.recv_counts)

    def to(self, device: torch.device) -> Route:
        names = ("send_tokens", "topk_idx", "topk_weights", "expert_sources", "expert_weights", "places")
        return replace(self, **{name: getattr(self, name).to(device) for name in names})


class AllToAll:
    """The baseline's buffers on one rank, in the memory of `device`.

    control: a gloo group, for counts and routing; rows: the group that rows travel over. `num_expert_rows` is the most
    that layout expert can need here, `expert_capacity` the rows per local expert of layout padded.
    """

    def __init__(
        self,
        control: dist.ProcessGroup,
        rows: dist.ProcessGroup,
        cell: Cell,
        num_expert_rows: int,
        expert_capacity: int,
        device: torch.device,
    ) -> None:
        self._control, self._rows, self._cell, self._capacity = control, rows, cell, expert_capacity
        self._device = device
        sent = cell.num_tokens * min(cell.num_topk, cell.num_ranks)
        received = cell.num_tokens * cell.num_ranks
        output = {
            "rank": 0, "expert": num_expert_rows, "padded": cell.num_local_experts * expert_capacity,
        }[cell.layout]  # fmt: skip
        payload = torch.bfloat16 if cell.dtype == "bf16" else torch.float8_e4m3fn
        scale = torch.float32 if cell.scale_format == "float32" else torch.uint8
        groups = num_scale_groups(cell.hidden)
        sizes = sent, received, output
        self._send, self._recv, self._output = (self._zeros(size, cell.hidden, payload) for size in sizes)
        self._send_scales, self._recv_scales, self._output_scales = (self._zeros(size, groups, scale) for size in sizes)
        # Combine goes the other way: it sends what dispatch received.
        self._partial = self._zeros(received if cell.layout != "rank" else 0, cell.hidden, torch.bfloat16)
        self._returned = self._zeros(sent, cell.hidden, torch.bfloat16)
        self._sum = self._zeros(max(cell.num_tokens, self._partial.shape[0]), cell.hidden, torch.float32)
        most = max(num_expert_rows, output, sent)
        self._chunk = self._zeros(_CACHED_ROWS if device.type == "cpu" else most, cell.hidden, torch.float32)
        self._combined = self._zeros(cell.num_tokens, cell.hidden, torch.bfloat16)

    def dispatch(self, x: Payload, route: Route) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Rows and scales, in the order and layout of `DispatchResult`."""
        rows, scales = x
        if self._cell.dtype == "fp8_cast":
            rows, scales = quantize(rows, "fp8_e4m3", self._cell.scale_format)
        received = self._exchange(rows, route, self._send, self._recv)
        received_scales = None
        if scales is not None:
            received_scales = self._exchange(scales, route, self._send_scales, self._recv_scales)
        if self._cell.layout == "rank":
            return received, received_scales
        output = self._place(received, route, self._output)
        output_scales = None if received_scales is None else self._place(received_scales, route, self._output_scales)
        return output, output_scales

    def combine(self, x: torch.Tensor, route: Route) -> torch.Tensor:
        """bf16 [num_tokens, hidden] from rows of the layout: weighed and added here first, except for layout rank."""
        if self._cell.layout != "rank":
            total = self._sum[: route.num_received].zero_()
            self._add(total, x.flatten(0, -2), route.places, route.expert_sources, route.expert_weights)
            x = self._partial[: route.num_received].copy_(total)
        returned = self._returned[: route.num_sent]
        _all_to_all(returned, x, route.send_counts, route.recv_counts, self._rows)
        total = self._sum[: self._cell.num_tokens].zero_()
        self._add(total, returned, None, route.send_tokens, None)
        return self._combined.copy_(total)

    def plan(self, topk_idx: torch.Tensor, topk_weights: torch.Tensor) -> Route:
        """What each rank sends to and gets from each other: counts, ids and weights exchanged."""
        cell, topk_idx, topk_weights = self._cell, topk_idx.cpu(), topk_weights.cpu()
        dest = torch.where(topk_idx >= 0, topk_idx // cell.num_local_experts, cell.num_ranks)
        visits = torch.zeros(topk_idx.shape[0], cell.num_ranks + 1, dtype=torch.bool).scatter_(1, dest, True)
        ranks, tokens = visits[:, : cell.num_ranks].t().nonzero(as_tuple=True)
        sending = torch.bincount(ranks, minlength=cell.num_ranks)
        receiving = torch.empty_like(sending)
        dist.all_to_all_single(receiving, sending, group=self._control)
        send_counts, recv_counts = sending.tolist(), receiving.tolist()

        here = dest[tokens] == ranks.unsqueeze(1)
        local = torch.where(here, topk_idx[tokens] - (ranks * cell.num_local_experts).unsqueeze(1), -1)
        sent = torch.cat([local.to(torch.int32), (topk_weights[tokens] * here).view(torch.int32)], dim=1)
        received = torch.empty(sum(recv_counts), 2 * cell.num_topk, dtype=torch.int32)
        _all_to_all(received, sent, recv_counts, send_counts, self._control)
        idx, weights = received[:, : cell.num_topk], received[:, cell.num_topk :].view(torch.float32)
        sources, expert_weights, places = self._plan_experts(idx, weights)
        route = Route(tokens, send_counts, recv_counts, idx, weights, sources, expert_weights, places)
        return route.to(self._device)

    def _plan_experts(
        self, idx: torch.Tensor, weights: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Received row, weight and place in the output of each expert row."""
        if self._cell.layout == "rank":
            nothing = torch.empty(0, dtype=torch.int64)
            return nothing, torch.empty(0), nothing
        row, slot = (idx >= 0).nonzero(as_tuple=True)
        expert, order = idx[row, slot].sort(stable=True)
        places = torch.arange(row.shape[0])
        if self._cell.layout == "padded":
            counts = torch.bincount(expert, minlength=self._cell.num_local_experts)
            first = counts.cumsum(0) - counts
            places += (torch.arange(self._cell.num_local_experts) * self._capacity - first)[expert]
        return row[order], weights[row, slot][order], places

    def _exchange(self, rows: torch.Tensor, route: Route, send: torch.Tensor, recv: torch.Tensor) -> torch.Tensor:
        sent, received = send[: route.num_sent], recv[: route.num_received]
        torch.index_select(_bits(rows), 0, route.send_tokens, out=_bits(sent))
        _all_to_all(received, sent, route.recv_counts, route.send_counts, self._rows)
        return received

    def _zeros(self, rows: int, channels: int, dtype: torch.dtype) -> torch.Tensor:
        """Zeros, not empty: so that no page is touched for the first time while a clock runs."""
        return torch.zeros(rows, channels, dtype=dtype, device=self._device)

    def _place(self, received: torch.Tensor, route: Route, output: torch.Tensor) -> torch.Tensor:
        if self._cell.layout == "padded":
            for chunk in self._chunks(route.places):
                _bits(output).index_copy_(0, route.places[chunk], _bits(received)[route.expert_sources[chunk]])
            return output.view(self._cell.num_local_experts, self._capacity, -1)
        output = output[: route.places.shape[0]]
        torch.index_select(_bits(received), 0, route.expert_sources, out=_bits(output))
        return output

    def _chunks(self, rows: torch.Tensor) -> Iterator[slice]:
        step = self._chunk.shape[0]
        return (slice(start, start + step) for start in range(0, rows.shape[0], step))

    def _add(
        self,
        total: torch.Tensor,
        rows: torch.Tensor,
        places: torch.Tensor | None,
        targets: torch.Tensor,
        weights: torch.Tensor | None,
    ) -> None:
        """total[targets[i]] += weights[i] * rows[places[i]], in float32."""
        for chunk in self._chunks(targets):
            source = rows[chunk] if places is None else rows[places[chunk]]
            values = self._chunk[: source.shape[0]].copy_(source)
            if weights is not None:
                values *= weights[chunk].unsqueeze(1)
            total.index_add_(0, targets[chunk], values)


def _all_to_all(
    output: torch.Tensor, rows: torch.Tensor, recv: list[int], send: list[int], group: dist.ProcessGroup
) -> None:
    # As bytes: not every library knows all of torch's types.
    dist.all_to_all_single(output.view(torch.uint8), rows.view(torch.uint8), recv, send, group=group)


def _bits(rows: torch.Tensor) -> torch.Tensor:
    """The same memory in a type that all of torch's indexing takes, and that it moves fast."""
    row_bytes = rows.shape[1] * rows.element_size()
    return rows.view(torch.int64 if row_bytes % 8 == 0 else torch.int32 if row_bytes % 4 == 0 else torch.uint8)
