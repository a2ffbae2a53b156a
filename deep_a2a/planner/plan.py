"""All that is planned for one workload."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from deep_a2a.memory import MemoryTable

from .rates import Hardware
from .roofline import Estimate, estimate
from .spread import Spread, find_spread
from .staging import Staging, plan_staging
from .traffic import Traffic, combine_traffic, dispatch_traffic
from .windows import DEFAULT_SLACK, WindowPlan, part_bytes, plan_window
from .workload import Workload


@dataclass(frozen=True)
class OperationPlan:
    """A dispatch or a combine."""

    traffic: Traffic
    estimate: Estimate

    @property
    def node_gbs(self) -> float:
        """Logical GB/s of the network, as others report it: rows to all nodes, the own one included, over the time."""
        return self.traffic.node_rows * self.traffic.row_bytes / self.estimate.total_us / 1e3

    @property
    def logical_gbs(self) -> float:
        """Rows that the busiest GPU receives, its own included, over the time."""
        return self.traffic.logical_bytes / self.estimate.total_us / 1e3

    def to_json(self) -> dict[str, Any]:
        traffic = asdict(self.traffic)
        del traffic["op"]
        return {
            **traffic,
            "nvlink_wire_bytes": self.traffic.nvlink_wire_bytes,
            "network_wire_bytes": self.traffic.network_wire_bytes,
            "logical_bytes": self.traffic.logical_bytes,
            "node_gbs": self.node_gbs,
            "logical_gbs": self.logical_gbs,
            **{key: value for key, value in asdict(self.estimate).items() if key != "op"},
        }


@dataclass(frozen=True)
class Plan:
    """What `deep-a2a plan` prints."""

    workload: Workload
    hardware: Hardware
    num_sms: int | None
    spread: Spread
    dispatch: OperationPlan
    combine: OperationPlan
    window: WindowPlan
    staging: Staging

    def to_json(self) -> dict[str, Any]:
        """Everything, in bytes, microseconds and 1e9 bytes a second."""
        return {
            "workload": {**asdict(self.workload), "num_nodes": self.workload.num_nodes},
            "hardware": asdict(self.hardware),
            "num_sms": self.num_sms,
            "spread": {
                "ranks_per_token": self.spread.ranks_per_token,
                "nodes_per_token": self.spread.nodes_per_token,
                "busiest_rank": self.spread.busiest_rank,
                "method": self.spread.method,
            },
            "dispatch": self.dispatch.to_json(),
            "combine": self.combine.to_json(),
            "window": {
                "worst": _table(self.window.worst),
                "bounded": _table(self.window.bounded),
                "max_recv_rows": self.window.max_recv_rows,
            },
            "staging": asdict(self.staging),
        }


def make_plan(
    workload: Workload, hardware: Hardware | None = None, num_sms: int | None = None, slack: float = DEFAULT_SLACK
) -> Plan:
    """`hardware`: an H200 with a 400 Gb/s NIC by default. `num_sms`: of each kernel, None for as many as it takes.

    Raises:
        TypeError, ValueError: an argument is of the wrong kind or out of range; the message names it.
    """
    hardware = Hardware() if hardware is None else hardware
    spread, staging = find_spread(workload), plan_staging(workload)
    dispatch, combine = (
        OperationPlan(traffic, estimate(workload, traffic, hardware, num_sms, staging.num_rounds))
        for traffic in (dispatch_traffic(workload, spread), combine_traffic(workload, spread))
    )
    window = plan_window(workload, spread, slack)
    return Plan(workload, hardware, num_sms, spread, dispatch, combine, window, staging)


def _table(table: MemoryTable | None) -> dict[str, Any] | None:
    if table is None:
        return None
    return {"bytes": table.total_bytes, "parts": part_bytes(table)}
