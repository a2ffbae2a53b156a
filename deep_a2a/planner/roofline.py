"""From bytes to times: everything overlaps, so what takes longest counts, plus the flags that nothing can hide.

A lower bound. What it leaves out is in docs/planner.md: launches, counting, rows that are not spread evenly by chance.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from deep_a2a._cpu import STAGED_ROUNDS

from . import wire
from .rates import Hardware
from .traffic import Op, Traffic
from .workload import Workload

_GB = 1e3  # bytes in a microsecond at 1 GB/s


@dataclass(frozen=True)
class Estimate:
    """One operation, in microseconds.

    Attributes:
        terms: the time of each resource alone; those of the SMs only if their number is given, but for the counts that
            each SM reads for itself. "rounds" only where rounds wait for room between nodes.
        fixed_us: flags on the critical path and, between nodes, the first chunk.
        total_us: the longest term, and what is fixed.
        limit: the name of the longest term.
        sms_needed: SMs with which they are not the longest term.
    """

    op: Op
    terms: dict[str, float]
    fixed_us: float
    total_us: float
    limit: str
    sms_needed: int


def estimate(
    workload: Workload, traffic: Traffic, hardware: Hardware, num_sms: int | None = None, num_rounds: int = 1
) -> Estimate:
    """`num_sms`: of the kernel; None for as many as it takes. `num_rounds`: between nodes.

    Raises:
        TypeError, ValueError: ``num_sms`` is no positive int.
    """
    if num_sms is not None and (isinstance(num_sms, bool) or not isinstance(num_sms, int)):
        raise TypeError(f"num_sms is {num_sms!r} of type {type(num_sms).__name__}, expected an int or None")
    if num_sms is not None and num_sms < 1:
        raise ValueError(f"num_sms is {num_sms}, expected 1 or more")
    pushed = traffic.op == "dispatch" and workload.layout == "rank"
    nvlink_gbs = hardware.nvlink_push_gbs if pushed else hardware.nvlink_pull_gbs
    links = {
        "NVLink out": traffic.nvlink_out / nvlink_gbs / _GB,
        "NVLink in": traffic.nvlink_in / nvlink_gbs / _GB,
        "network out": traffic.network_out / hardware.network_gbs / _GB,
        "network in": traffic.network_in / hardware.network_gbs / _GB,
        "memory": traffic.memory / hardware.memory_gbs / _GB,
        "counts": traffic.each_sm_in / hardware.sm_in_gbs / _GB,
    }
    if num_rounds > STAGED_ROUNDS:
        links["rounds"] = rounds_time(num_rounds, hardware)
    terms = dict(links)
    if num_sms is not None:
        terms["SMs out"] = traffic.sm_out / num_sms / hardware.sm_out_gbs / _GB
        terms["SMs in"] = traffic.sm_in / num_sms / hardware.sm_in_gbs / _GB
    limit = max(terms, key=lambda name: round(terms[name], 6))  # of equals the first, whatever the last bits are
    fixed_us = fixed_time(workload, traffic, hardware, num_rounds)
    return Estimate(
        op=traffic.op,
        terms=terms,
        fixed_us=fixed_us,
        total_us=terms[limit] + fixed_us,
        limit=limit,
        sms_needed=sms_needed(traffic, hardware, max(links.values())),
    )


def rounds_time(num_rounds: int, hardware: Hardware) -> float:
    """A round follows the one that had its room before, whose signal and credit each cross the network."""
    followers = math.ceil(num_rounds / STAGED_ROUNDS) - 1
    return 2 * followers * hardware.network_signal_us


def fixed_time(workload: Workload, traffic: Traffic, hardware: Hardware, num_rounds: int = 1) -> float:
    """Flags that follow from each other. Between nodes, the relay starts when a first chunk has come.

    Dispatch: counts, rows (sent or relayed), and where rows are pulled that they have been read. Combine: rows are
    ready, rows have been read. Between nodes the last chunk's signal is one more.
    """
    flags = 3 if traffic.op == "dispatch" and workload.layout != "rank" else 2
    local_us = flags * hardware.flag_us if workload.num_ranks > 1 else 0.0
    if workload.num_nodes == 1:
        return local_us
    round_of_stream = traffic.network_out / (workload.num_nodes - 1) / num_rounds
    chunk = min(round_of_stream, float(wire.CHUNK_BYTES))
    return local_us + hardware.network_signal_us + chunk / hardware.network_gbs / _GB


def sms_needed(traffic: Traffic, hardware: Hardware, links_us: float) -> int:
    """The smallest number of SMs whose terms are no longer than `links_us`."""
    out_us = traffic.sm_out / hardware.sm_out_gbs / _GB
    in_us = traffic.sm_in / hardware.sm_in_gbs / _GB
    return max(1, math.ceil(max(out_us, in_us) / links_us))
