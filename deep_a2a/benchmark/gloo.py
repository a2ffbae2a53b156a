"""The baseline: dispatch and combine from `torch.distributed.all_to_all_single` and torch indexing.

Written as one would without this package, and with care: buffers are allocated once, one row travels per token and
destination rank, ids and weights travel in one message, sums run in FP32 over pieces that stay in the cache.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist

from deep_a2a.benchmark.cell import Cell
from deep_a2a.benchmark.workload import Payload
from deep_a2a.quant import num_scale_groups, quantize

NAME = "gloo all_to_all_single"
_CHUNK_ROWS = 64  # float32 copies of this many rows stay in the cache


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


class GlooExchange:
    """The baseline's buffers on one rank. `expert_capacity` is the rows per local expert of layout padded."""

    def __init__(self, group: dist.ProcessGroup, cell: Cell, num_expert_rows: int, expert_capacity: int) -> None:
        """num_expert_rows: most rows that layout expert can need here."""
        self._group, self._cell, self._capacity = group, cell, expert_capacity
        self._rank = dist.get_rank(group)
        sent = cell.num_tokens * min(cell.num_topk, cell.num_ranks)
        received = cell.num_tokens * cell.num_ranks
        output = {
            "rank": 0, "expert": num_expert_rows, "padded": cell.num_local_experts * expert_capacity,
        }[cell.layout]  # fmt: skip
        payload = torch.bfloat16 if cell.dtype == "bf16" else torch.float8_e4m3fn
        scale = torch.float32 if cell.scale_format == "float32" else torch.uint8
        groups = num_scale_groups(cell.hidden)
        self._send, self._recv, self._output = (_zeros(rows, cell.hidden, payload) for rows in (sent, received, output))
        self._send_scales, self._recv_scales, self._output_scales = (
            _zeros(rows, groups, scale) for rows in (sent, received, output)
        )
        # Combine goes the other way: it sends what dispatch received.
        self._partial = _zeros(received if cell.layout != "rank" else 0, cell.hidden, torch.bfloat16)
        self._returned = _zeros(sent, cell.hidden, torch.bfloat16)
        self._sum = _zeros(max(cell.num_tokens, self._partial.shape[0]), cell.hidden, torch.float32)
        self._chunk = _zeros(_CHUNK_ROWS, cell.hidden, torch.float32)
        self._combined = _zeros(cell.num_tokens, cell.hidden, torch.bfloat16)

    def dispatch(
        self, x: Payload, topk_idx: torch.Tensor, topk_weights: torch.Tensor, route: Route | None = None
    ) -> tuple[torch.Tensor, torch.Tensor | None, Route]:
        """Rows, scales and route, in the order and layout of `DispatchResult`; with `route` nothing is counted."""
        rows, scales = x
        if self._cell.dtype == "fp8_cast":
            rows, scales = quantize(rows, "fp8_e4m3", self._cell.scale_format)
        if route is None:
            route = self._plan(topk_idx, topk_weights)
        received = self._exchange(rows, route, self._send, self._recv)
        received_scales = None
        if scales is not None:
            received_scales = self._exchange(scales, route, self._send_scales, self._recv_scales)
        if self._cell.layout == "rank":
            return received, received_scales, route
        output = self._place(received, route, self._output)
        output_scales = None if received_scales is None else self._place(received_scales, route, self._output_scales)
        return output, output_scales, route

    def combine(self, x: torch.Tensor, route: Route) -> torch.Tensor:
        """bf16 [num_tokens, hidden] from rows of the layout: weighed and added here first, except for layout rank."""
        if self._cell.layout != "rank":
            total = self._sum[: route.num_received].zero_()
            self._add(total, x.flatten(0, -2), route.places, route.expert_sources, route.expert_weights)
            x = self._partial[: route.num_received].copy_(total)
        returned = self._returned[: route.num_sent]
        self._all_to_all(returned, x, route.send_counts, route.recv_counts)
        total = self._sum[: self._cell.num_tokens].zero_()
        self._add(total, returned, None, route.send_tokens, None)
        return self._combined.copy_(total)

    def _plan(self, topk_idx: torch.Tensor, topk_weights: torch.Tensor) -> Route:
        cell = self._cell
        dest = torch.where(topk_idx >= 0, topk_idx // cell.num_local_experts, cell.num_ranks)
        visits = torch.zeros(topk_idx.shape[0], cell.num_ranks + 1, dtype=torch.bool).scatter_(1, dest, True)
        ranks, tokens = visits[:, : cell.num_ranks].t().nonzero(as_tuple=True)
        sending = torch.bincount(ranks, minlength=cell.num_ranks)
        receiving = torch.empty_like(sending)
        dist.all_to_all_single(receiving, sending, group=self._group)
        send_counts, recv_counts = sending.tolist(), receiving.tolist()

        here = dest[tokens] == ranks.unsqueeze(1)
        local = torch.where(here, topk_idx[tokens] - (ranks * cell.num_local_experts).unsqueeze(1), -1)
        sent = torch.cat([local.to(torch.int32), (topk_weights[tokens] * here).view(torch.int32)], dim=1)
        received = torch.empty(sum(recv_counts), 2 * cell.num_topk, dtype=torch.int32)
        self._all_to_all(received, sent, recv_counts, send_counts)
        idx, weights = received[:, : cell.num_topk], received[:, cell.num_topk :].view(torch.float32)
        sources, expert_weights, places = self._plan_experts(idx, weights)
        return Route(tokens, send_counts, recv_counts, idx, weights, sources, expert_weights, places)

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
        self._all_to_all(received, sent, route.recv_counts, route.send_counts)
        return received

    def _all_to_all(self, output: torch.Tensor, rows: torch.Tensor, recv: list[int], send: list[int]) -> None:
        # As bytes: gloo does not know all of torch's types.
        dist.all_to_all_single(output.view(torch.uint8), rows.view(torch.uint8), recv, send, group=self._group)

    def _place(self, received: torch.Tensor, route: Route, output: torch.Tensor) -> torch.Tensor:
        if self._cell.layout == "padded":
            for start in range(0, route.places.shape[0], _CHUNK_ROWS):
                chunk = slice(start, start + _CHUNK_ROWS)
                _bits(output).index_copy_(0, route.places[chunk], _bits(received)[route.expert_sources[chunk]])
            return output.view(self._cell.num_local_experts, self._capacity, -1)
        output = output[: route.places.shape[0]]
        torch.index_select(_bits(received), 0, route.expert_sources, out=_bits(output))
        return output

    def _add(
        self,
        total: torch.Tensor,
        rows: torch.Tensor,
        places: torch.Tensor | None,
        targets: torch.Tensor,
        weights: torch.Tensor | None,
    ) -> None:
        """total[targets[i]] += weights[i] * rows[places[i]], in float32."""
        for start in range(0, targets.shape[0], _CHUNK_ROWS):
            chunk = slice(start, start + _CHUNK_ROWS)
            source = rows[chunk] if places is None else rows[places[chunk]]
            values = self._chunk[: source.shape[0]].copy_(source)
            if weights is not None:
                values *= weights[chunk].unsqueeze(1)
            total.index_add_(0, targets[chunk], values)


def _zeros(rows: int, channels: int, dtype: torch.dtype) -> torch.Tensor:
    """Zeros, not empty: so that no page is touched for the first time while a clock runs."""
    return torch.zeros(rows, channels, dtype=dtype)


def _bits(rows: torch.Tensor) -> torch.Tensor:
    """The same memory in a type that all of torch's indexing takes, and that it moves fast."""
    row_bytes = rows.shape[1] * rows.element_size()
    return rows.view(torch.int64 if row_bytes % 8 == 0 else torch.int32 if row_bytes % 4 == 0 else torch.uint8)
