"""The calls of the native module that bench/kernels.py times, and the memory that they work on."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING

import torch
from kernel_ranks import Ranks
from sm_partitions import PartitionStream

from deep_a2a._cpu import Cast, ScaleFormat
from deep_a2a.benchmark.cell import Cell
from deep_a2a.benchmark.record import Dtype
from deep_a2a.benchmark.workload import Payload, Workload
from deep_a2a.memory import table_of
from deep_a2a.settings import Settings

if TYPE_CHECKING:
    from deep_a2a._cpu import Shape
    from deep_a2a._cuda import Rank

_CAPACITY_STEP = 16
_LANE = _SLOT = 0  # the only ones


@dataclass(frozen=True)
class RankMemory:
    """Ordinary device memory of one rank: what dispatch reads, what it leaves for its caller, and combined rows."""

    topk_idx: torch.Tensor
    topk_weights: torch.Tensor
    inputs: dict[Dtype, Payload]
    source: torch.Tensor
    relay: torch.Tensor
    kept_counts: torch.Tensor
    kept_routing: torch.Tensor
    result_counts: torch.Tensor
    result_routing: torch.Tensor
    combined: torch.Tensor

    @staticmethod
    def of(
        rank: Rank, cell: Cell, shape: Shape, source: int, device: torch.device, dtypes: Iterable[Dtype]
    ) -> RankMemory:
        def empty(count: int, dtype: torch.dtype) -> torch.Tensor:
            return torch.empty(max(count, 1), dtype=dtype, device=device)

        counts, routing = rank.counts_words(), rank.routing_words(shape.slot_rank_rows)
        idx, weights = Workload(cell).routing_of(0, source)
        inputs = {dtype: Workload(replace(cell, dtype=dtype), device).input(0, source) for dtype in dtypes}
        return RankMemory(
            topk_idx=idx.to(device),
            topk_weights=weights.to(device),
            inputs=inputs,
            source=empty(rank.source_bytes(cell.num_tokens), torch.uint8),
            relay=empty(rank.relay_bytes(), torch.uint8),
            kept_counts=empty(counts, torch.int32),
            kept_routing=empty(routing, torch.int32),
            result_counts=empty(counts, torch.int32),
            result_routing=empty(routing, torch.int32),
            combined=torch.empty(cell.num_tokens, cell.hidden, dtype=torch.bfloat16, device=device),
        )


class Kernels:
    """All ranks in the layout and with the tokens of `cell`, whose dtype, SMs and mode do not matter here.

    `dtypes` are those that are going to be dispatched. Every iteration moves the same rows; what lies in a
    window is zeros, unless dispatch has written it.
    """

    def __init__(self, ranks: Ranks, cell: Cell, dtypes: Collection[Dtype]) -> None:
        self._ranks, self._cell = ranks, cell
        self.topk_idx = Workload(cell).routing(0).topk_idx
        rows_per_expert = torch.bincount(torch.cat(self.topk_idx).flatten(), minlength=cell.num_experts)
        capacity = -(-int(rows_per_expert.max()) // _CAPACITY_STEP) * _CAPACITY_STEP
        most_rows = int(rows_per_expert.view(cell.num_ranks, -1).sum(dim=1).max())
        self._shape = Settings(
            num_ranks=cell.num_ranks,
            ranks_per_node=cell.ranks_per_node,
            hidden=cell.hidden,
            num_experts=cell.num_experts,
            num_topk=cell.num_topk,
            num_max_tokens_per_rank=cell.num_tokens,
            layout=cell.layout,
            expert_capacity=capacity if cell.layout == "padded" else None,
            max_recv_rows=most_rows if cell.layout == "expert" else None,
            num_slots=1,
            num_lanes=1,
        ).shape()
        self._offsets = {region.name: region.offset for region in table_of(self._shape).regions}
        self._windows = ranks.windows(self._shape.window_bytes)
        self._engines: list[Rank] = [
            ranks.native.Rank(
                shape=self._shape, rank=rank, device=device, windows=self._windows, timeout_s=ranks.timeout_s
            )
            for rank, device in enumerate(ranks.devices)
        ]
        self._memory = [
            RankMemory.of(engine, cell, self._shape, rank, ranks.places[rank], dtypes)
            for rank, engine in enumerate(self._engines)
        ]
        self._tickets = [0] * cell.num_ranks
        self._num_rows = [0] * cell.num_ranks
        ranks.synchronize_devices()

    @property
    def most_sms(self) -> int:
        """Of each rank, so that those on one device can run side by side."""
        shares = Counter(self._ranks.devices)
        ranks = zip(self._ranks.devices, self._ranks.streams, self._engines, strict=True)
        return min(
            stream.num_sms if isinstance(stream, PartitionStream) else engine.num_sms // shares[device]
            for device, stream, engine in ranks
        )

    def route(self, dtype: Dtype, num_sms: int) -> None:
        """A dispatch that counts: what cached dispatches and combines go by from here on."""
        self._ranks.together(partial(self.dispatch, dtype=dtype, num_sms=num_sms, cached=False))
        self._ranks.together(self.release)
        for rank, engine in enumerate(self._engines):
            rows, rank_rows = engine.wait_counts(_LANE, self._tickets[rank], self._ranks.streams[rank].handle)
            self._num_rows[rank] = rank_rows if self._cell.layout == "rank" else rows

    def dispatch(self, rank: int, *, dtype: Dtype, num_sms: int, cached: bool) -> None:
        cell, memory = replace(self._cell, dtype=dtype), self._memory[rank]
        rows, scales = memory.inputs[dtype]
        # Lent input, as all who measure have it: peers read it where it lies, unless they are pushed to, or it is cast.
        lent = cell.layout != "rank" and dtype != "fp8_cast"
        self._tickets[rank] = self._engines[rank].dispatch(
            stream=self._ranks.streams[rank].handle,
            lane=_LANE,
            slot=_SLOT,
            half=self._ranks.native.Half.both,
            num_sms=num_sms,
            x=self._address(rank, "input_rows") if lent else rows.data_ptr(),
            x_pitch=rows.stride(0) * rows.element_size(),
            num_tokens=cell.num_tokens,
            payload_bytes=cell.hidden * cell.bytes_per_channel,
            scales=0 if scales is None else scales.data_ptr(),
            scales_pitch=0 if scales is None else scales.stride(0) * scales.element_size(),
            scale_bytes=cell.scale_bytes,
            format_code=0,
            topk_idx=memory.topk_idx.data_ptr(),
            topk_idx_bytes=memory.topk_idx.element_size(),
            topk_weights=memory.topk_weights.data_ptr(),
            cast=Cast.fp8_e4m3 if dtype == "fp8_cast" else Cast.none,
            scale_format=ScaleFormat.float32,
            zero_padding=False,
            cached=cached,
            source=memory.source.data_ptr(),
            relay=memory.relay.data_ptr(),
            kept_counts=memory.kept_counts.data_ptr(),
            kept_routing=memory.kept_routing.data_ptr(),
            kept_capacity=self._shape.slot_rank_rows,
            result_counts=memory.result_counts.data_ptr(),
            result_routing=memory.result_routing.data_ptr(),
            result_capacity=self._shape.slot_rank_rows,
            column_scales=0,
            column_words=0,
        )

    def release(self, rank: int) -> None:
        self._engines[rank].release(self._ranks.streams[rank].handle, _SLOT)

    def combine(self, rank: int, *, num_sms: int) -> None:
        """Of rows in the window, without a side; weighted but in layout rank."""
        memory, by_rank = self._memory[rank], self._cell.layout == "rank"
        self._engines[rank].combine(
            stream=self._ranks.streams[rank].handle,
            lane=_LANE,
            half=self._ranks.native.Half.both,
            num_sms=num_sms,
            rows=self._address(rank, "combine_rows" if by_rank else "recv_rows"),
            num_rows=self._num_rows[rank],
            side=0,
            weighted=not by_rank,
            with_side=False,
            out=memory.combined.data_ptr(),
            side_out=0,
            num_tokens=self._cell.num_tokens,
            source=memory.source.data_ptr(),
            relay=memory.relay.data_ptr(),
            kept_counts=memory.kept_counts.data_ptr(),
            kept_routing=memory.kept_routing.data_ptr(),
            kept_capacity=self._shape.slot_rank_rows,
        )

    def check(self) -> None:
        """Raises what some rank's kernels refused, or gave up at."""
        for engine in self._engines:
            engine.check()

    def _address(self, rank: int, region: str) -> int:
        return self._windows[rank].address + self._offsets[region]
