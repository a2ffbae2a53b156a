"""Communication beside computation: matrix products on the compute stream while a dispatch and a combine run.

As many products as take about as long as the communication. Each iteration has fresh data, and times from gates of
their own: a dispatch followed by a combine; the products; both at once, until the products are done, and until
everything is. Alone, the products have all SMs.
"""

from __future__ import annotations

import statistics
from functools import partial

import torch.distributed as dist

from deep_a2a.benchmark.agreement import agree, attempt
from deep_a2a.benchmark.contenders import BufferContender
from deep_a2a.benchmark.make_buffer import make_buffer
from deep_a2a.benchmark.measure import CellRun
from deep_a2a.benchmark.products import Products, leaving
from deep_a2a.benchmark.record import Record
from deep_a2a.benchmark.traffic import combine_traffic, dispatch_traffic, mean_traffic

_NAME = "overlap"
_CALIBRATION = 5


class OverlapRun(CellRun):
    """One cell with subject "overlap", on one rank."""

    def run(self) -> list[Record]:
        """One record. MeasurementError on every rank if it fails."""
        cell, session = self._cell, self._session
        self._products = Products(cell, session.place.device)
        with make_buffer(session, cell, self._num_rows, self._capacity) as buffer:
            contender = BufferContender(buffer, cell, mode="async")
            agree(session.group, attempt(partial(self._run_once, contender)))
            self._choose_count(contender)
            self._times.clear()
            for iteration in range(len(self._routings)):
                self._overlap(iteration, contender)
            session.place.synchronize()
            contender.close()
            dist.barrier(group=session.group)
        return [self._overlap_record()]

    def _run_once(self, contender: BufferContender) -> None:
        """Whatever is made for the first time is made here, before any stream is held."""
        x, topk, y = self._inputs(0)
        contender.load(x, *topk)
        contender.dispatch()
        contender.load_expert_output(y)
        contender.combine()
        contender.wait()
        self._products.run()
        with leaving(self._cell.gemm_leaves, self._session.place.device):
            self._products.run()
        contender.finish()
        self._session.place.synchronize()

    def _choose_count(self, contender: BufferContender) -> None:
        """So many products that they take as long as the communication; the same on every rank, as times are."""
        for _ in range(_CALIBRATION):
            self._communicate_alone(contender)
            self._time(_NAME, "gemm_alone", self._products.run)
        comm, gemm = (statistics.median(self._times[_NAME, op]) for op in ("comm_alone", "gemm_alone"))
        self._products.count = max(round(comm / gemm), 1)

    def _overlap(self, iteration: int, contender: BufferContender) -> None:
        cell, received = self._cell, self._received[iteration]
        x, topk, y = self._inputs(iteration)
        contender.load(x, *topk)
        contender.refill(y)
        self._communicate_alone(contender)
        self._time(_NAME, "gemm_alone", self._products.run)
        for op, waiting in (("gemm_beside", False), ("both", True)):
            self._time(_NAME, op, partial(self._both, contender, waiting=waiting))
            contender.wait()
            if cell.checked and op == "both":
                payloads, sums = self._expected(iteration)
                self._check(partial(self._require_delivered, contender, received, payloads))
                self._check(partial(self._require_combined, contender, sums, True))
            contender.finish()

    def _communicate_alone(self, contender: BufferContender) -> None:
        def communicate() -> None:
            contender.dispatch()
            contender.combine()
            contender.wait()

        self._time(_NAME, "comm_alone", communicate)
        contender.finish()

    def _both(self, contender: BufferContender, waiting: bool) -> None:
        contender.dispatch()
        contender.combine()
        with leaving(self._cell.gemm_leaves, self._session.place.device):
            self._products.run()
        if waiting:
            contender.wait()

    def _overlap_record(self) -> Record:
        cell, session = self._cell, self._session
        counted = [routing.topk_idx for routing in self._routings[cell.num_warmup :]]
        there = mean_traffic([dispatch_traffic(cell, idx) for idx in counted])
        back = mean_traffic([combine_traffic(cell, idx) for idx in counted])
        wire, fabric = there.wire + back.wire, session.fabric(cell)
        assert fabric is not None, "a cell on the cpu backend is no overlap"
        times = {op: round(self._median(_NAME, op), 1) for op in ("gemm_alone", "gemm_beside", "comm_alone", "both")}
        return cell.record(
            op="overlap",
            num_gpus=session.place.num_gpus,
            total_us=times["both"],
            wire_bytes=wire,
            logical_bytes=there.logical_bytes + back.logical_bytes,
            **fabric.fields(times["comm_alone"], wire, cell.num_sms),
            **{f"{op}_us": microseconds for op, microseconds in times.items()},
            gemm=self._products.describe(),
        )
