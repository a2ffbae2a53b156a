"""What was measured for this project beside the model: kernels by themselves, and whole operations of the benchmark."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from deep_a2a.benchmark.record import Record

from .plan import OperationPlan, make_plan
from .tables import Table, microseconds
from .workload import Workload


@dataclass(frozen=True)
class MeasuredTime:
    """`low_us` and `high_us` are equal but where a range was noted."""

    name: str
    num_sms: int
    low_us: float
    high_us: float
    model: OperationPlan

    @property
    def ratio(self) -> float:
        """Measured over modelled, of the middle of the range."""
        return (self.low_us + self.high_us) / 2 / self.model.estimate.total_us


def measured_kernels(path: Path) -> list[MeasuredTime]:
    """The kernels of bench/results/published.json."""
    entries: list[dict[str, Any]] = json.loads(path.read_text(encoding="utf-8"))["kernels"]
    times = []
    for entry in entries:
        names = ("num_ranks", "ranks_per_node", "num_tokens", "hidden", "num_topk", "num_experts", "dtype", "layout")
        workload = Workload(**{name: entry[name] for name in names})
        low, high = min(entry["kernel_us"]), max(entry["kernel_us"])
        times.append(
            MeasuredTime(entry["kernel"], entry["num_sms"], low, high, _model(workload, entry["op"], entry["num_sms"]))
        )
    return times


def measured_operations(records: Iterable[Record]) -> list[MeasuredTime]:
    """Plain records of the benchmark on GPUs: nothing cached or copied, a stream of the caller's. One of each kind."""
    times: dict[tuple[str, int], MeasuredTime] = {}
    for record in records:
        plain = record.checked and record.input == "lent" and not (record.cached or record.host_sync)
        plain = plain and (record.op == "combine" or record.output == "leased") and record.stream == "current"
        if record.backend != "cuda" or record.op == "overlap" or not plain or record.num_sms is None:
            continue
        payload = "BF16" if record.op == "combine" else record.dtype.upper().replace("_CAST", " by a cast")
        name = f"{record.op} {payload}, {record.layout}, {record.num_tokens} tokens"
        name += "" if record.routing == "uniform" else f", {record.routing}"
        if record.routing not in ("uniform", "zipf") or (name, record.num_sms) in times:
            continue
        workload = Workload(
            num_ranks=record.num_ranks,
            ranks_per_node=record.ranks_per_node,
            num_tokens=record.num_tokens,
            hidden=record.hidden,
            num_experts=record.num_experts,
            num_topk=record.num_topk,
            dtype="bf16" if record.dtype == "bf16" else "fp8",
            layout=record.layout,
            routing="zipf" if record.routing == "zipf" else "uniform",
            topk_groups=record.topk_groups,
        )
        model = _model(workload, record.op, record.num_sms)
        times[name, record.num_sms] = MeasuredTime(name, record.num_sms, record.total_us, record.total_us, model)
    return [times[key] for key in sorted(times)]


def measured_table(times: Iterable[MeasuredTime]) -> Table:
    rows = tuple(
        (each.name, str(each.num_sms), microseconds(each.model.estimate.total_us), each.model.estimate.limit,
         _range(each), f"{each.ratio:.2f}")
        for each in times
    )  # fmt: skip
    return Table(("", "SMs", "model us", "limit", "measured us", "measured / model"), rows)


def _range(time: MeasuredTime) -> str:
    low, high = microseconds(time.low_us), microseconds(time.high_us)
    return low if low == high else f"{low} to {high}"


def _model(workload: Workload, op: str, num_sms: int) -> OperationPlan:
    plan = make_plan(workload, num_sms=num_sms)
    return plan.dispatch if op == "dispatch" else plan.combine
