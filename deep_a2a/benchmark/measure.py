"""Measures the cells of a benchmark on one rank: fresh data, timed operations, checks, the baseline beside it."""

from __future__ import annotations

import statistics
import sys
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence

import torch
import torch.distributed as dist

from deep_a2a import Buffer
from deep_a2a.benchmark import gloo, plain
from deep_a2a.benchmark.ceiling import CopyCeiling
from deep_a2a.benchmark.cell import Cell
from deep_a2a.benchmark.clock import Gate
from deep_a2a.benchmark.contenders import BufferContender, Contender, GlooContender
from deep_a2a.benchmark.record import Record, WireBytes
from deep_a2a.benchmark.traffic import Traffic, combine_traffic, dispatch_traffic
from deep_a2a.benchmark.workload import Payload, Workload

_CAPACITY_STEP = 16
_MAX_LATE_STARTS = 10


def measure_cells(group: dist.ProcessGroup, cells: Sequence[Cell]) -> list[Record]:
    """Two records a cell, dispatch and combine; collective over `group`. Every rank returns the same."""
    records: list[Record] = []
    for number, cell in enumerate(cells, start=1):
        if dist.get_rank(group) == 0:
            print(f"[{number}/{len(cells)}] {cell.describe()}", file=sys.stderr, flush=True)
        records += CellRun(group, cell).run()
    return records


class CellRun:
    """One cell on one rank. Each iteration has its own data; Buffer and baseline take turns at going first."""

    def __init__(self, group: dist.ProcessGroup, cell: Cell) -> None:
        self._cell, self._group, self._rank = cell, group, dist.get_rank(group)
        self._workload = Workload(cell)
        self._routings = [self._workload.routing(i) for i in range(cell.num_warmup + cell.num_iters)]
        self._received = [plain.received_rows(cell, routing, self._rank) for routing in self._routings]
        # Sized for the routing of all iterations: skewed routing fits, and uniform routing takes no more than it needs.
        self._num_rows = max(self._largest(max(received.experts.shape[0] for received in self._received)), 1)
        most = self._largest(max(int(received.rows_per_expert.max()) for received in self._received))
        self._capacity = max(-(-most // _CAPACITY_STEP), 1) * _CAPACITY_STEP
        num_rows = {
            "rank": cell.num_ranks * cell.num_tokens,
            "expert": self._num_rows,
            "padded": cell.num_local_experts * self._capacity,
        }[cell.layout]
        self._y = torch.zeros(num_rows, cell.hidden, dtype=torch.bfloat16)
        self._gate = Gate(group)
        self._times: dict[tuple[str, str], list[float]] = defaultdict(list)

    def run(self) -> list[Record]:
        """Measures, and returns the records of dispatch and of combine."""
        cell = self._cell
        counted = self._routings[cell.num_warmup :]
        traffic = {
            "dispatch": [dispatch_traffic(cell, routing.topk_idx) for routing in counted],
            "combine": [combine_traffic(cell, routing.topk_idx) for routing in counted],
        }
        ceiling = CopyCeiling(self._group, max(each.wire.total for each in traffic["dispatch"]))
        with Buffer(
            self._group,
            hidden=cell.hidden,
            num_experts=cell.num_experts,
            num_topk=cell.num_topk,
            num_max_tokens_per_rank=cell.num_tokens,
            ranks_per_node=cell.ranks_per_node,
            backend=cell.backend,
            layout=cell.layout,
            expert_capacity=self._capacity if cell.layout == "padded" else None,
            max_recv_rows=self._num_rows if cell.layout == "expert" else None,
        ) as buffer:
            contenders: list[tuple[str, Contender]] = [("subject", BufferContender(buffer, cell))]
            if cell.baseline:
                exchange = gloo.GlooExchange(self._group, cell, self._num_rows, self._capacity)
                contenders.append(("baseline", GlooContender(exchange, cell)))
            for iteration in range(len(self._routings)):
                self._iterate(iteration, contenders if iteration % 2 == 0 else contenders[::-1])
                self._time("ceiling", "copy", ceiling.copy)
            dist.barrier(group=self._group)
        ceiling_gbs = ceiling.gbs(self._median("ceiling", "copy"))
        return [self._record(op, each, ceiling_gbs) for op, each in traffic.items()]

    def _iterate(self, iteration: int, contenders: Sequence[tuple[str, Contender]]) -> None:
        """One iteration of each contender, on the same data; raises ValueError if a result is wrong."""
        cell, routing, received = self._cell, self._routings[iteration], self._received[iteration]
        x = self._workload.input(iteration, self._rank)
        topk = routing.topk_idx[self._rank], routing.topk_weights[self._rank]
        y = self._expert_rows(iteration)
        expected = self._expected(iteration) if cell.checked else None
        for name, contender in contenders:
            contender.load(x, *topk)
            self._time(name, "dispatch", contender.dispatch, undo=contender.finish)
            # The baseline is checked once. It adds in another order: a wrong row makes more of a difference than that.
            check = expected if name == "subject" or iteration == 0 else None
            if check is not None:
                plain.require_delivered(cell, received, check[0], contender.delivered(), self._capacity)
            contender.load_expert_output(y)
            self._time(name, "combine", contender.combine)
            if check is not None:
                plain.require_combined(contender.combined(), check[1], exact=name == "subject")
            contender.finish()

    def _expert_rows(self, iteration: int) -> torch.Tensor:
        """Expert outputs for this rank's rows, in the shape of its layout; overwrites those of the iteration before."""
        bases = (self._workload.expert_base(iteration, source) for source in range(self._cell.num_ranks))
        received = self._received[iteration]
        return plain.write_expert_output(self._cell, received, bases, self._rank, self._y, self._capacity)

    def _expected(self, iteration: int) -> tuple[list[Payload], torch.Tensor]:
        """Payloads of all sources, and what combine gives this rank."""
        cell, routing = self._cell, self._routings[iteration]
        payloads = [self._workload.delivered(iteration, source) for source in range(cell.num_ranks)]
        base = self._workload.expert_base(iteration, self._rank)
        topk = routing.topk_idx[self._rank], routing.topk_weights[self._rank]
        return payloads, plain.combined(cell, *topk, base, self._rank)

    def _time(
        self, name: str, op: str, operation: Callable[[], object], undo: Callable[[], None] | None = None
    ) -> None:
        for _ in range(_MAX_LATE_STARTS):
            microseconds = self._gate.measure(operation)
            if microseconds is not None:
                self._times[name, op].append(microseconds)
                return
            if undo is not None:
                undo()
        raise RuntimeError(f"{_MAX_LATE_STARTS} times in a row some rank was too late to start with the others")

    def _median(self, name: str, op: str) -> float:
        return statistics.median(self._times[name, op][self._cell.num_warmup :])

    def _largest(self, value: int) -> int:
        tensor = torch.tensor(value)
        dist.all_reduce(tensor, dist.ReduceOp.MAX, group=self._group)
        return int(tensor)

    def _record(self, op: str, traffic: Sequence[Traffic], ceiling_gbs: float) -> Record:
        cell, total_us = self._cell, self._median("subject", op)
        wire = WireBytes(
            nvlink=_mean(each.wire.nvlink for each in traffic),
            network=_mean(each.wire.network for each in traffic),
            shm=_mean(each.wire.shm for each in traffic),
        )
        link_us = wire.slowest / ceiling_gbs / 1e3
        return cell.record(
            op=op,
            output=cell.output if op == "dispatch" else "owned",  # combine returns ordinary tensors
            total_us=round(total_us, 1),
            wire_bytes=wire,
            logical_bytes=_mean(each.logical_bytes for each in traffic),
            ceiling_gbs=round(ceiling_gbs, 3),
            link_time_ratio=round(total_us / link_us, 3) if link_us > 0 else None,
            baseline=gloo.NAME if cell.baseline else None,
            baseline_us=round(self._median("baseline", op), 1) if cell.baseline else None,
        )


def _mean(values: Iterable[int]) -> int:
    return round(statistics.fmean(values))
