"""Rows on their way between nodes: the room that they have, and the rounds that they take."""

from __future__ import annotations

from dataclasses import dataclass, replace

from deep_a2a.memory import table_of

from .workload import Workload

_NO_LIMIT = 2**62
_REGIONS = ("net_in", "net_out")


@dataclass(frozen=True)
class Staging:
    """Of one rank, all lanes together.

    Attributes:
        num_rounds: of a dispatch or a combine; 1 where all rows have room at once.
        tokens_per_round: of a source.
        num_bytes: of the room, as ``Buffer.memory`` has it.
        unlimited_bytes: of the room for all rows at once.
    """

    num_rounds: int
    tokens_per_round: int
    num_bytes: int
    unlimited_bytes: int


def plan_staging(workload: Workload) -> Staging:
    """With the workload's limit."""
    shape = workload.settings().shape()
    return Staging(
        num_rounds=shape.num_rounds,
        tokens_per_round=shape.tokens_per_round,
        num_bytes=_staged_bytes(workload),
        unlimited_bytes=_staged_bytes(replace(workload, staging_bytes=_NO_LIMIT)),
    )


def _staged_bytes(workload: Workload) -> int:
    table = table_of(workload.settings().shape())
    return sum(region.bytes for region in table.regions if region.name in _REGIONS)
