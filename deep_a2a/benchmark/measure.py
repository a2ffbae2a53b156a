"""Measures a cell on one rank: fresh data, timed operations, checks, the baseline beside it."""

from __future__ import annotations

import statistics
import sys
from collections import defaultdict
from collections.abc import Callable, Sequence
from functools import partial

import torch
import torch.distributed as dist

from deep_a2a import Buffer
from deep_a2a.benchmark import plain
from deep_a2a.benchmark.agreement import MeasurementError, agree, attempt, largest, total
from deep_a2a.benchmark.alltoall import AllToAll
from deep_a2a.benchmark.ceiling import CopyCeiling
from deep_a2a.benchmark.cell import Cell
from deep_a2a.benchmark.clock import Gate
from deep_a2a.benchmark.contenders import AllToAllContender, BufferContender, Contender, Counting
from deep_a2a.benchmark.graph import GraphContender
from deep_a2a.benchmark.link import ceiling_fields
from deep_a2a.benchmark.make_buffer import make_buffer
from deep_a2a.benchmark.record import Record
from deep_a2a.benchmark.session import Session
from deep_a2a.benchmark.stream_gate import Enqueue
from deep_a2a.benchmark.traffic import Traffic, combine_traffic, dispatch_traffic, mean_traffic
from deep_a2a.benchmark.workload import Payload, Workload

_CAPACITY_STEP = 16
_MAX_LATE_STARTS = 10


class CellRun:
    """One cell on one rank. Each iteration has its own data; Buffer and baseline take turns at going first."""

    def __init__(self, session: Session, cell: Cell) -> None:
        self._session, self._cell, self._rank = session, cell, session.rank
        self._workload = Workload(cell, session.place.device)
        routed = session.routed(cell)
        self._routings, self._received = routed.routings, routed.received
        # Sized for the routing of all iterations: skewed routing fits, and uniform routing takes no more than it needs.
        self._num_rows = max(self._largest(max(received.experts.shape[0] for received in self._received)), 1)
        most = self._largest(max(int(received.rows_per_expert.max()) for received in self._received))
        self._capacity = max(-(-most // _CAPACITY_STEP), 1) * _CAPACITY_STEP
        num_rows = {
            "rank": cell.num_ranks * cell.num_tokens,
            "expert": self._num_rows,
            "padded": cell.num_local_experts * self._capacity,
        }[cell.layout]
        self._y = torch.zeros(num_rows, cell.hidden, dtype=torch.bfloat16, device=session.place.device)
        self._gate = Gate(session.group)
        self._times: dict[tuple[str, str], list[float]] = defaultdict(list)
        self._put_bytes: dict[tuple[str, str], list[int]] = defaultdict(list)
        self._buffer: Buffer | None = None

    def run(self) -> list[Record]:
        """Measures, and returns the records of dispatch and of combine. MeasurementError on every rank if it fails."""
        cell, session = self._cell, self._session
        counted = self._routings[cell.num_warmup :]
        traffic = {
            "dispatch": mean_traffic([dispatch_traffic(cell, routing.topk_idx) for routing in counted]),
            "combine": mean_traffic([combine_traffic(cell, routing.topk_idx) for routing in counted]),
        }
        copies = CopyCeiling(session.group, traffic["dispatch"].wire.total) if cell.backend == "cpu" else None
        with make_buffer(session, cell, self._num_rows, self._capacity) as buffer:
            self._buffer = buffer
            contenders = self._contenders(buffer)
            if cell.backend != "cpu":
                contenders = [each for each in contenders if self._rehearse(*each)]
            for iteration in range(len(self._routings)):
                self._iterate(iteration, contenders if iteration % 2 == 0 else contenders[::-1])
                if copies is not None:
                    self._time("ceiling", "copy", copies.copy)
            session.place.synchronize()
            for _, contender in contenders:
                contender.close()
            dist.barrier(group=session.group)
        self._buffer = None
        speed = None if copies is None else copies.gbs(self._median("ceiling", "copy"))
        return [self._record(op, each, speed) for op, each in traffic.items()]

    def _contenders(self, buffer: Buffer) -> list[tuple[str, Contender]]:
        cell, session = self._cell, self._session
        subject = GraphContender(buffer, cell) if cell.graph else BufferContender(buffer, cell)
        contenders: list[tuple[str, Contender]] = [("subject", subject)]
        if self._has_baseline:
            assert session.rows_group is not None
            exchange = AllToAll(
                session.group, session.rows_group, cell, self._num_rows, self._capacity, session.place.device
            )
            counting: Counting = "timed" if cell.backend == "cpu" else "ahead"
            contenders.append(("baseline", AllToAllContender(exchange, cell, counting)))
        return contenders

    @property
    def _has_baseline(self) -> bool:
        return self._cell.baseline and self._session.rows_group is not None

    def _rehearse(self, name: str, contender: Contender) -> bool:
        """Everything once before any stream is held: loading a kernel, for one, may wait for all that is under way.

        False for a baseline that does not work; MeasurementError on every rank if the subject does not.
        """
        x, topk, y = self._inputs(0)

        def all_of_it() -> None:
            contender.load(x, *topk)
            contender.dispatch()
            contender.load_expert_output(y)
            contender.combine()
            contender.finish()
            self._session.place.synchronize()
            if isinstance(contender, GraphContender):
                contender.capture(x, *topk, y)

        try:
            agree(self._session.group, attempt(all_of_it))
        except MeasurementError as error:
            if name == "subject":
                raise
            self._session.give_up_baseline()
            print(f"no baseline from here on: {error}", file=sys.stderr, flush=True)
            return False
        return True

    def _iterate(self, iteration: int, contenders: Sequence[tuple[str, Contender]]) -> None:
        """One iteration of each contender, on the same data; MeasurementError if a result is wrong."""
        cell, received = self._cell, self._received[iteration]
        x, topk, y = self._inputs(iteration)
        expected = self._expected(iteration) if cell.checked else None
        for name, contender in contenders:
            contender.load(x, *topk)
            self._time(name, "dispatch", contender.dispatch, undo=contender.finish)
            # The baseline is checked once. It adds in another order: a wrong row makes more of a difference than that.
            check = expected if name == "subject" or iteration == 0 else None
            if check is not None:
                self._check(partial(self._require_delivered, contender, received, check[0]))
            contender.load_expert_output(y)
            self._time(name, "combine", contender.combine)
            if check is not None:
                self._check(partial(self._require_combined, contender, check[1], name == "subject"))
            contender.finish()

    def _require_delivered(
        self, contender: Contender, received: plain.ReceivedRows, payloads: Sequence[Payload]
    ) -> None:
        plain.require_delivered(self._cell, received, payloads, contender.delivered(), self._capacity)

    def _require_combined(self, contender: Contender, expected: torch.Tensor, exact: bool) -> None:
        plain.require_combined(contender.combined(), expected, exact)

    def _check(self, requirement: Callable[[], None]) -> None:
        agree(self._session.group, attempt(requirement))

    def _inputs(self, iteration: int) -> tuple[Payload, tuple[torch.Tensor, torch.Tensor], torch.Tensor]:
        """This rank's rows, their routing, and expert outputs, in the shape of the layout, for the rows it receives.

        Expert outputs overwrite those of the iteration before.
        """
        cell, routing = self._cell, self._routings[iteration]
        bases = (self._workload.expert_base(iteration, source) for source in range(cell.num_ranks))
        received = self._received[iteration]
        y = plain.write_expert_output(cell, received, bases, self._rank, self._y, self._capacity)
        topk = routing.topk_idx[self._rank], routing.topk_weights[self._rank]
        return self._workload.input(iteration, self._rank), topk, y

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
            before = self._put_so_far()
            microseconds = self._sample(name, op, operation)
            if microseconds is not None:
                self._times[name, op].append(microseconds)
                self._put_bytes[name, op].append(self._put_so_far() - before)
                return
            if undo is not None:
                undo()
        raise RuntimeError(f"{_MAX_LATE_STARTS} times in a row some rank was too late to start with the others")

    def _sample(self, name: str, op: str, operation: Callable[[], object]) -> float | None:
        fabric = self._session.fabric(self._cell)
        if fabric is None:
            return self._gate.measure(operation)
        waits = self._cell.host_sync and name == "subject" and op == "dispatch"
        enqueue: Enqueue = "released" if waits else "held"
        return fabric.gate.measure(lambda _: operation(), enqueue)

    def _put_so_far(self) -> int:
        """Bytes that this rank's Buffer has put to other nodes."""
        return 0 if self._buffer is None or self._cell.num_nodes == 1 else self._buffer.wire_bytes["network"]

    def _median(self, name: str, op: str) -> float:
        return statistics.median(self._times[name, op][self._cell.num_warmup :])

    def _largest(self, value: int) -> int:
        return int(largest(self._session.group, value)[0])

    def _record(self, op: str, traffic: Traffic, copy_gbs: float | None) -> Record:
        cell, total_us = self._cell, self._median("subject", op)
        fabric = self._session.fabric(cell)
        if fabric is None:
            links = ceiling_fields(total_us, traffic.wire, copy_gbs, "memmove into a neighbour's window")
        else:
            links = fabric.fields(total_us, traffic.wire, cell.num_sms)
        return cell.record(
            op=op,
            output=cell.output if op == "dispatch" else "owned",  # combine returns ordinary tensors
            num_gpus=self._session.place.num_gpus,
            total_us=round(total_us, 1),
            wire_bytes=traffic.wire,
            logical_bytes=traffic.logical_bytes,
            **links,
            **self._network_bytes(op, traffic),
            baseline=self._session.baseline_name if self._has_baseline else None,
            baseline_us=round(self._median("baseline", op), 1) if self._has_baseline else None,
        )

    def _network_bytes(self, op: str, traffic: Traffic) -> dict[str, int]:
        """What all ranks put to other nodes, and the least that they had to: means of the iterations that count."""
        if self._cell.num_nodes == 1:
            return {}
        put = total(self._session.group, sum(self._put_bytes["subject", op][self._cell.num_warmup :]))[0]
        return {
            "network_put_bytes": round(put / self._cell.num_iters),
            "network_least_bytes": traffic.least_network_bytes,
        }
